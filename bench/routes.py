"""Write the latent step's table of routes: `python -m bench.routes`, on the NVIDIA GPU that the table is for.

Times every candidate in every bucket of rows at both model shapes in bfloat16. The table takes the candidate with the
least product of the two times.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.harness.cases import SHAPES
from latent_kernels import _dispatch

MODELS = ("llama-1b", "qwen-7b")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate in one bucket, one figure per model shape."""

    rows: int
    route: Any  # of latent_kernels._triton.lm_head_routes: a tile of our product; None is the product of the library
    milliseconds: list[float]


def measure(rows: int, weights: dict[str, torch.Tensor]) -> list[Timing]:
    """Time every candidate for a number of rows. A candidate computes the logits and their sidecar."""
    # Triton is optional: without it this module must still import, for `--help` and the tests.
    from triton.testing import do_bench

    from latent_kernels._linear import project
    from latent_kernels._triton.lm_head import lm_head_sidecar, logits_sidecar
    from latent_kernels._triton.lm_head_routes import candidates

    timings = []
    for route in candidates(rows):
        times = []
        for weight in weights.values():
            hidden = torch.randn(rows, weight.shape[1], device="cuda").to(weight.dtype)

            def run(hidden: torch.Tensor = hidden, weight: torch.Tensor = weight, route: Any = route) -> object:
                if route is None:
                    return logits_sidecar(project(hidden, weight))
                return lm_head_sidecar(hidden, weight, route)

            times.append(float(do_bench(run, return_mode="median")))
        timings.append(Timing(rows, route, times))
    return timings


def fastest(timings: list[Timing]) -> Timing:
    """Return the candidate with the least geometric mean over the model shapes."""
    return min(timings, key=lambda timing: math.prod(timing.milliseconds))


def table_of(timings: list[Timing], device: str) -> dict[str, Any]:
    """Return the content of `routes.json`."""
    chosen = {rows: fastest([t for t in timings if t.rows == rows]).route for rows in {t.rows: None for t in timings}}
    return {
        "source": "python -m bench.routes",
        "device": device,
        "routes": {str(rows): None if route is None else route._asdict() for rows, route in chosen.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.routes", description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write (default: the table in the package)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not _dispatch.triton_available():
        print("bench.routes: error: needs an NVIDIA GPU and Triton; nothing was measured or written", file=sys.stderr)
        return 2
    from latent_kernels._triton.lm_head_routes import BUCKETS, TABLE

    sizes = {name: (SHAPES[name].vocab, SHAPES[name].hidden) for name in MODELS}
    weights = {name: torch.randn(size, device="cuda", dtype=torch.bfloat16) for name, size in sizes.items()}
    timings = [timing for rows in BUCKETS for timing in measure(rows, weights)]
    shown = Table("rows", "route", *(f"{name}, ms" for name in MODELS))
    for timing in timings:
        name = "library" if timing.route is None else f"tile of {timing.route.block_b} rows"
        shown.add_row(str(timing.rows), name, *(f"{time:.3f}" for time in timing.milliseconds))
    Console().print(shown)
    path = options.out or TABLE
    path.write_text(json.dumps(table_of(timings, torch.cuda.get_device_name()), indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
