"""Hidden-state latents (Coconut, CODI): a projection with one-sided noise (SPEC 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels._dispatch import on_its_device, resolve
from latent_kernels._noise import NoiseSpec, draw_seed
from latent_kernels._validate import check_noise, check_tensor
from latent_kernels.reference import project_with_noise_ref


@on_its_device
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
    impl: str = "auto",
) -> Tensor:
    """`hidden @ weight.T + bias + noise_scale * g` [B, D'] in `hidden`'s dtype; differentiable in hidden, weight and
    bias.

    g is the clamped Gumbel noise of `latent_step` (Eq. 12-13), one draw per (row, output unit). Sums and noise are in
    float32. Noise arguments as in `latent_step`, with `exponential` [B, D'].
    Raises ValueError or TypeError naming the argument; RuntimeError where `impl="triton"` cannot run.
    """
    check_tensor("hidden", hidden, [None, None])
    check_tensor("weight", weight, [None, hidden.shape[1]], like=hidden)
    if bias is not None:
        check_tensor("bias", bias, [len(weight)], like=hidden)
    check_noise(len(hidden), len(weight), hidden, noise, noise_scale, seed, step, row_ids, exponential)
    chosen = resolve("project_with_noise", impl, hidden, weight)
    if seed is None and exponential is None and noise != "none":
        seed = draw_seed()
    if chosen == "triton":
        from latent_kernels._triton.project_with_noise import project_with_noise as triton_project_with_noise

        spec = NoiseSpec(noise, noise_scale, seed, step, row_ids, exponential)
        with torch.autocast(hidden.device.type, enabled=False):
            return triton_project_with_noise(hidden, weight, bias, spec)
    with torch.autocast(hidden.device.type, enabled=False):
        return project_with_noise_ref(
            hidden, weight, bias, noise=noise, noise_scale=noise_scale, seed=0 if seed is None else seed, step=step,
            row_ids=row_ids, exponential=exponential,
        )  # fmt: skip
