"""How cost grows with B, V, K, N, T and G, one variable at a time: `python -m bench.scaling --out DIR`.

Beside each measured curve is the least time by the cost model: bytes over the bandwidth of a copy or FLOPs over the
rate of a matrix product, whichever takes longer. Bandwidth and rate are measured first. Writes DIR/scaling.json and
DIR/scaling.svg.
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
from bench.harness.cases import Parameters, Problem, Run
from bench.harness.environment import environment
from bench.harness.run import gate
from bench.harness.timing import Roofline, measure_roofline, quantile, time_alternating
from bench.rollout import END, make_model
from latent_grpo import LatentSampling, generate_latent
from latent_grpo.saving.atomic_files import write_whole
from latent_grpo.watching.figures import COLOURS, INK, drawn_figure
from latent_kernels import latent_step as latent_step_operator

CPU = torch.device("cpu")
WIDTH, VOCAB, ROWS, TOP_K = 576, 49152, 8, 10  # the values where they do not vary; width and vocabulary of SmolLM2
PROMPTS, PROMPT, STEPS = 8, 64, 16
REPEATS = 5
NARROW = 3.0  # least ratio of times for a logarithmic axis, which makes a small range look large
SHOWN = {"ours-eager": "ours, eager", "eager": "PyTorch, plain", "matmul": "the products alone"}


@dataclass(frozen=True)
class Point:
    """Milliseconds of a provider at one value of one variable. floor_ms: None if the cost model has no least time."""

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
    """Values of one variable.

    `make(value, roofline)` returns the runs to time by their provider, and the least time in seconds or None.
    """

    operator: str
    variable: str
    fixed: str
    values: tuple[int, ...]
    make: Callable[[int, Roofline], tuple[dict[str, Run], float | None]]


def checked(problem: Problem, roofline: Roofline) -> tuple[dict[str, Run], float]:
    """Return the shown providers that pass the check, and the least time. Print a wrong provider as an error."""
    runs: dict[str, Run] = {}
    for provider in problem.providers:
        if provider.name in SHOWN:
            correct, remark = gate(problem, provider)
            if correct:
                runs[provider.name] = provider.run
            else:
                print(f"bench.scaling: error: {provider.name}: {remark}", file=sys.stderr)
    return runs, roofline.seconds(problem)


def step(variable: str) -> Callable[[int, Roofline], tuple[dict[str, Run], float]]:
    """Return the `make` of a latent step from hidden states. `variable` names the size that varies."""

    def make(value: int, roofline: Roofline) -> tuple[dict[str, Run], float]:
        sizes: Parameters = {"rows": ROWS, "vocab": VOCAB, "hidden": WIDTH, "top_k": TOP_K, variable: value}
        return checked(latent_step.build(sizes, CPU, torch.float32, False), roofline)

    return make


def step_of_k(value: int, roofline: Roofline) -> tuple[dict[str, Run], None]:
    """Return the runs of a latent step that keeps `value` components, without a least time."""
    hidden, head = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH) * (latent_step.SPREAD / WIDTH**0.5)
    return {"ours-eager": lambda: tuple(latent_step_operator(hidden, head, head, top_k=value, seed=0))}, None


def loss(value: int, roofline: Roofline) -> tuple[dict[str, Run], float]:
    """Return the runs of the fused policy loss and its gradient on `value` response steps, and their least time."""
    sizes: Parameters = {"rows": value, "vocab": VOCAB, "hidden": WIDTH, "top_k": TOP_K}
    sizes |= {"latent_share": 0.5, "response_steps": 16}
    return checked(fused_policy_loss.build(sizes, CPU, torch.float32, False), roofline)


def rollout(group: int, steps: int) -> tuple[dict[str, Run], None]:
    """Return the runs that sample `group` responses to each of PROMPTS prompts. No response ends early."""
    torch.manual_seed(0)
    model = make_model({"model": "tiny", "hidden": 64, "vocab": 1003}, CPU, torch.float32)
    prompts = torch.randint(1, 1003, (PROMPTS, PROMPT))
    mask = torch.ones_like(prompts)

    def runs(latent: bool) -> Run:
        sampling = LatentSampling(latent=latent, max_new_tokens=steps, end_token_id=END, eos_token_id=())
        return lambda: (generate_latent(model, prompts, mask, sampling, num_generations=group).lengths,)

    return {"latent": runs(True), "text": runs(False)}, None


def rollout_of_steps(value: int, roofline: Roofline) -> tuple[dict[str, Run], None]:
    """Return the runs of 8 responses per prompt with `value` steps."""
    return rollout(8, value)


def rollout_of_group(value: int, roofline: Roofline) -> tuple[dict[str, Run], None]:
    """Return the runs of `value` responses per prompt with STEPS steps."""
    return rollout(value, STEPS)


SMALL = f"tiny model, {PROMPTS} prompts of {PROMPT}"
SWEEPS = (
    Sweep("latent_step", "B", f"V = {VOCAB:,}, D = {WIDTH}", (1, 2, 4, 8, 16, 32, 64), step("rows")),
    Sweep("latent_step", "V", f"B = {ROWS}, D = {WIDTH}", (8192, 16384, 32768, 65536, 131072), step("vocab")),
    Sweep("latent_step", "K", f"B = {ROWS}, V = {VOCAB:,}", (2, 4, 8, 16, 32, 64), step_of_k),
    Sweep("fused_policy_loss", "N", f"V = {VOCAB:,}, D = {WIDTH}", (128, 256, 512, 1024, 2048), loss),
    Sweep("rollout", "T", f"{SMALL}, G = 8", (8, 16, 32, 64, 128), rollout_of_steps),
    Sweep("rollout", "G", f"{SMALL}, T = {STEPS}", (1, 2, 4, 8, 16, 32), rollout_of_group),
)


def measure(sweep: Sweep, roofline: Roofline, repeats: int, values: tuple[int, ...]) -> Iterator[Point]:
    """Yield the points of a sweep at the given values."""
    for value in values:
        torch.manual_seed(0)
        runs, floor = sweep.make(value, roofline)
        for provider, seconds in time_alternating(runs, CPU, repeats).items():
            times = [1e3 * x for x in seconds]
            yield Point(
                sweep.operator,
                sweep.variable,
                value,
                provider,
                median_ms=statistics.median(times),
                p20=quantile(times, 0.2),
                p80=quantile(times, 0.8),
                floor_ms=None if floor is None else 1e3 * floor,
            )


def draw(points: list[Point], stamp: dict[str, Any], repeats: int, path: Path) -> None:
    """Draw one panel per sweep: a curve per provider, p20 to p80 as a band, and the least time by the model."""
    caption = (
        f"Median of {repeats} samples, bands from p20 to p80, float32; dashed: the least time by the cost model, from "
        f"a copy at {stamp['copy_gb_per_s']:.3g} GB/s and a product at {stamp['matmul_tflop_per_s']:.3g} TFLOP/s. "
        f"{stamp['device']}, {stamp['threads']} threads, torch {stamp['torch']}, commit {stamp['commit']}, "
        f"{stamp['date'][:10]}. Drawn by `python -m bench.scaling`."
    )
    with drawn_figure(path, 2, 3, (13, 7), caption=caption) as axes:
        for axis, sweep in zip(axes.flat, SWEEPS, strict=True):
            draw_sweep(axis, sweep, [p for p in points if (p.operator, p.variable) == (sweep.operator, sweep.variable)])


def draw_sweep(axis: Any, sweep: Sweep, points: list[Point]) -> None:
    """Draw the panel of one sweep."""
    for colour, provider in zip(COLOURS, dict.fromkeys(p.provider for p in points), strict=False):
        curve = [p for p in points if p.provider == provider]
        values = [p.value for p in curve]
        axis.plot(values, [p.median_ms for p in curve], "o-", color=colour, label=SHOWN.get(provider, provider))
        axis.fill_between(values, [p.p20 for p in curve], [p.p80 for p in curve], color=colour, alpha=0.25, linewidth=0)
    floors = {p.value: p.floor_ms for p in points if p.floor_ms is not None}
    if floors:
        axis.plot(list(floors), list(floors.values()), "--", color=INK, label="least, by the model")
    axis.set(title=f"{sweep.operator} over {sweep.variable}: {sweep.fixed}", xlabel=sweep.variable, ylabel="ms")
    axis.set_xscale("log")
    medians = [p.median_ms for p in points]
    if max(medians) > NARROW * min(medians):
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    ticks = sorted({p.value for p in points})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.legend()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="existing folder (default: the current one)"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help="samples per point (default: %(default)s)")
    parser.add_argument("--points", type=int, metavar="N", help="only the first N values of each variable")
    options = parser.parse_args(arguments)
    if not options.out.is_dir():
        print(f"bench.scaling: error: --out {options.out} is no folder: make it first", file=sys.stderr)
        return 2
    roofline = measure_roofline(CPU, torch.float32)
    stamp = environment(CPU, torch.float32, roofline)
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
