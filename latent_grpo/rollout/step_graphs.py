"""Captured decoding steps: shapes in few sizes, so that a batch that shrinks meets graphs that exist."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from latent_grpo.config import LatentSampling
from latent_kernels import kernels_for

LEAST = 8  # size of a bucket


def bucket(count: int) -> int:
    """The least m 2^e of at least LEAST that is at least `count`, m from 4 to 7: at most a quarter too many."""
    size = max(LEAST // 4, 1 << max(0, count.bit_length() - 3))
    return max(LEAST, -(-count // size) * size)


class StepGraphs:
    """CUDA graphs by key, in one memory pool, which they may share since only one runs at a time.

    The first use of a key runs eagerly, which warms up what a capture may not do; the second one captures. A key that
    is met once, as many are in one rollout, so costs no capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Do what `step` does, which works on tensors that stay where they are, in shapes that `key` names."""
        if key not in self.seen:
            self.seen.add(key)
            return step()
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
                step()
            self.graphs[key] = graph  # not one whose capture failed
        self.graphs[key].replay()


def captures(device: torch.device, sampling: LatentSampling) -> bool:
    """Whether steps on `device` are captured: operators in plain PyTorch ask the host, which a capture forbids."""
    return sampling.cuda_graphs and kernels_for(device, sampling.latent_top_k)
