"""One step of latent decoding: from a hidden state to the next input embedding (Eq. 1, 12-14)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_kernels._dispatch import MAX_TOP_K, on_input_device, resolve
from latent_kernels._eager.latent_step_methods import latent_step_with_method_eager
from latent_kernels._linear import head_logits_, project
from latent_kernels._noise import draw_seed
from latent_kernels._operator import operator
from latent_kernels._types import METHODS, HeadOptions, LatentStep, LatentStepOptions
from latent_kernels._validate import check_choice, check_head, check_noise, check_range, check_row_range, check_tensor
from latent_kernels.reference.latent_step import compute_dtype

if TYPE_CHECKING:
    from latent_kernels._triton.lm_head import RowTemperatures, Sidecar

END_RULES = ("raw", "noisy")


def _step_shapes(rows: int, embedding: Tensor, top_k: int) -> list[Tensor]:
    components = ((torch.int64, top_k), (torch.float32, top_k), (torch.float32, top_k))
    mixtures = [embedding.new_empty(rows, width, dtype=dtype) for dtype, width in components]
    ends = [embedding.new_empty(rows, dtype=dtype) for dtype in (torch.int64, torch.bool)]
    return [*mixtures, embedding.new_empty(rows, embedding.shape[1]), *ends]


def _shapes_from_logits(
    logits: Tensor, embedding: Tensor, top_k: int = LatentStepOptions.top_k, **_: Any
) -> list[Tensor]:
    return _step_shapes(logits.shape[0], embedding, top_k)


def _shapes(hidden: Tensor, embedding: Tensor, top_k: int = LatentStepOptions.top_k, **_: Any) -> list[Tensor]:
    return _step_shapes(hidden.shape[0], embedding, top_k)


def _shapes_with_logits(
    hidden: Tensor, lm_head: Tensor, embedding: Tensor, top_k: int = LatentStepOptions.top_k, **_: Any
) -> list[Tensor]:
    logits = hidden.new_empty(hidden.shape[0], lm_head.shape[0], dtype=compute_dtype(hidden, lm_head))
    return [*_step_shapes(hidden.shape[0], embedding, top_k), logits]


def _result(outputs: list[Tensor]) -> LatentStep:
    return LatentStep(*outputs)


def _result_with_logits(outputs: list[Tensor]) -> tuple[LatentStep, Tensor]:
    return LatentStep(*outputs[:-1]), outputs[-1]


@operator(differentiable=(), shapes=_shapes_from_logits, result=_result)
@torch.no_grad()
@on_input_device
def latent_step_from_logits(
    logits: Tensor,  # [B, V]
    embedding: Tensor,  # [V, D']
    *,
    top_k: int = 10,
    top_p: float | Tensor = 0.95,
    tau: float | Tensor = 1.0,
    noise: str = "one_sided",
    noise_scale: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    exponential: Tensor | None = None,
    latent_mask: Tensor | None = None,
    end_token_id: int | None = None,
    noise_delta: float = 0.0,
    end_rule: str = "raw",
    min_latent_steps: int = 0,
    max_latent_steps: int | None = None,
    method: str = "latent_grpo",
    impl: str = "auto",
) -> LatentStep:
    """Add clamped Gumbel noise to the nucleus, keep the top_k best and mix their embeddings (Eq. 1, 12-14).

    With another `method`, choose and weigh the top_k tokens as SofT-GRPO or Multiplex Thinking does.

    Args:
        logits: [B, V], any float dtype; computed in float32 (float64 for float64). -inf masks a token; each row needs
            at least one finite logit.
        embedding: [V, D'], the input embedding table.
        top_k and the names that follow: the fields of `LatentStepOptions`, which documents each of them.

    Not differentiable. Raises ValueError or TypeError naming the argument, and RuntimeError if `impl="triton"` cannot
    run.
    """
    check_tensor("logits", logits, [None, None])
    options = LatentStepOptions(
        top_k, top_p, tau, noise, noise_scale, seed, step, row_ids, exponential, latent_mask, end_token_id,
        noise_delta, end_rule, min_latent_steps, max_latent_steps, method,
    )  # fmt: skip
    options = checked_options(options, len(logits), logits.shape[1], embedding, like=logits)
    if resolve("latent_step", impl, logits, unsupported=top_k_limit(top_k)) == "triton":
        from latent_kernels._triton.latent_step_methods import latent_step_with_method
        from latent_kernels._triton.lm_head import logits_sidecar

        return latent_step_with_method(logits_sidecar(logits), embedding, options)
    return latent_step_with_method_eager(logits.to(compute_dtype(logits)), embedding, options)


def latent_step(
    hidden: Tensor,  # [B, D]
    lm_head: Tensor,  # [V, D]
    embedding: Tensor,  # [V, D']
    *,
    top_k: int = 10,
    top_p: float | Tensor = 0.95,
    tau: float | Tensor = 1.0,
    noise: str = "one_sided",
    noise_scale: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    exponential: Tensor | None = None,
    latent_mask: Tensor | None = None,
    end_token_id: int | None = None,
    noise_delta: float = 0.0,
    end_rule: str = "raw",
    min_latent_steps: int = 0,
    max_latent_steps: int | None = None,
    method: str = "latent_grpo",
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> LatentStep:
    """Turn each row's hidden state into its next input embedding (Eq. 1, 12-14).

    The result is that of `latent_step_from_logits` on z = logit_scale * (hidden @ lm_head.T + bias), or with a soft cap
    on softcap * tanh(z / softcap). hidden [B, D], lm_head [V, D] and bias [V] have any float dtype; logits are
    accumulated in float32. logit_scale and softcap are positive. `LatentStepOptions` documents the other options.
    """
    options = LatentStepOptions(
        top_k, top_p, tau, noise, noise_scale, seed, step, row_ids, exponential, latent_mask, end_token_id,
        noise_delta, end_rule, min_latent_steps, max_latent_steps, method,
    )  # fmt: skip
    return latent_step_with_logits(
        hidden, lm_head, embedding, options, bias=bias, logit_scale=logit_scale, softcap=softcap, impl=impl
    )[0]


@operator(differentiable=(), shapes=_shapes_with_logits, result=_result_with_logits)
@torch.no_grad()
@on_input_device
def latent_step_with_logits(
    hidden: Tensor,  # [B, D]
    lm_head: Tensor,  # [V, D]
    embedding: Tensor,  # [V, D']
    options: LatentStepOptions | None = None,
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    **named: Any,
) -> tuple[LatentStep, Tensor]:
    """Return the result of `latent_step` and the logits [B, V] computed for it, after bias, scale and soft cap.

    Give the options of the step as one object or by name. A batch with text rows draws their tokens from the logits,
    which are float32, or float64 for float64 inputs.
    """
    if options is None:
        options = LatentStepOptions(**named)
    elif named:
        raise TypeError(f"give options or {', '.join(named)}, not both")
    check_tensor("hidden", hidden, [None, None])
    check_tensor("lm_head", lm_head, [None, hidden.shape[1]], like=hidden)
    head = HeadOptions(bias, logit_scale, softcap)
    check_head(head, len(lm_head), hidden)
    options = checked_options(options, len(hidden), len(lm_head), embedding, like=hidden)
    if resolve("latent_step", impl, hidden, lm_head, unsupported=top_k_limit(options.top_k)) == "triton":
        from latent_kernels._triton.latent_step_methods import latent_step_with_method

        sidecar = sidecar_of(hidden, lm_head, head)
        return latent_step_with_method(sidecar, embedding, options), sidecar.logits[:, : len(lm_head)]
    logits = head_logits_(project(hidden, lm_head), head)
    return latent_step_with_method_eager(logits, embedding, options), logits


def sidecar_of(
    hidden: Tensor, lm_head: Tensor, head: HeadOptions, tempered: RowTemperatures | None = None
) -> Sidecar:  # fmt: skip
    """Return the logits and their sidecar, by the fastest known route for this shape."""
    from latent_kernels._triton.lm_head import lm_head_sidecar, logits_sidecar
    from latent_kernels._triton.lm_head_routes import Route, choose

    def run(route: Route) -> Sidecar:
        if route is None:
            return logits_sidecar(project(hidden, lm_head), head, tempered)
        return lm_head_sidecar(hidden, lm_head, route, head, tempered)

    return run(choose(hidden, lm_head, run))


def top_k_limit(top_k: int) -> str | None:
    """Say which limit of the kernel `top_k` exceeds, or return None."""
    return f"takes a top_k of at most {MAX_TOP_K}, got {top_k}" if top_k > MAX_TOP_K else None


def checked_options(
    options: LatentStepOptions, rows: int, vocab: int, embedding: Tensor, *, like: Tensor
) -> LatentStepOptions:
    """Check the arguments of a latent step; return the options, with a drawn seed if they need one and have none."""
    check_tensor("embedding", embedding, [vocab, None], like=like)
    top_k = options.top_k
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int, got {type(top_k).__name__}")
    if not 1 <= top_k <= vocab:
        raise ValueError(f"top_k must be between 1 and the vocabulary size {vocab}, got {top_k}")
    check_row_range("top_p", options.top_p, rows, like, 0.0, 1.0)
    check_row_range("tau", options.tau, rows, like, 0.0, open_low=True)
    check_noise(options.noise_spec, rows, vocab, like, step_per_row=True)
    if options.latent_mask is not None:
        check_tensor("latent_mask", options.latent_mask, [rows], (torch.bool,), like=like)
    _check_end(options, vocab)
    check_choice("method", options.method, METHODS)
    if options.method == "multiplex" and not (isinstance(options.top_p, int | float) and options.top_p == 1):
        raise ValueError(f"method='multiplex' draws from the whole distribution; give top_p=1, got {options.top_p}")
    return replace(options, seed=draw_seed()) if options.noise_spec.needs_seed else options


def _check_end(options: LatentStepOptions, vocab: int) -> None:
    """Check the options that say when a latent run ends."""
    end, least, most = options.end_token_id, options.min_latent_steps, options.max_latent_steps
    check_choice("end_rule", options.end_rule, END_RULES)
    for name, value in (("end_token_id", end), ("min_latent_steps", least), ("max_latent_steps", most)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if end is not None and not 0 <= end < vocab:
        raise ValueError(f"end_token_id must be between 0 and {vocab - 1}, got {end}")
    check_range("min_latent_steps", least, 0)
    if most is not None:
        check_range("max_latent_steps", most, least)
    if end is None and (options.end_rule == "noisy" or least or most is not None):
        raise ValueError("end_rule='noisy', min_latent_steps and max_latent_steps need end_token_id, got None")
