"""CUDA graphs of decoding steps, for shapes of few sizes: a batch that shrinks then meets graphs that exist."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from latent_grpo.config import LatentSampling
from latent_kernels import kernels_for

LEAST = 8  # the smallest bucket


def bucket(count: int) -> int:
    """Return the smallest size m * 2^e, with m from 4 to 7, that is at least `count` and at least LEAST.

    Above LEAST, a bucket is at most 25% larger than `count`.
    """
    size = max(LEAST // 4, 1 << max(0, count.bit_length() - 3))
    return max(LEAST, -(-count // size) * size)


class StepGraphs:
    """CUDA graphs by key, in one memory pool, which they may share because only one of them runs at a time.

    The first use of a key runs eagerly. This does the work that a capture forbids, such as the compilation of kernels.
    The second use captures. Many keys occur only once in a rollout, and so cost no capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step`, from its graph if there is one.

        A graph replays kernels on the addresses and shapes of its capture. So `step` must work on tensors that stay
        where they are, and `key` must name everything else that it depends on.
        """
        if key not in self.seen:
            self.seen.add(key)
            return step()
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
                step()
            self.graphs[key] = graph  # only now: a capture that fails leaves no graph
        self.graphs[key].replay()


def captures(device: torch.device, sampling: LatentSampling) -> bool:
    """Return whether steps on `device` are captured in CUDA graphs."""
    # The operators in plain PyTorch wait for the device, which a capture forbids, so it needs the Triton kernels.
    return sampling.cuda_graphs and kernels_for(device, sampling.latent_top_k)
