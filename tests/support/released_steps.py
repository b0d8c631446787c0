"""Random latent steps that the released samplers took. Their outputs are the files of tests/kernels/data.

- released_steps_latent_grpo.npz: Latent-GRPO (github.com/DJC-GO-SOLO/Latent-GRPO at c0994fb)
- released_steps_soft_grpo.npz: SofT-GRPO (github.com/zz1358m/SofT-GRPO-master at 2b9d8ec)
- released_steps_multiplex.npz: Multiplex Thinking (github.com/GMLR-Penn/Multiplex-Thinking)

Each ran `sampler.py` of its SGLang with injected draws. The operations of sgl_kernel, which need a GPU, were written
anew: thresholds of top-k and top-p that keep equal probabilities together, and a draw by the inverse of the cumulative
distribution. The released code leaves the order of equal values open. Here it is by logit where ids are chosen, also
among those outside the nucleus, and by score where they are sorted, and then the lower id comes first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from support.released_losses import CASES, draws, expected

__all__ = ["CASES", "END", "expected", "step_case"]

KINDS = ("ordinary", "near-uniform", "peaked", "ties", "unsure of the end")
ROWS = 3
END = 524  # the end marker that the released sampler of Latent-GRPO has in its code
VOCAB = {"latent_grpo": 540, "soft_grpo": 90, "multiplex": 300}
TIED_DRAWS = np.array([0.03, 0.3, 0.7, 1.9, 6.0])  # the first and the last are clamped


def step_case(method: str, index: int) -> dict[str, Any]:
    """Return logits [3, V], the latent rows, draws and options of a case; half of the cases have a hard row."""
    random, kind, vocab = draws(method, index), KINDS[index % len(KINDS)], VOCAB[method]
    scale = {"near-uniform": 0.05, "peaked": 9.0}.get(kind, 2.0)
    logits = random.randn(ROWS, vocab) * scale
    exponential = random.exponential(size=(ROWS, vocab))
    if kind == "ties":
        logits = np.round(logits)
        exponential = random.choice(TIED_DRAWS, size=(ROWS, vocab))
    end = END if method == "latent_grpo" else int(random.randint(vocab))
    if kind == "unsure of the end":
        logits[:, end] = logits.max(-1) + random.randn(ROWS)
    latent = np.arange(ROWS) != (random.randint(ROWS) if index % 2 else -1)
    options: dict[str, Any] = dict(method=method, end_rule="noisy", end_token_id=end)
    options |= dict(top_k=int(random.randint(2, 9)), top_p=float(random.choice([0.5, 0.95, 0.99])))
    options |= dict(noise_scale=float(random.choice([0.5, 1.0])), tau=float(random.choice([0.1, 1.0])))
    options |= dict(noise=str(random.choice(["one_sided", "two_sided"])))
    if method == "soft_grpo":
        options |= dict(noise="two_sided")
    if method == "multiplex":
        options |= dict(top_p=1.0, tau=float(random.choice([1.0, np.inf])))
    return dict(
        logits=torch.from_numpy(logits).float(),
        exponential=torch.from_numpy(exponential).float(),
        latent_mask=torch.from_numpy(latent),
        **options,
    )
