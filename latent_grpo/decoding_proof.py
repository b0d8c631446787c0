"""The proof that a model decodes in a batch as it does alone, once for every model.

Configurations do not tell how a class of models reads masks, positions and caches. So the decoder itself samples a few
steps of two prompts of unequal length, the trainer's replay computes them again, and both are compared with the model's
own forward pass over one row without padding and without a cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from latent_grpo.architecture import text_config
from latent_grpo.config import LatentSampling
from latent_grpo.errors import ModelError, first_line
from latent_grpo.model import check_compatible, embedding_table
from latent_grpo.model.proof import evaluating
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.replay import replay_logprob
from latent_kernels import latent_logprob_from_logits

LENGTHS = (9, 4)  # of the prompts
LATENT_STEPS, STEPS = 3, 7  # of a response
COMPONENTS = 4  # of a mixture
WINDOW = 5  # shorter than the prompts: what a sliding window hides shows
BOUND = 1e-3  # nats in float32 and float64: other sums of the same numbers
# In 16 bits, in the mean: this share of the spread of a step's log-probs. Rounding in every layer adds up to a few
# hundredths of it. A token too many, too few or in a wrong place changes log-probs by about their spread.
ROUNDING = 0.1

# Of every model that was proved, with its dtype.
_PROVED: weakref.WeakKeyDictionary[Any, torch.dtype] = weakref.WeakKeyDictionary()


def check_decoding(model: Any) -> None:
    """Raise ModelError unless rows of unequal length are sampled and replayed with the numbers that each has alone.

    This takes about a dozen forward passes of a few tokens, once for a model object. Configuration and training mode
    are left as they are. Raises as `check_compatible` too, which comes first.
    """
    check_compatible(model)  # it names what is wrong with one row
    if _PROVED.get(model) == model.dtype:
        return
    name = type(model).__name__
    try:
        with torch.no_grad(), evaluating(model), _short_window(model):
            gap = _gap(model)
    except torch.OutOfMemoryError:
        raise
    except ModelError as error:
        raise ModelError(f"{name} cannot be decoded: {error}") from error
    # Whatever a class of models raises when it is called in another way than it supports.
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(
            f"{name} cannot be decoded with rows of unequal length in one cache ({type(error).__name__}: "
            f"{first_line(error)}); use another model"
        ) from error
    for part, (distance, bound) in gap.items():
        if not distance <= bound:
            raise ModelError(
                f"{name} cannot be used: log-probs of rows of unequal length, {part}, are off its own forward pass by "
                f"{distance:.2g} nats (bound {bound:.2g}); {_remedy(model)}"
            )
    _PROVED[model] = model.dtype


def _remedy(model: Any) -> str:
    """Return what may help where numbers disagree."""
    window = getattr(text_config(model.config), "sliding_window", None)
    if window:
        return f"if the model does not use sliding_window {window} of its configuration, set it to null"
    return "use another model"


@contextmanager
def _short_window(model: Any) -> Iterator[None]:
    """Within, let sliding windows be shorter than the prompts, so that short rows prove them."""
    config = text_config(model.config)
    window = getattr(config, "sliding_window", None)
    if not window or window <= WINDOW:
        yield
        return
    config.sliding_window = WINDOW
    try:
        yield
    finally:
        config.sliding_window = window


def _gap(model: Any) -> dict[str, tuple[float, float]]:
    """Return how far the steps of two rows are off, sampled and replayed, each with its bound. In nats."""
    table = embedding_table(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(table), (len(LENGTHS), max(LENGTHS)), generator=generator).to(table.device)
    places = torch.arange(max(LENGTHS), device=table.device)
    mask = (places >= max(LENGTHS) - torch.tensor(LENGTHS, device=table.device).unsqueeze(-1)).long()
    sampling = LatentSampling(
        latent_top_k=min(COMPONENTS, len(table)),
        max_latent_steps=LATENT_STEPS,
        max_new_tokens=STEPS,
        end_token_id=0,
        eos_token_id=(),
        temperature=1.0,
        cuda_graphs=False,  # a capture costs more than it saves here
    )
    rollout = generate_latent(model, ids, mask, sampling)
    replayed = replay_logprob(model, rollout, sampling.temperature)
    logits = torch.cat([_own_logits(model, rollout, row) for row in range(len(rollout.token))])
    taken = rollout.mask
    expected = latent_logprob_from_logits(logits, rollout.ids[taken], rollout.scores[taken], temperature=1.0)
    gaps = {"sampled": rollout.logprob[taken] - expected, "replayed": replayed[taken] - expected}
    if model.dtype in (torch.float32, torch.float64):
        return {part: (float(gap.abs().max()), BOUND) for part, gap in gaps.items()}
    bound = ROUNDING * float(logits.log_softmax(-1).std())
    return {part: (float(gap.abs().mean()), bound) for part, gap in gaps.items()}


def _own_logits(model: Any, rollout: Rollout, row: int) -> Tensor:
    """Return the logits [t, V] float32 of the t steps of a row by the model's own forward pass over this row alone."""
    embed, prompt = model.get_input_embeddings(), rollout.prompt_index[row]
    steps = int(rollout.mask[row].sum())
    weights = (rollout.scores[row, :steps] / rollout.tau).softmax(-1).unsqueeze(-1)
    mixtures = (weights * embed(rollout.ids[row, :steps].clamp_min(0)).float()).sum(1)
    tokens = embed(rollout.token[row, :steps])
    fed = torch.where(rollout.is_latent[row, :steps].unsqueeze(-1), mixtures.to(tokens.dtype), tokens)
    start = embed(rollout.prompt_ids[prompt][rollout.prompt_mask[prompt].bool()])
    logits: Tensor = model(inputs_embeds=torch.cat([start, fed[:-1]]).unsqueeze(0), use_cache=False).logits
    return logits[0, len(start) - 1 :].float()
