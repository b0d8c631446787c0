"""Losses and gradients of text GRPO beside those of TRL's own trainer, option set by option set. Needs TRL 1.16."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.trainers import even, grpo
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")

ROWS, MICRO_BATCH = 16, 4
SEQUENCE = dict(importance_sampling_level="sequence")
LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
SETS: list[dict[str, Any]] = [
    *(dict(loss_type=name, delta=None) for name in LOSS_TYPES),
    *(dict(loss_type=name, **SEQUENCE) for name in LOSS_TYPES),
    *(dict(loss_type=name, beta=0.2) for name in LOSS_TYPES),
    *(dict(loss_type=name, beta=0.2, use_bias_correction_kl=False) for name in ("dapo", "grpo", "vespo")),
    *(dict(loss_type=name, beta=0.2, **SEQUENCE) for name in ("grpo", "dapo", "luspo", "vespo", "sapo")),
    *(dict(loss_type=name, entropy_coef=0.3) for name in LOSS_TYPES),
    *(dict(loss_type=name, mask_truncated_completions=True, entropy_coef=0.1, beta=0.1) for name in LOSS_TYPES),
    *(dict(loss_type=name, importance_sampling_cap=1.2, beta=0.1) for name in LOSS_TYPES if name != "vespo"),
    *(dict(loss_type=name, importance_sampling_cap=1.2, **SEQUENCE) for name in ("grpo", "dapo", "cispo", "sapo")),
    dict(epsilon=0.05, epsilon_high=0.28),
    dict(loss_type="grpo", epsilon=10.0, beta=0.001),  # DeepSeek-R1: no lower bound
    dict(loss_type="cispo", epsilon=1.5),
    dict(epsilon=0.3, delta=1.5),
    dict(epsilon=0.3, delta=1.1),  # below 1 + epsilon
    dict(epsilon=0.3, delta=1.1, loss_type="grpo", **SEQUENCE),
    dict(loss_type="cispo", epsilon_high=5.0),
    dict(loss_type="cispo", epsilon=0.4),  # the largest weight is then 0.4
    dict(loss_type="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=0.5),
    dict(loss_type="vespo", vespo_k_pos=1.0, vespo_lambda_pos=0.5, vespo_k_neg=0.7, vespo_lambda_neg=0.3),
    dict(scale_rewards="batch"),
    dict(scale_rewards="none"),
    dict(scale_rewards=False, loss_type="dr_grpo"),
    dict(temperature=1.0),
]


def trl_advantages(rewards: Tensor, scale: Any) -> Tensor:
    """Return TRL's advantages [R] of groups of four, with the paper's 1e-6 in place of TRL's 1e-4."""
    groups = rewards.view(-1, 4)
    centred = groups - groups.mean(1, keepdim=True)
    if scale in ("none", False):
        return centred.flatten()
    deviation = rewards.std() if scale == "batch" else groups.std(1, keepdim=True)
    return (centred / (deviation + 1e-6)).flatten()


def trl_trainer(model: Any, options: dict[str, Any], temperature: float, limit: int, out: str) -> Any:
    """Return TRL's trainer with what `_compute_loss` reads, around a model that it patches as its `__init__` does."""
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    args = GRPOConfig(
        output_dir=out,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ROWS // MICRO_BATCH,
        num_generations=4,
        max_completion_length=limit,
        temperature=temperature,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **options,
    )
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.accelerator = SimpleNamespace(
        autocast=contextlib.nullcontext,
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=True,
        is_main_process=False,
    )
    values = dict(
        args=args,
        model=model,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        use_vllm=False,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=ROWS // MICRO_BATCH,
        _entropy_bonus_enabled=args.entropy_coef != 0.0,
        use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    read = ("beta", "importance_sampling_level", "loss_type", "max_completion_length", "entropy_coef")
    for name, value in {**{name: getattr(args, name) for name in read}, **values}.items():
        setattr(trainer, name, value)
    return trainer


def trl_loss(trainer: Any, batch: Any, advantages: Tensor, mask: Tensor, weights: Tensor | None) -> float:
    """Return the loss that TRL adds up over the micro-batches of an update, and leave its gradients."""
    rollout, total = batch.rollout, 0.0
    for rows in torch.arange(ROWS).split(MICRO_BATCH):
        inputs = dict(
            prompt_ids=rollout.prompt_ids[rollout.prompt_index[rows]],
            prompt_mask=rollout.prompt_mask[rollout.prompt_index[rows]],
            completion_ids=rollout.token[rows],
            completion_mask=mask[rows].long(),
            advantages=advantages[rows],
            old_per_token_logps=batch.old_logprob[rows],
            num_items_in_batch=mask.sum(),
        )
        if batch.ref_logprob is not None:
            inputs["ref_per_token_logps"] = batch.ref_logprob[rows]
        trainer.use_vllm = weights is not None
        if weights is not None:
            inputs["importance_sampling_ratio"] = weights[rows]
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        total += float(loss.detach())
    return total


@pytest.mark.parametrize("options", SETS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_losses_and_gradients_are_those_of_trl(tokenizer, warm, tmp_path, options):
    own = dict(latent=False, invalid="keep", temperature=0.7, delta=None, per_device_train_batch_size=MICRO_BATCH)
    own |= dict(gradient_accumulation_steps=ROWS // MICRO_BATCH, freeze_embeddings=False, **options)
    ours = grpo(tmp_path, tokenizer, even, warm, **own)
    groups = ours.collector.sample(ours.full_model)
    rollout, noise = groups.rollout, torch.Generator().manual_seed(0)

    def jitter(scale: float) -> Tensor:
        return scale * torch.randn(rollout.mask.shape, generator=noise) * rollout.mask

    rollout.finished[::3] = False
    rollout.logprob += jitter(0.3)
    batch, _ = ours.prepare(rollout, groups.rewards)
    cap = own.pop("importance_sampling_cap", None)
    weights = None if cap is None else (batch.old_logprob - rollout.logprob).exp().clamp_max(cap)
    batch.old_logprob = batch.old_logprob + jitter(0.3)
    if batch.ref_logprob is not None:
        batch.ref_logprob = batch.ref_logprob + jitter(0.4)
    actual = ours.accumulate(batch, torch.arange(ROWS))["loss"]

    theirs = trl_trainer(
        copy.deepcopy(ours.model).train(),
        {name: value for name, value in options.items() if name not in ("importance_sampling_cap", "temperature")},
        ours.args.temperature,
        ours.args.max_completion_length,
        str(tmp_path / "trl"),
    )
    theirs.model.zero_grad()
    mask = rollout.mask & rollout.finished.unsqueeze(-1) if ours.args.mask_truncated_completions else rollout.mask
    advantages = trl_advantages(groups.rewards, ours.args.scale_rewards)
    expected = trl_loss(theirs, batch, advantages, mask, weights)
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)
    their_gradients = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():  # of the embedding table too
        gradient = their_gradients[name].grad
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * max(scale, 1.0), msg=name)
