"""Random inputs on which released code was run. Its outputs are the files of tests/kernels/data.

The inputs are drawn again from legacy NumPy generators, whose streams never change. Large gradients are stored as their
products with random vectors: a wrong element changes the product.

- released_advantages.npz: Latent-GRPO (github.com/DJC-GO-SOLO/Latent-GRPO at c0994fb), core_algos.py.
  `text` is plain GRPO.
- released_soft_grpo.npz: SofT-GRPO (github.com/zz1358m/SofT-GRPO-master at 2b9d8ec), torch_functional.py.
- released_multiplex.npz: Multiplex Thinking (github.com/GMLR-Penn/Multiplex-Thinking), dp_actor.py and core_algos.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.oracle import UNUSED

DATA = Path(__file__).parents[1] / "kernels" / "data"
CASES = 240
PROBES = 2  # random vectors per gradient
KINDS = ("ordinary", "near-uniform", "peaked", "ties", "repeated ids")


def expected(name: str, output: str) -> list[Tensor]:
    """Return one of the released code's outputs for each case."""
    with np.load(DATA / f"{name}.npz") as arrays:
        return list(torch.from_numpy(arrays[output]).split(arrays[f"{output}_rows"].tolist()))


def draws(name: str, index: int) -> np.random.RandomState:
    """Return the generator of a case."""
    return np.random.RandomState([sum(name.encode()), index])


def advantage_case(index: int) -> dict[str, Any]:
    """Return rewards, groups and log-probs of 2 to 4 groups; in every second case half of the responses are cut off."""
    random = draws("advantages", index)
    size, groups, limit = random.randint(2, 9), random.randint(2, 5), 6
    rows = size * groups
    lengths = random.randint(1, limit, rows)
    lengths[random.rand(rows) < (0.5 if index % 2 else 0.15)] = limit
    kinds = (random.randint(0, 2, rows), random.randint(0, 5, rows) / 4, random.randn(rows))
    return dict(
        rewards=torch.from_numpy(kinds[index % 3]).float(),
        group_ids=torch.from_numpy(random.permutation(np.repeat(np.arange(groups), size))),
        lengths=torch.from_numpy(lengths),
        limit=limit,
        logprob=torch.from_numpy(-random.exponential(size=(rows, limit))).float(),
        normalize_std=bool(index % 4),
    )


def logits_case(random: np.random.RandomState, kind: str, rows: int, vocab: int, width: int) -> tuple[Tensor, Tensor]:
    """Return logits [N, V] float64 and ids [N, K] of a kind. Id 0 never occurs: SofT-GRPO marks text rows with it."""
    scale = {"near-uniform": 0.05, "peaked": 9.0}.get(kind, 2.0)
    logits = random.randn(rows, vocab) * scale
    if kind == "ties":
        logits = np.round(logits)
    ids = np.stack([1 + random.permutation(vocab - 1)[:width] for _ in range(rows)])
    likely = random.rand(rows) < 0.7
    ids[likely] = 1 + np.argsort(-logits[:, 1:], kind="stable", axis=-1)[likely, :width]
    if kind == "repeated ids":
        ids[:, 1] = ids[:, 0]
    return torch.from_numpy(logits), torch.from_numpy(ids)


def soft_grpo_case(index: int) -> dict[str, Tensor]:
    """Return logits, ids, scores, an upstream gradient and probes of 5 rows, of which one or two are text."""
    random, kind = draws("soft_grpo", index), KINDS[index % len(KINDS)]
    rows, width = 5, random.randint(2, 11)
    vocab = int(random.choice([12, 37, 300]))
    logits, ids = logits_case(random, kind, rows, vocab, width)
    noise = np.clip(random.gumbel(size=ids.shape), -1.5, 3.0)
    noise[random.rand(*ids.shape) < 0.1] *= 3.0  # the policy has moved: beyond the clamp of the margins
    target = np.log(logits.gather(-1, ids).softmax(-1).numpy() + 1e-6)
    scores = torch.from_numpy(target + noise + 0.3 * random.randn(*ids.shape))
    ids[: 1 + index % 2, 1:] = UNUSED
    upstream, probes = random.randn(rows), random.randn(vocab, PROBES)
    return dict(
        logits=logits, ids=ids, scores=scores, upstream=torch.from_numpy(upstream), probes=torch.from_numpy(probes)
    )


def multiplex_case(index: int) -> dict[str, Any]:
    """Return a batch of 3 responses of up to 4 steps whose hidden states are their logits: the head is the identity."""
    random, kind = draws("multiplex", index), KINDS[index % len(KINDS)]
    shape, width = (3, 4), random.randint(2, 5)
    vocab = int(random.choice([9, 26]))
    logits, ids = logits_case(random, kind, shape[0] * shape[1], vocab, width)
    ids[random.rand(len(ids)) < 0.4, 1:] = UNUSED
    lengths = random.randint(1, shape[1] + 1, shape[0])
    old = logits.log_softmax(-1).gather(-1, ids.clamp_min(0)).numpy() + 0.4 * random.randn(*ids.shape)
    advantages = random.randn(*shape) + 0.01
    probes = torch.from_numpy(random.randn(vocab, PROBES))
    options = dict(clip_low=0.2, clip_high=(0.2, 0.28)[index % 2], dual_clip=3.0 if index % 3 else 1.2)
    options["aggregation"] = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")[index // 2 % 3]
    return dict(
        hidden=logits.view(*shape, vocab),
        lm_head=torch.eye(vocab, dtype=torch.float64),
        ids=ids.view(*shape, width),
        scores=torch.zeros(*shape, width, dtype=torch.float64),
        old_logprob=torch.from_numpy(old).view(*shape, width),
        advantages=torch.from_numpy(advantages),
        mask=torch.arange(shape[1]) < torch.from_numpy(lengths).unsqueeze(-1),
        probes=probes,
        options=options,
    )
