"""The logits of an LM head in plain PyTorch. Computation is in float32, or in float64 for float64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels.reference.latent_step import compute_dtype


def head_logits_ref(
    hidden: Tensor,  # [N, D]
    lm_head: Tensor,  # [V, D]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the logits z = logit_scale * (hidden @ lm_head.T + bias) [N, V]; softcap * tanh(z / softcap) with a cap.

    Language models that have the options: bias (Phi, GPT-J), logit_scale (Cohere; Granite divides by its scaling),
    softcap (Gemma 2, arXiv 2408.00118, section 2).
    """
    dtype = compute_dtype(hidden, lm_head)
    logits = hidden.to(dtype) @ lm_head.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logit_scale * logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
