"""Hidden-state latents (Coconut, CODI): a projection with the clamped Gumbel noise of the paper (Eq. 12-13)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_kernels._dispatch import on_input_device, resolve
from latent_kernels._noise import draw_seed
from latent_kernels._operator import operator, single
from latent_kernels._types import NoiseSpec
from latent_kernels._validate import check_noise, check_tensor
from latent_kernels.reference.latent_step import project_with_noise_ref


def _shapes(hidden: Tensor, weight: Tensor, **_: Any) -> list[Tensor]:
    return [hidden.new_empty(hidden.shape[0], weight.shape[0])]


@operator(differentiable=("hidden", "weight", "bias"), shapes=_shapes, result=single)
@on_input_device
def project_with_noise(
    hidden: Tensor,  # [B, D]
    weight: Tensor,  # [D', D]
    bias: Tensor | None = None,  # [D']
    *,
    noise: str = "one_sided",
    noise_scale: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    exponential: Tensor | None = None,
    noise_delta: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Return `hidden @ weight.T + bias + noise_scale * g` [B, D'] in the dtype of hidden.

    g is the clamped Gumbel noise of `latent_step` (Eq. 12-13), with one draw per (row, output unit). Sums and noise are
    in float32. The noise arguments are those of `latent_step`, with `exponential` [B, D'] and one `step` for all rows.
    Differentiable in hidden, weight and bias.
    Raises ValueError or TypeError naming the argument, and RuntimeError if `impl="triton"` cannot run.
    """
    check_tensor("hidden", hidden, [None, None])
    check_tensor("weight", weight, [None, hidden.shape[1]], like=hidden)
    if bias is not None:
        check_tensor("bias", bias, [len(weight)], like=hidden)
    spec = NoiseSpec(noise, noise_scale, seed, step, row_ids, exponential, noise_delta)
    check_noise(spec, len(hidden), len(weight), hidden)
    implementation = resolve("project_with_noise", impl, hidden, weight)
    if spec.needs_seed:
        spec = spec._replace(seed=draw_seed())
    # Under autocast the eager products would be rounded to 16 bits.
    with torch.autocast(hidden.device.type, enabled=False):
        if implementation == "triton":
            from latent_kernels._triton.project_with_noise import project_with_noise_triton

            return project_with_noise_triton(hidden, weight, bias, spec)
        return project_with_noise_ref(
            hidden,
            weight,
            bias,
            noise=noise,
            noise_scale=noise_scale,
            seed=0 if spec.seed is None else spec.seed,
            step=step,
            row_ids=row_ids,
            exponential=exponential,
            noise_delta=noise_delta,
        )
