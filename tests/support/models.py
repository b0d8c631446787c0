"""Tiny random models of many architectures, and log-probs of them that share no code with the trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from latent_grpo import Rollout

SIZE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
)
GPTJ = dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=256, initializer_range=0.3)
# What differs: the bias of the head, a soft cap, scales of logits and of embeddings, inside and outside the table.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma": dict(SIZE, head_dim=8),
    "gemma2": dict(SIZE, head_dim=8, final_logit_softcapping=4.0),
    "gemma3_text": dict(SIZE, head_dim=8, final_logit_softcapping=4.0),
    "cohere": dict(SIZE, logit_scale=0.25),
    "cohere2": dict(SIZE, logit_scale=0.25),
    "granite": dict(SIZE, logits_scaling=3.0, embedding_multiplier=5.0),
    "phi": SIZE,
    "gptj": GPTJ,
    "biogpt": SIZE,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3),
    "llama": SIZE,
    "llama_bias": SIZE,
}


def tiny(kind: str, vocab: int = 48, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return a random model of one of ARCHITECTURES, in evaluation mode. Every bias is random too."""
    torch.manual_seed(0)
    base = dict(vocab_size=vocab, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True)
    if kind in ("phi", "gptj", "llama_bias"):
        base["tie_word_embeddings"] = False
    values = {**base, **ARCHITECTURES[kind], **options}
    config = AutoConfig.for_model(kind.removesuffix("_bias"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if kind == "llama_bias":
        model.lm_head = torch.nn.Linear(config.hidden_size, vocab, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def prompts(vocab: int = 48) -> tuple[Tensor, Tensor]:
    """Return random prompts of three lengths [3, 6], padded on the left with id 0, and their mask."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(6) >= torch.tensor([[0], [2], [5]])).long()
    return torch.randint(3, vocab, (3, 6), generator=generator) * mask, mask


def fed(model: Any, rollout: Rollout, row: int) -> Tensor:
    """Return what a row feeds to the model [1, L, D]: the prompt without padding, and the response without its end.

    Embeddings come from the model's own module. A latent step is the mixture of its components' embeddings.
    """
    module, prompt = model.get_input_embeddings(), int(rollout.prompt_index[row])
    ids = rollout.prompt_ids[prompt][rollout.prompt_mask[prompt].bool()]
    parts = [module(ids)]
    for step in range(int(rollout.mask[row].sum()) - 1):
        if rollout.is_latent[row, step]:
            weights = (rollout.scores[row, step].double() / rollout.tau).softmax(-1)
            parts.append((weights.unsqueeze(-1) * module(rollout.ids[row, step]).double()).sum(0, keepdim=True))
        else:
            parts.append(module(rollout.token[row, step : step + 1]))
    return torch.cat([part.to(parts[0].dtype) for part in parts]).unsqueeze(0)


def independent_logprob(model: Any, rollout: Rollout, row: int, temperature: float) -> Tensor:
    """Return the log-probs [n] of a row's n steps: one row, no padding, no cache, the model's own forward pass.

    A latent step has the mean over its components of -d - exp(-d), d the margin score - log-prob.
    """
    count = int(rollout.mask[row].sum())
    logits = model(inputs_embeds=fed(model, rollout, row)).logits[0, -count:].double()
    values = []
    for step in range(count):
        if rollout.is_latent[row, step]:
            own = logits[step].log_softmax(-1)[rollout.ids[row, step]]
            margin = rollout.scores[row, step].double() - own
            values.append((-margin - torch.exp(-margin)).mean())
        else:
            values.append((logits[step] / temperature).log_softmax(-1)[rollout.token[row, step]])
    return torch.stack(values)
