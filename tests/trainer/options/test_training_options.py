"""Every option of updates, of the length of a run and of the warm start changes what its help text says it changes."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from support.options import BOTH_TRAINERS, LEARNING_RATE, ROWS, metrics_of, record_calls, record_optimizer_steps

from latent_grpo import LatentSFTConfig
from latent_grpo.model import embedding_table
from latent_grpo.saving.checkpoint import checkpoints_in
from latent_grpo.sft import build_examples
from latent_grpo.sft import loss as sft_loss
from latent_grpo.sft import trainer as sft_trainer
from latent_grpo.update.optimizer import make_optimizer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), 1),
        (dict(num_iterations=3), 3),
        (dict(per_device_train_batch_size=2), 4),
        (dict(per_device_train_batch_size=2, gradient_accumulation_steps=2), 2),
        (dict(per_device_train_batch_size=2, gradient_accumulation_steps=4), 1),
        (dict(per_device_train_batch_size=4, num_iterations=2), 4),
    ],
    ids=str,
)
def test_batch_size_accumulation_and_iterations_set_the_updates_per_rollout(options, expected, make_trainer):
    trainer = make_trainer("train", max_steps=-1, max_rollouts=1, **options)  # rollouts of eight responses
    steps = record_optimizer_steps(trainer)
    trainer.train()
    assert len(steps) == expected


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_warm_start_accumulates_gradients_over_passes(accumulation, make_trainer, monkeypatch):
    options = dict(max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=accumulation)
    trainer = make_trainer("sft", **options)
    steps, passes = record_optimizer_steps(trainer), record_calls(monkeypatch, sft_trainer, "collate")
    trainer.train()
    assert len(steps) == 2
    assert [len(examples) for (examples, _), _, _ in passes] == [3] * 2 * accumulation


SCHEDULES = {
    "constant": (dict(lr_scheduler_type="constant"), [1.0, 1.0, 1.0, 1.0]),
    "default with warm-up": (dict(warmup_steps=2), [0.0, 0.5, 1.0, 1.0]),
    "linear": (dict(lr_scheduler_type="linear"), [1.0, 0.75, 0.5, 0.25]),
    "linear with warm-up": (dict(lr_scheduler_type="linear", warmup_steps=2), [0.0, 0.5, 1.0, 0.5]),
    "cosine": (dict(lr_scheduler_type="cosine"), [1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
}


@BOTH_TRAINERS
@pytest.mark.parametrize(("options", "shares"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_learning_rate_follows_its_schedule(options, shares, kind, make_trainer, tmp_path):
    trainer = make_trainer(kind, max_steps=4, **options)
    steps = record_optimizer_steps(trainer)
    trainer.train()
    rates = [rate for rate, _ in steps]
    assert rates == pytest.approx([LEARNING_RATE * share for share in shares])
    logged = [row["learning_rate"] for row in metrics_of(tmp_path / "run")]
    if kind == "train" and logged != rates:
        assert logged[:-1] == rates[1:]  # `train` logs the rate after the update
    else:
        assert logged == rates


def test_a_schedule_spans_every_pass_over_every_rollout(make_trainer):
    options = dict(max_steps=-1, max_rollouts=2, num_iterations=2, per_device_train_batch_size=4)
    trainer = make_trainer("train", lr_scheduler_type="linear", **options)
    steps = record_optimizer_steps(trainer)
    trainer.train()
    assert [rate for rate, _ in steps] == pytest.approx([LEARNING_RATE * (8 - step) / 8 for step in range(8)])


@pytest.mark.parametrize(("max_steps", "rollouts"), [(1, 1), (3, 1), (4, 1), (6, 2)])
def test_max_steps_counts_optimizer_steps_as_in_trl(max_steps, rollouts, make_trainer, capsys):
    options = dict(max_steps=max_steps, num_iterations=2, per_device_train_batch_size=4)  # four updates a rollout
    trainer = make_trainer("train", lr_scheduler_type="linear", **options)
    steps = record_optimizer_steps(trainer)
    trainer.train()
    expected = [LEARNING_RATE * (max_steps - step) / max_steps for step in range(max_steps)]
    assert [rate for rate, _ in steps] == pytest.approx(expected)
    assert trainer.step == rollouts
    note = f"max_steps {max_steps} counts optimizer steps: about {rollouts} rollouts; max_rollouts counts rollouts"
    assert (note in capsys.readouterr().err) == (max_steps > rollouts)


@BOTH_TRAINERS
@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e6])
def test_gradients_are_clipped_to_max_grad_norm(limit, kind, make_trainer):
    trainer = make_trainer(kind, max_grad_norm=limit)
    steps = record_optimizer_steps(trainer)
    trainer.train()
    ((_, norm),) = steps
    before_clipping = trainer.metrics.history[0]["grad_norm"]
    assert before_clipping > 0.01
    assert norm == pytest.approx(limit if limit == 1e-3 else before_clipping, rel=1e-4)


@BOTH_TRAINERS
def test_options_of_the_optimizer_reach_adamw(kind, make_trainer):
    options = dict(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, learning_rate=2e-4, optim="adamw_torch")
    optimizer = make_trainer(kind, lr_scheduler_type="constant", **options).updater.optimizer
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["betas"], group["lr"]) == (0.1, (0.8, 0.95), 2e-4)


def test_optim_names_the_optimizer(monkeypatch):
    class AdamW8bit(torch.optim.AdamW):
        pass

    # bitsandbytes needs a GPU, so a module of its name stands in for it.
    package, module = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = package.optim = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    for name, expected in (("adamw_torch", torch.optim.AdamW), ("adamw_8bit", AdamW8bit)):
        assert type(make_optimizer(parameters, LatentSFTConfig(optim=name))) is expected


@BOTH_TRAINERS
@pytest.mark.parametrize("frozen", [True, False])
def test_the_embedding_table_is_trained_unless_frozen(frozen, kind, make_trainer, model):
    trainer = make_trainer(kind, freeze_embeddings=frozen)
    trainer.train()
    assert torch.equal(embedding_table(trainer.model), embedding_table(model)) == frozen
    changed = [not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True)]
    assert any(changed)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("train", dict(num_train_epochs=1.0), 8),  # 16 prompts, 2 per rollout
        ("train", dict(num_train_epochs=2.5), 20),
        ("train", dict(num_train_epochs=0.5), 4),
        ("train", dict(num_train_epochs=0.01), 1),
        ("train", dict(num_train_epochs=2.5, max_rollouts=3), 3),
        ("train", dict(num_train_epochs=2.5, max_steps=3), 2),  # two updates a rollout
        ("sft", dict(num_train_epochs=1.0), 4),  # 16 examples, 4 per step
        ("sft", dict(num_train_epochs=2.5), 10),
        ("sft", dict(num_train_epochs=0.01), 1),
        ("sft", dict(num_train_epochs=1.0, gradient_accumulation_steps=2), 2),
        ("sft", dict(num_train_epochs=2.5, max_steps=3), 3),
    ],
    ids=str,
)
def test_epochs_set_the_length_of_a_run_unless_max_steps_is_given(kind, options, expected, make_trainer):
    options = {"max_steps": -1, "per_device_train_batch_size": 4, **options}
    assert make_trainer(kind, **options).total_steps == expected


@BOTH_TRAINERS
@pytest.mark.parametrize(("save_steps", "expected"), [(0, []), (2, [2, 4]), (3, [3])])
def test_checkpoints_are_written_every_save_steps(save_steps, expected, kind, make_trainer, tmp_path):
    make_trainer(kind, max_steps=4, save_steps=save_steps).train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == [f"checkpoint-{step}" for step in expected]


@BOTH_TRAINERS
@pytest.mark.parametrize("shown", [True, False])
def test_metrics_are_printed_unless_log_table_is_off(shown, kind, make_trainer, tmp_path, capsys):
    make_trainer(kind, log_table=shown).train()
    printed = capsys.readouterr().err
    rate = f"{metrics_of(tmp_path / 'run')[0]['learning_rate']:.1e}"
    assert [word in printed for word in ("grad", "rate", rate)] == [shown] * 3


def test_gumbel_scale_adds_noise_to_the_inputs_of_a_warm_start(make_trainer, monkeypatch, tmp_path):
    losses = []
    for scale in (0.0, 0.7):
        out = str(tmp_path / f"run{scale}")
        with monkeypatch.context() as patch:
            calls = record_calls(patch, sft_loss, "input_mixtures")
            trainer = make_trainer("sft", gumbel_scale=scale, seed=3, max_steps=2, output_dir=out)
            trainer.train()
        assert [args[2:] for args, _, _ in calls] == [(scale, 3, 0), (scale, 3, 1)]  # scale, seed, step
        losses.append(trainer.metrics.history[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-6


@pytest.mark.parametrize(("options", "width"), [(dict(latent=False), 1), (dict(), 2), (dict(compression=3), 3)])
def test_compression_sets_the_chain_tokens_per_step_of_a_warm_start(options, width, tokenizer):
    for row, example in zip(ROWS, build_examples(tokenizer, ROWS, LatentSFTConfig(**options)), strict=True):
        chain = tokenizer.convert_tokens_to_ids(row["chain"].split())
        expected = [chain[i : i + width] for i in range(0, len(chain), width)]
        assert example.response[: len(expected)] == expected
        assert all(len(element) == 1 for element in example.response[len(expected) :])


def test_a_warm_start_drops_rows_over_max_prompt_length(tokenizer, make_trainer):
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in ROWS]
    limit = sorted(lengths)[len(ROWS) // 2]
    expected = [number for number, length in enumerate(lengths, 1) if length <= limit]
    assert 0 < len(expected) < len(ROWS)
    with pytest.warns(UserWarning, match=f"{len(ROWS) - len(expected)} of {len(ROWS)} rows are left out"):
        trainer = make_trainer("sft", max_prompt_length=limit, long_prompts="drop")
    assert [example.number for example in trainer.examples] == expected
    assert len(make_trainer("sft").examples) == len(ROWS)
