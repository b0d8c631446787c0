"""Draw the figures of README.md and docs/method.md with the package's functions: `python docs/figures.py [FOLDER]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from latent_grpo.watching.figures import COLOURS, INK, drawn_figure
from latent_kernels import __version__, group_advantages, latent_step_from_logits, policy_loss
from latent_kernels._noise import gumbel_noise
from latent_kernels.reference.latent_step import nucleus_mask
from latent_kernels.reference.loss import margin_coefficients, surrogate

BLUE, ORANGE, GREEN, RED = COLOURS[:4]
DRAWN = f"Drawn by `python docs/figures.py` with latent_kernels {__version__}."
TOP_K, TOP_P, SHOWN = 4, 0.7, 12
RESULTS = Path(__file__).parents[1] / "bench" / "results"


def draw_latent_step(path: Path) -> None:
    """Draw candidates, noisy scores and mixture weights of one step over a vocabulary of 40."""
    torch.manual_seed(3)
    logits = 2.0 * torch.randn(1, 40)
    log_probs = logits.log_softmax(-1)[0]
    step = latent_step_from_logits(logits, torch.eye(40), top_k=TOP_K, top_p=TOP_P, seed=5)
    order = log_probs.argsort(descending=True)[:SHOWN]
    names = [str(int(i)) for i in order]
    inside = nucleus_mask(log_probs.sort(descending=True).values, TOP_P, TOP_K)[:SHOWN]
    kept = {int(i): (float(s), float(w)) for i, s, w in zip(step.ids[0], step.scores[0], step.weights[0], strict=True)}
    caption = (
        f"One latent step: K = {TOP_K}, top_p = {TOP_P}, one-sided noise, seed 5; the {SHOWN} most probable of 40 "
        f"random tokens. {DRAWN}"
    )
    with drawn_figure(path, 1, 3, (11, 3.2), caption=caption) as axes:
        left, middle, right = axes[0]
        left.bar(names, log_probs[order].exp(), color=[BLUE if c else INK for c in inside])
        left.set(title="1. Candidates: the nucleus (blue)", ylabel="probability", xlabel="token")
        for rank, token in enumerate(order.tolist()):
            log_prob = float(log_probs[token])
            if token in kept:
                middle.plot([rank, rank], [log_prob, kept[token][0]], color=GREEN, linewidth=3)
                middle.plot(rank, kept[token][0], "^", color=GREEN)
            middle.plot(rank, log_prob, "o", color=BLUE if inside[rank] else INK)
        middle.set_xticks(range(SHOWN), names)
        middle.set(title="2. Noise (green) picks K of them", ylabel="log-prob, score", xlabel="token")
        right.bar(names, [kept.get(int(i), (0.0, 0.0))[1] for i in order], color=GREEN)
        right.set(title="3. Weights: softmax(scores / tau)", ylabel="weight", xlabel="token")


def draw_noise(path: Path) -> None:
    """Draw the densities of one-sided and two-sided noise."""
    torch.manual_seed(0)
    draws = torch.empty(200_000, dtype=torch.float64).exponential_()
    caption = (
        "Histogram of 200,000 draws of the noise. The bars at the ends are the clamp's. One-sided noise is never "
        f"negative, so a sampled score is never below the log-prob it came from. {DRAWN}"
    )
    with drawn_figure(path, 1, 1, (7, 2.8), caption=caption) as axes:
        bins = torch.linspace(-1.55, 4.55, 123).tolist()
        for kind, colour in (("two_sided", ORANGE), ("one_sided", BLUE)):
            axes[0, 0].hist(
                gumbel_noise(draws, kind).numpy(), bins, density=True, color=colour, alpha=0.7, label=f'"{kind}"'
            )
        axes[0, 0].set(xlabel="noise added to a log-prob", ylabel="density")
        axes[0, 0].legend()


def draw_surrogate(path: Path) -> None:
    """Draw the surrogate log-prob of one component, and the factor on its gradient."""
    margin = torch.linspace(-2, 4.5, 400, dtype=torch.float64)
    caption = (
        "d = score - log-prob of a component. Right: the factor c on the gradient of the log-prob. Where d < 0 and the "
        f"advantage is not positive, `margin_gradient` replaces it. {DRAWN}"
    )
    with drawn_figure(path, 1, 2, (9, 3.2), caption=caption) as axes:
        left, right = axes[0]
        left.plot(margin, surrogate(margin.unsqueeze(-1)), color=BLUE)
        left.set(title="surrogate f(d) = -d - exp(-d)", xlabel="margin d", ylabel="f")
        negative = torch.full((1,), -1.0, dtype=torch.float64)
        for kind, colour, style in (("none", INK, "-"), ("released", ORANGE, "--"), ("aligned", GREEN, "-")):
            factor = margin_coefficients(margin.unsqueeze(0), negative, kind)[0]
            right.plot(margin, factor, style, color=colour, label=f'"{kind}"')
        right.set(title="c(d) where the advantage is negative", xlabel="margin d", ylabel="c", ylim=(-2.05, 1.1))
        right.legend()


def draw_loss(path: Path) -> None:
    """Draw the loss of one step over the ratio, for both signs of the advantage."""
    ratio = torch.linspace(0.02, 4, 200, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    caption = f"Clip range 0.2 on both sides, dual clip 3. {DRAWN}"
    with drawn_figure(path, 1, 1, (7, 2.8), caption=caption) as axes:
        for advantage, colour in ((1.0, BLUE), (-1.0, ORANGE)):
            losses = [policy_loss(r.log() * one, 0 * one, advantage * one, one)[0].item() for r in ratio]
            axes[0, 0].plot(ratio, losses, color=colour, label=f"advantage {advantage:+.0f}")
        axes[0, 0].set(xlabel="ratio r of new to old probability", ylabel="loss of the step")
        axes[0, 0].legend()


def draw_advantages(path: Path) -> None:
    """Draw the advantages of eight responses: three are right, and one wrong response was cut off by the limit."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0])
    invalid = torch.tensor([False] * 7 + [True])
    mean_logprob = torch.tensor([-1.2, -2, -1, -0.7, -1.5, -0.9, -2, -3])
    result = group_advantages(
        rewards, torch.zeros(8, dtype=torch.int64), invalid_mask=invalid, mean_logprob=mean_logprob
    )
    responses = torch.arange(8)
    caption = (
        "A group of 8 responses. Responses 0, 3 and 5 are right; 7 was cut off by the limit (advantage 0). Of the "
        f"right responses, 3 has the highest mean log-prob, and only this one counts at the first step. {DRAWN}"
    )
    with drawn_figure(path, 1, 1, (7, 2.8), caption=caption) as axes:
        axes[0, 0].bar(responses - 0.2, result.advantages, 0.4, color=BLUE, label="all steps except the first")
        axes[0, 0].bar(responses + 0.2, result.first_step, 0.4, color=ORANGE, label="first step")
        axes[0, 0].set(xlabel="response", ylabel="advantage")
        axes[0, 0].set_xticks(responses.tolist())
        axes[0, 0].legend()


def committed(file: str, op: str, shape: str, provider: str, case: str | None = None) -> dict[str, Any]:
    """Return the row of a committed result of the benches."""
    rows = json.loads((RESULTS / f"cpu-2-cores-{file}.json").read_text())["rows"]
    (row,) = (
        row
        for row in rows
        if (row["op"], row["shape"], row["provider"]) == (op, shape, provider)
        and case in (None, row["parameters"].get("logits"))
    )
    return dict(row)


def draw_measured(path: Path) -> None:
    """Draw time and memory of PyTorch and of this package, from the committed results."""
    loss, steps = "fused_policy_loss", "latent_step_from_logits"
    panels = {
        "latent step, V 128,256 (ms)": [
            ("realistic", "latent_step", steps, "llama-1b", "median_ms", "realistic"),
            ("near-uniform", "latent_step", steps, "llama-1b", "median_ms", "near-uniform"),
        ],
        "policy loss, time (s)": [
            ("D 576", f"smollm2-{loss}", loss, "smollm2", "median_ms", None),
            ("D 2,048", f"llama-1b-{loss}", loss, "llama-1b", "median_ms", None),
        ],
        "policy loss, memory (MB)": [
            ("D 576", f"smollm2-{loss}", loss, "smollm2", "peak_extra_mb", None),
            ("D 2,048", f"llama-1b-{loss}", loss, "llama-1b", "peak_extra_mb", None),
        ],
    }
    stamp = json.loads((RESULTS / f"cpu-2-cores-smollm2-{loss}.json").read_text())["environment"]
    caption = (
        f"PyTorch (orange) and this package in plain PyTorch operations (blue): medians on {stamp['device']}, "
        f"{stamp['threads']} threads, float32, commit {stamp['commit'][:7]}; the files are in bench/results. {DRAWN}"
    )
    with drawn_figure(path, 1, 3, (11, 2.8), caption=caption) as axes:
        for axis, (title, cases) in zip(axes[0], panels.items(), strict=True):
            scale = 1e-3 if title.endswith("(s)") else 1.0
            for place, (_, file, op, shape, figure, case) in enumerate(cases):
                for shift, provider, colour in ((0.2, "eager", ORANGE), (-0.2, "ours-eager", BLUE)):
                    value = committed(file, op, shape, provider, case)[figure] * scale
                    bar = axis.barh(place + shift, value, 0.36, color=colour)
                    axis.bar_label(bar, [f"{value:.3g}" if value < 100 else f"{value:,.0f}"], padding=3, color=INK)
            axis.set_yticks(range(len(cases)), [case[0] for case in cases])
            axis.set(title=title)
            axis.margins(x=0.2)


FIGURES: dict[str, Any] = {
    "latent-step.svg": draw_latent_step,
    "noise.svg": draw_noise,
    "surrogate.svg": draw_surrogate,
    "loss.svg": draw_loss,
    "advantages.svg": draw_advantages,
    "measured.svg": draw_measured,
}


def main(arguments: list[str]) -> None:
    """Write every figure into the folder."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(folder / name)


if __name__ == "__main__":
    main(sys.argv[1:])
