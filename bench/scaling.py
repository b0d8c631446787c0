"""How cost grows with B, V, K, N, T and G: `python -m bench.scaling --out DIR`, one variable at a time.

Beside each measured curve is the least time of the cost model: bytes over the bandwidth of a copy or FLOPs over the
rate of a matrix product, whichever is more, both measured first. Writes DIR/scaling.json and DIR/scaling.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import fused_policy_loss, latent_step
from bench.harness.cases import Parameters, Problem, Run, Settings
from bench.harness.environment import environment
from bench.harness.report import write_whole
from bench.harness.run import gate
from bench.harness.timing import Roofline, measure_roofline, quantile, time_alternating
from bench.rollout import END, make_model
from latent_grpo import LatentSampling, generate_latent
from latent_grpo.watching.figures import COLOURS, INK, drawn_figure
from latent_kernels import latent_step as latent_step_operator

CPU = torch.device("cpu")
WIDTH, VOCAB, ROWS, TOP_K = 576, 49152, 8, 10  # SmolLM2's where they are not varied
PROMPTS, PROMPT, STEPS = 8, 64, 16
REPEATS = 5
NARROW = 3.0  # a range of times that a logarithmic axis would make look large
SHOWN = {"ours-eager": "ours, eager", "eager": "PyTorch, plain", "matmul": "the products alone"}


@dataclass(frozen=True)
class Point:
    """One measurement: milliseconds of a provider at one value of one variable. floor_ms: None where no model holds."""

    operator: str
    variable: str
    value: int
    provider: str
    median_ms: float
    p20: float
    p80: float
    floor_ms: float | None


@dataclass(frozen=True)
class Sweep:
    """Values of one variable, and what is timed at each: runs by provider, and the floor in seconds."""

    operator: str
    variable: str
    fixed: str
    values: tuple[int, ...]
    make: Callable[[int, Roofline], tuple[dict[str, Run], float | None]]


def checked(problem: Problem, roofline: Roofline) -> tuple[dict[str, Run], float]:
    """The providers shown that pass the bench's gate, and the least time; a wrong one is told of and not timed."""
    runs: dict[str, Run] = {}
    for provider in problem.providers:
        if provider.name in SHOWN:
            correct, remark = gate(problem, provider)
            if correct:
                runs[provider.name] = provider.run
            else:
                print(f"bench.scaling: error: {provider.name}: {remark}", file=sys.stderr)
    return runs, roofline.seconds(problem)


def step(**sizes: int) -> Callable[[int, Roofline], tuple[dict[str, Run], float]]:
    """A latent step from hidden states, with one size given as 0 to be the variable."""

    def make(value: int, roofline: Roofline) -> tuple[dict[str, Run], float]:
        given: Parameters = {"rows": ROWS, "vocab": VOCAB, "hidden": WIDTH, "top_k": TOP_K}
        given |= {name: size or value for name, size in sizes.items()}
        return checked(latent_step.build(given, CPU, torch.float32, False), roofline)

    return make


def step_of_k(value: int, roofline: Roofline) -> tuple[dict[str, Run], None]:
    """A latent step that keeps `value` components."""
    hidden, head = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH) * (latent_step.SPREAD / WIDTH**0.5)
    return {"ours-eager": lambda: tuple(latent_step_operator(hidden, head, head, top_k=value, seed=0))}, None


def loss(value: int, roofline: Roofline) -> tuple[dict[str, Run], float]:
    """The fused policy loss and its gradient on `value` response steps."""
    given: Parameters = {
        "rows": value, "vocab": VOCAB, "hidden": WIDTH, "top_k": TOP_K, "latent_share": 0.5, "response_steps": 16,
    }  # fmt: skip
    return checked(fused_policy_loss.build(given, CPU, torch.float32, False), roofline)


def rollout(group: int, steps: int) -> tuple[dict[str, Run], None]:
    """Responses of a small model to PROMPTS prompts, `group` each, none of which ends early."""
    torch.manual_seed(0)
    model = make_model({"model": "tiny", "hidden": 64, "vocab": 1003}, CPU, torch.float32)
    prompts = torch.randint(1, 1003, (PROMPTS, PROMPT))
    mask = torch.ones_like(prompts)

    def runs(latent: bool) -> Run:
        sampling = LatentSampling(latent=latent, max_new_tokens=steps, end_token_id=END, eos_token_id=())
        return lambda: (generate_latent(model, prompts, mask, sampling, num_generations=group).lengths,)

    return {"latent": runs(True), "text": runs(False)}, None


SWEEPS = (
    Sweep("latent_step", "B", f"V = {VOCAB:,}, D = {WIDTH}", (1, 2, 4, 8, 16, 32, 64), step(rows=0)),
    Sweep("latent_step", "V", f"B = {ROWS}, D = {WIDTH}", (8192, 16384, 32768, 65536, 131072), step(vocab=0)),
    Sweep("latent_step", "K", f"B = {ROWS}, V = {VOCAB:,}", (2, 4, 8, 16, 32, 64), step_of_k),
    Sweep("fused_policy_loss", "N", f"V = {VOCAB:,}, D = {WIDTH}", (128, 256, 512, 1024, 2048), loss),
    Sweep(
        "rollout", "T", f"tiny model, {PROMPTS} prompts of {PROMPT}, G = 8", (8, 16, 32, 64, 128),
        lambda value, roofline: rollout(8, value),
    ),
    Sweep(
        "rollout", "G", f"tiny model, {PROMPTS} prompts of {PROMPT}, T = {STEPS}", (1, 2, 4, 8, 16, 32),
        lambda value, roofline: rollout(value, STEPS),
    ),
)  # fmt: skip


def measure(sweep: Sweep, roofline: Roofline, repeats: int, values: tuple[int, ...]) -> Iterator[Point]:
    """The points of a sweep."""
    for value in values:
        torch.manual_seed(0)
        runs, floor = sweep.make(value, roofline)
        for provider, times in time_alternating(runs, CPU, repeats).items():
            milliseconds = [1e3 * seconds for seconds in times]
            yield Point(
                sweep.operator, sweep.variable, value, provider, statistics.median(milliseconds),
                quantile(milliseconds, 0.2), quantile(milliseconds, 0.8), None if floor is None else 1e3 * floor,
            )  # fmt: skip


def draw(points: list[Point], stamp: dict[str, Any], repeats: int, path: Path) -> None:
    """A panel a sweep: a curve a provider with p20 to p80 as a band, and the model's floor."""
    caption = (
        f"Median of {repeats} samples, bands from p20 to p80, float32; dashed: the least time by the cost model, from "
        f"a copy at {stamp['copy_gb_per_s']:.3g} GB/s and a product at {stamp['matmul_tflop_per_s']:.3g} TFLOP/s. "
        f"{stamp['device']}, {stamp['threads']} threads, torch {stamp['torch']}, commit {stamp['commit']}, "
        f"{stamp['date'][:10]}. Drawn by `python -m bench.scaling`."
    )
    with drawn_figure(path, 2, 3, (13, 7), caption=caption) as axes:
        for axis, sweep in zip(axes.flat, SWEEPS, strict=True):
            mine = [p for p in points if (p.operator, p.variable) == (sweep.operator, sweep.variable)]
            for colour, provider in zip(COLOURS, dict.fromkeys(p.provider for p in mine), strict=False):
                curve = [p for p in mine if p.provider == provider]
                values = [p.value for p in curve]
                axis.plot(values, [p.median_ms for p in curve], "o-", color=colour, label=SHOWN.get(provider, provider))
                axis.fill_between(
                    values, [p.p20 for p in curve], [p.p80 for p in curve], color=colour, alpha=0.25, linewidth=0
                )
            floors = {p.value: p.floor_ms for p in mine if p.floor_ms is not None}
            if floors:
                axis.plot(list(floors), list(floors.values()), "--", color=INK, label="least, by the model")
            axis.set(title=f"{sweep.operator} over {sweep.variable}: {sweep.fixed}", xlabel=sweep.variable, ylabel="ms")
            medians = [p.median_ms for p in mine]
            axis.set_xscale("log")
            if max(medians) > NARROW * min(medians):
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            ticks = sorted({p.value for p in mine})
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
            axis.legend()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="existing folder (default: here)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="samples a point (default: %(default)s)")
    parser.add_argument("--points", type=int, help="only the first values of each variable")
    options = parser.parse_args(arguments)
    if not options.out.is_dir():
        print(f"bench.scaling: error: {options.out} is no folder", file=sys.stderr)
        return 2
    roofline = measure_roofline(CPU, torch.float32)
    stamp = environment(Settings(CPU, torch.float32), roofline)
    points: list[Point] = []
    for sweep in SWEEPS:
        points += measure(sweep, roofline, options.repeats, sweep.values[: options.points])
        content = {"environment": stamp, "points": [asdict(point) for point in points]}
        write_whole(options.out / "scaling.json", json.dumps(content, indent=1) + "\n")
        print(f"{sweep.operator} over {sweep.variable}: done", flush=True)
    draw(points, stamp, options.repeats, options.out / "scaling.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
