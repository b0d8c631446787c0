"""The proof that a model computes what its parts compute, and the numbers that describe the parts.

Models scale embeddings and logits, cap logits, or compute more between body and head. The names of such options differ,
and a class may ignore an option that its configuration has. So nothing is read from a configuration here: the numbers
are measured in the model's own forward pass, and the whole is compared with it, once for every model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import DynamicCache

from latent_grpo.architecture import check_architecture
from latent_grpo.errors import ModelError, first_line
from latent_grpo.model.access import backbone, body, embedding_table, positions
from latent_grpo.model.finite import check_finite
from latent_grpo.model.head import HALF, Head

CONTEXTS, LENGTH, SHORTER, CACHED = 4, 12, 7, 9  # of the proof; the last two are of the check of rows
BOUND = 1e-4  # nats between the model's own log-probs and those of its parts, in float32
ROWS_BOUND = 1e-3  # nats between a row alone and beside a longer one: other sums of the same numbers, in float32
ROUNDING = 0.1  # of the spread of the log-probs: as far as 16 bits may move them in the mean
VOCABULARY_CHUNK = 2**14  # rows of a 16-bit head that are converted to float32 at a time
HUGE, TINY = 2.0**100, 2.0**-20  # logits far beyond any soft cap, and logits that none bends


@dataclass(frozen=True)
class Parts:
    """The measured numbers of a model."""

    embedding_scale: float = 1.0  # the model feeds `table[id] * embedding_scale`
    hidden_scale: float = 1.0  # between body and head
    logit_scale: float = 1.0  # behind the head
    softcap: float | None = None  # behind the scale


# Of every model that was proved, with its dtype: a scale may be rounded to it.
_PROVED: weakref.WeakKeyDictionary[Any, tuple[torch.dtype, Parts]] = weakref.WeakKeyDictionary()


def head_of(model: Any) -> Head:
    """Return the LM head of a model, with its parameters as they are now.

    Raises:
        ModelError: as `check_compatible`.
    """
    return _head(model.get_output_embeddings(), parts_of(model))


def embedding_scale(model: Any) -> float:
    """Return the factor of `table[id] * factor`, which the model feeds to its body for a token.

    It is 1.0 for models that scale inside the body, since they scale `inputs_embeds` too. Raises as `check_compatible`.
    """
    return parts_of(model).embedding_scale


def embed(model: Any, ids: Tensor) -> Tensor:
    """Return what the model feeds for tokens: [..., D] of ids [...]. Differentiable in the embedding table."""
    module, scale = model.get_input_embeddings(), embedding_scale(model)
    # As in the model's own module, the row of the padding token gets no gradient.
    embeds = F.embedding(ids, module.weight, getattr(module, "padding_idx", None))
    return embeds if scale == 1.0 else embeds * scale


def check_compatible(model: Any) -> None:
    """Raise ModelError unless the model computes what this package computes for it.

    Proved with a few tiny forward passes, once for a model object: from `embedding_scale` times the table, through the
    body, the head and what `Head` describes come the log-probs of the model's own forward pass (the whole vocabulary,
    random contexts, 1e-4 nats), and a row that is padded on the left and cached has the numbers that it has alone.
    A 16-bit model is run in 16 bits up to its head, and in float32 from there on.

    Modes, random states and configuration of the model are left as they are.
    """
    parts_of(model)


def parts_of(model: Any) -> Parts:
    """Return the measured numbers of a model; prove them if it is new. Raises as `check_compatible`."""
    proved = _PROVED.get(model) if isinstance(model, torch.nn.Module) else None
    if proved is None or proved[0] != embedding_table(model).dtype:
        _check_object(model)
        check_finite(model)
        table = embedding_table(model)
        with torch.no_grad(), torch.random.fork_rng([table.device] if table.is_cuda else []), evaluating(model):
            proved = _PROVED[model] = table.dtype, _prove(model)
    return proved[1]


def _check_object(model: Any) -> None:
    """Raise ModelError unless `model` is a causal LM whose weights are loaded."""
    name = type(model).__name__
    if type(model).__module__.partition(".")[0] == "peft":
        raise ModelError(f"{name} wraps a model with adapters; give model.merge_and_unload(), or its base and use_peft")
    if not all(hasattr(model, part) for part in ("get_input_embeddings", "get_output_embeddings", "base_model")):
        raise ModelError(f"{name} is no model of transformers; give an AutoModelForCausalLM")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} has an encoder and a decoder; latent reasoning needs a decoder-only model")
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None or backbone(model) is model:
        raise ModelError(f"{name} has no LM head; latent reasoning needs an AutoModelForCausalLM")
    check_architecture(model.config)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{name} is on the meta device, without weights; load them first")
    for part, module in (("embedding", model.get_input_embeddings()), ("LM head", head)):
        # An adapter that was just made changes nothing yet, so a comparison of numbers would not see it.
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            raise ModelError(f"{name} has an adapter on its {part}, which is never read; merge it or leave it out")
    table, weight = embedding_table(model), head.weight
    if not (weight.is_floating_point() and table.is_floating_point()):
        raise ModelError(f"{name} has a quantised table ({weight.dtype}); leave embedding and LM head unquantised")
    if len(table) != len(weight):
        raise ModelError(f"{name} embeds {len(table)} tokens and predicts {len(weight)}; resize one of the tables")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within, let the model be in evaluation mode. Every module has its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _prove(model: Any) -> Parts:
    """Measure the parts of a model and prove them."""
    name, ids = type(model).__name__, _contexts(model)
    try:
        scale, own = _embedding_scale(model, ids), _own_logits(model, ids)
        hidden = _hidden(model, ids, scale)
        parts = _measure(model, ids, scale, _ratio(own[0], hidden))
        _check_log_probs(model, ids, parts, hidden, *own)
        if parts.logit_scale * parts.hidden_scale <= 0 or (parts.softcap or 1.0) <= 0:
            raise ModelError(f"the scale of its logits or their soft cap is not positive ({parts})")
        _check_rows(model, ids, parts, hidden)
    except ModelError as error:
        raise ModelError(f"{name} cannot be used: {error}") from error
    # Whatever a class of models raises when it is called in another way than it supports.
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError) as error:
        raise ModelError(
            f"{name} cannot be used: it does not run on input embeddings with positions and a cache "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    return parts


def _contexts(model: Any) -> Tensor:
    """Return random ids [CONTEXTS, LENGTH] over the whole vocabulary. They begin with the special ids."""
    table, config = embedding_table(model), model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(table), (CONTEXTS * LENGTH,), generator=generator)
    named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    special = [i for value in named for i in (value if isinstance(value, list | tuple) else [value])]
    special = [i for i in special if i is not None and 0 <= i < len(table)][:LENGTH]
    ids[: len(special)] = torch.tensor(special, dtype=torch.int64)
    return ids.view(CONTEXTS, LENGTH).to(table.device)


def _measure(model: Any, ids: Tensor, scale: float, hidden_scale: float) -> Parts:
    """Return the numbers of a model: two that are known, and those of its own arithmetic behind the head."""
    # That arithmetic is applied to numbers of our choice.
    vocabulary, width = len(embedding_table(model)), 3
    probe = torch.tensor([TINY, 1.0, HUGE], device=ids.device).view(1, width, 1).expand(1, width, vocabulary)
    _, _, answer = _own_logits(model, ids[:1, :width], probe)
    low, high = answer.aminmax(dim=-1)
    if not torch.equal(low, high) or not torch.isfinite(low[0, :2]).all():
        raise ModelError("behind the head it treats tokens differently, and logits here are one function for all")
    tiny, one, huge = low[0].tolist()
    softcap = huge if abs(huge) < HUGE / 2**60 else None
    logit_scale = one if softcap is None else _tidy(tiny / TINY, 1e-6)
    return Parts(scale, hidden_scale, logit_scale, softcap)


def _embedding_scale(model: Any, ids: Tensor) -> float:
    """Return the scale of an input embedding module, under which `table[id] * scale` has the bits of its output."""
    module, table = model.get_input_embeddings(), embedding_table(model)
    fed, plain = module(ids), F.embedding(ids, table)
    if fed.shape == plain.shape and torch.equal(fed, plain):
        return 1.0
    # A table of ones shows the scale. Some modules round it to the dtype of their table, some do not.
    for dtype in (torch.float32, table.dtype):
        ones = torch.ones((), dtype=dtype, device=table.device).expand(table.shape)
        scale = float(functional_call(module, {"weight": ones}, (ids[:1, :1],)).flatten()[0])
        if torch.equal(fed, plain * scale):
            return scale
    raise ModelError("its embedding module feeds something else than a row of its table times one number")


def _own_logits(model: Any, ids: Tensor, replacement: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model's own forward pass on ids. Return the input of its head, the head's output, and the logits.

    The head's output is replaced by `replacement`; in a 16-bit model otherwise by the float32 product, so that the
    model's own arithmetic behind the head runs in float32.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        seen.append((inputs[0], output))
        if replacement is not None:
            return replacement
        return (
            _product(inputs[0], module.weight, getattr(module, "bias", None)) if module.weight.dtype in HALF else None
        )

    handle = model.get_output_embeddings().register_forward_hook(hook)
    try:
        logits = model(input_ids=ids).logits
    finally:
        handle.remove()
    if len(seen) != 1 or logits.shape != (*ids.shape, len(embedding_table(model))):
        raise ModelError("its logits are not those of one pass through its output embedding module")
    return *seen[0], logits.float()


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `hidden @ weight.T + bias` in float32, without a float32 copy of a whole 16-bit weight."""
    if weight.dtype not in HALF:
        return F.linear(hidden, weight, bias).float()
    product = torch.cat([F.linear(hidden.float(), part.float()) for part in weight.split(VOCABULARY_CHUNK)], -1)
    return product if bias is None else product + bias.float()


def _hidden(model: Any, ids: Tensor, scale: float) -> Tensor:
    """Return the body's last hidden states [B, L, D] of ids that are fed as embeddings."""
    mask = torch.ones_like(ids)
    return body(model, F.embedding(ids, embedding_table(model)) * scale, mask, positions(mask))


def _ratio(given: Tensor, hidden: Tensor) -> float:
    """Return the factor between the body's output and the head's input; 1.0 if they are not multiples at all."""
    if given.shape != hidden.shape or torch.equal(given, hidden):
        return 1.0
    x, y = hidden.double(), given.double()
    ratio = float((x * y).sum() / x.square().sum())
    half = given.dtype in HALF
    close = (y - ratio * x).abs().max() <= (2**-7 if half else 1e-5) * y.abs().max()
    return _tidy(ratio, 2e-5 if half else 1e-6) if close else 1.0


def _tidy(value: float, tolerance: float) -> float:
    """Return the number of four digits, or one over such a number, within a relative tolerance; else the value."""
    for tidy in (float(f"{value:.4g}"), 1.0 / float(f"{1.0 / value:.4g}") if value else 0.0):
        if abs(tidy - value) <= tolerance * abs(value):
            return tidy
    return value


def _check_log_probs(
    model: Any, ids: Tensor, parts: Parts, hidden: Tensor, given: Tensor, output: Tensor, own: Tensor
) -> None:
    """Raise ModelError unless the log-probs of the parts are those of the model's own forward pass.

    hidden: the body's last hidden states. given, output and own: the result of `_own_logits`.
    """
    module, head = model.get_output_embeddings(), _head(model.get_output_embeddings(), parts)
    if not torch.isfinite(own).all():
        raise ModelError(f"its logits are not finite in {given.dtype}; choose another dtype")
    ours = head.finish(_product(hidden, head.weight))
    gap = _nats(ours, own)
    product = _product(given, module.weight, getattr(module, "bias", None))
    if not _within_rounding(product, output.float()):
        raise ModelError(f"its LM head is more than a product, by up to {_nats(product, output.float()):.2g} nats")
    if gap <= BOUND:
        return
    behind = _nats(_head(module, replace(parts, hidden_scale=1.0)).finish(_product(given, module.weight)), own)
    if behind > BOUND:
        raise ModelError(f"behind its LM head it does more than scale and cap logits, by up to {behind:.2g} nats")
    # Sixteen bits round between the parts. In float32 nothing more is allowed for.
    if module.weight.dtype in HALF and _within_rounding(ours, own):
        return
    mask = torch.ones_like(ids)
    from_ids = backbone(model)(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
    embedded = _nats(head.finish(_product(from_ids, head.weight)), ours)
    if embedded > BOUND:
        raise ModelError(f"it makes more of token ids than of their embeddings, by up to {embedded:.2g} nats")
    raise ModelError(f"between its body and its LM head it does more than scale hidden states, by up to {gap:.2g} nats")


def _check_rows(model: Any, ids: Tensor, parts: Parts, hidden: Tensor) -> None:
    """Raise ModelError unless rows of unequal length, padded and cached, have the numbers that each has alone.

    hidden: the last hidden states of `ids`, without padding and without a cache.
    """
    head = _head(model.get_output_embeddings(), parts)
    ids, mask = ids[:2].clone(), torch.ones_like(ids[:2])
    mask[1, : LENGTH - SHORTER] = 0
    place, embeds = positions(mask), F.embedding(ids, embedding_table(model)) * parts.embedding_scale
    cache, first, rest = DynamicCache(config=model.config), slice(0, CACHED), slice(CACHED, LENGTH)
    states = [body(model, embeds[:, first], mask[:, first], place[:, first], cache)]
    states += [body(model, embeds[:, rest], mask, place[:, rest], cache)]
    together = torch.cat(states, 1)
    shorter = _hidden(model, ids[1:, -SHORTER:], parts.embedding_scale)
    for row, alone in ((together[0], hidden[0]), (together[1, -SHORTER:], shorter[0])):
        a, b = (head.finish(_product(states, head.weight)) for states in (row, alone))
        gap = _nats(a, b)
        exact = a.device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
        if not (gap <= ROWS_BOUND if head.weight.dtype not in HALF and exact else _within_rounding(a, b)):
            raise ModelError(f"a row that is padded and cached differs from the row alone by up to {gap:.2g} nats")


def _head(module: Any, parts: Parts) -> Head:
    """Return the head of an output embedding module with measured numbers."""
    scale = parts.hidden_scale
    return Head(module.weight, getattr(module, "bias", None), parts.logit_scale * scale, parts.softcap, scale)


def _nats(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of the log-probs of two logits [..., V]; infinity for NaN."""
    gap = (a.log_softmax(-1) - b.log_softmax(-1)).abs().max()
    return float(torch.nan_to_num(gap, nan=torch.inf))


def _within_rounding(a: Tensor, b: Tensor) -> bool:
    """Tell whether the log-probs of two logits [..., V] differ by no more than rounding to 16 bits, in the mean."""
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return bool((p - q).abs().mean() <= ROUNDING * q.std())
