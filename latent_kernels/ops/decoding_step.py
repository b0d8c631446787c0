"""One step of decoding a batch of latent and text rows: what each row emits, and its log-prob."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latent_kernels._dispatch import on_input_device, resolve
from latent_kernels._eager.decoding_step import decoding_step_eager
from latent_kernels._linear import head_logits_, project
from latent_kernels._noise import draw_seed
from latent_kernels._operator import operator
from latent_kernels._types import DecodingStep, HeadOptions, LatentStepOptions, TextOptions
from latent_kernels._validate import FLOAT32_MAX, check_head, check_range, check_tensor
from latent_kernels.ops.latent_step import checked_options, sidecar_of, top_k_limit


def _shapes(hidden: Tensor, embedding: Tensor, top_k: int = LatentStepOptions.top_k, **_: Any) -> list[Tensor]:
    rows, dtypes = hidden.shape[0], (torch.int64, torch.bool, torch.float32)
    components = [embedding.new_empty(rows, top_k, dtype=dtype) for dtype in (torch.int64, torch.float32)]
    ends = [embedding.new_empty(rows, dtype=dtype) for dtype in dtypes]
    return [*components, embedding.new_empty(rows, embedding.shape[1]), *ends]


def _result(outputs: list[Tensor]) -> DecodingStep:
    return DecodingStep(*outputs)


@operator(differentiable=(), shapes=_shapes, result=_result)
@torch.no_grad()
@on_input_device
def decoding_step(
    hidden: Tensor,  # [B, D]
    lm_head: Tensor,  # [V, D]
    embedding: Tensor,  # [V, D']
    options: LatentStepOptions | None = None,
    *,
    temperature: float = 1.0,
    text_top_k: int = 0,
    text_top_p: float = 1.0,
    uniform: Tensor | None = None,  # [B]
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    **named: Any,
) -> DecodingStep:
    """Choose what each row emits: a mixture where its latent run goes on, else a text token (Eq. 1, 12-15).

    Rows of `latent_mask` take the step of `latent_step`. If it ends their run, they emit the end marker. The other rows
    emit a sampled token. Nothing is sorted but what a row needs, and no [B, V] tensor is made besides the logits.

    Args:
        hidden: [B, D], any float dtype; lm_head: [V, D]; embedding: [V, D'], the input embedding table.
        options: the options of a latent step, as one object or by name. top_k is at least 2.
        temperature: of text tokens, at least 0; 0 is greedy. Log-probs of text tokens are at this temperature, or at 1.
        text_top_k: the number of candidates of a text token; 0 keeps all.
        text_top_p: the mass of the nucleus of these candidates, in (0, 1].
        uniform: [B] float64 draws in (0, 1) for text tokens. By default they are those of `philox_uniform`.
        bias, logit_scale, softcap: what the logits are besides the product, as in `latent_step`.

    A draw picks the token where the cumulative distribution over the sorted candidates passes it, ties to the lower
    id. Where nothing is cut off, the order is that of the vocabulary.

    Not differentiable. Raises ValueError or TypeError naming the argument, and RuntimeError if `impl="triton"` cannot
    run.
    """
    if options is None:
        options = LatentStepOptions(**named)
    elif named:
        raise TypeError(f"give options or {', '.join(named)}, not both")
    check_tensor("hidden", hidden, [None, None])
    check_tensor("lm_head", lm_head, [None, hidden.shape[1]], like=hidden)
    head = HeadOptions(bias, logit_scale, softcap)
    check_head(head, len(lm_head), hidden)
    text = TextOptions(temperature, text_top_k, text_top_p, uniform)
    _check_text(text, options.top_k, hidden)
    options = checked_options(options, len(hidden), len(lm_head), embedding, like=hidden)
    if text.uniform is None and options.seed is None and temperature:
        options = replace(options, seed=draw_seed())
    if resolve("decoding_step", impl, hidden, lm_head, unsupported=top_k_limit(options.top_k)) == "triton":
        from latent_kernels._triton.decoding_step import decoding_step_triton, row_temperatures

        sidecar = sidecar_of(hidden, lm_head, head, row_temperatures(options, text, len(lm_head)))
        return decoding_step_triton(sidecar, embedding, options, text)
    return decoding_step_eager(head_logits_(project(hidden, lm_head), head), embedding, options, text)


def _check_text(text: TextOptions, top_k: int, hidden: Tensor) -> None:
    """Check the options of text tokens, and that a mixture of `top_k` has room for the mark of a text row."""
    check_range("temperature", text.temperature, 0.0, FLOAT32_MAX)
    check_range("text_top_p", text.top_p, 0.0, 1.0, open_low=True)
    check_range("text_top_k", text.top_k, 0)
    if isinstance(text.top_k, bool) or not isinstance(text.top_k, int):
        raise TypeError(f"text_top_k must be an int, got {type(text.top_k).__name__}")
    if isinstance(top_k, int) and top_k < 2:
        raise ValueError(f"top_k must be at least 2, since ids[:, 1] marks a text row, got {top_k}")
    if text.uniform is not None:
        check_tensor("uniform", text.uniform, [len(hidden)], (torch.float64,), like=hidden)
