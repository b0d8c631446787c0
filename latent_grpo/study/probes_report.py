"""The report of `latent-grpo probes`: a page, a JSON file and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latent_grpo.saving.atomic_files import write_json, write_whole
from latent_grpo.watching.environment import environment
from latent_grpo.watching.figures import drawn_figure
from latent_grpo.watching.tables import Cells

NAME = "probes"


@dataclass
class Finding:
    """What one probe says."""

    probe: str  # its name in the files
    title: str
    prediction: str
    cells: Cells
    holds: bool
    numbers: list[dict[str, Any]]
    follows: tuple[str, str]  # what follows if the prediction holds, and if not

    @property
    def outcome(self) -> str:
        """Whether the prediction holds, and what follows, as text."""
        held = "It holds here." if self.holds else "It does not hold here."
        return f"{held} {self.follows[not self.holds]}"


def write_report(out: Path, findings: Sequence[Finding], command: str, seconds: int) -> None:
    """Write the findings into `out`."""
    place = environment(torch.device("cpu"))
    made = f"{command}: {seconds} s, {place['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    parts = [f"# Probes\n\n`{command}`: {made.partition(': ')[2]}.\n\n![Four of the probes]({NAME}.svg)\n"]
    for finding in findings:
        parts += [f"## {finding.title}\n", f"Prediction: {finding.prediction}\n", finding.cells.markdown()]
        parts.append(f"{finding.outcome}\n")
    write_whole(out / f"{NAME}.md", "\n".join(parts))
    keys = ("probe", "title", "prediction", "holds", "outcome", "numbers")
    found = [{key: getattr(finding, key) for key in keys} for finding in findings]
    write_json(out / f"{NAME}.json", {"command": command, "seconds": seconds, "environment": place, "findings": found})
    numbers = {finding.probe: finding.numbers for finding in findings}
    with drawn_figure(out / f"{NAME}.svg", 2, 2, (10, 7), caption=made) as axes:
        draw_signs(axes[0, 0], numbers["signs"])
        draw_noise(axes[0, 1], numbers["noise"])
        draw_bars(axes[1, 0], "Entropy of the first step after training, nats", numbers["first tokens"], "rule")
        draw_bars(axes[1, 1], "Responses that are cut off after training", numbers["masking"], "variant")


def draw_signs(axis: Any, numbers: Sequence[dict[str, Any]]) -> None:
    """Draw the share of components with the advantage's sign, over updates on one rollout."""
    for noise in ("one_sided", "two_sided"):
        for rule, style in (("aligned", "-"), ("none", "--")):
            rows = [row for row in numbers if row["noise"] == noise]
            axis.plot(
                range(len(rows)), [row[rule] for row in rows], style, marker="o", label=f"{noise} noise, margin {rule}"
            )
            axis.set_xticks(range(len(rows)), [row["updates"] for row in rows])
    axis.set(title="Components whose update has the advantage's sign", xlabel="updates on one rollout")
    axis.legend()


def draw_noise(axis: Any, numbers: Sequence[dict[str, Any]]) -> None:
    """Draw the accuracy after noisy latent steps, over the scale of the noise."""
    for setting in dict.fromkeys(row["setting"] for row in numbers):
        rows = [row for row in numbers if row["setting"] == setting]
        axis.plot([row["scale"] for row in rows], [row["accuracy"] for row in rows], marker="o", label=setting)
    axis.set(title="Accuracy after noisy latent steps", xlabel="noise scale")
    axis.legend()


def draw_bars(axis: Any, title: str, numbers: Sequence[dict[str, Any]], key: str) -> None:
    """Draw one bar for each row: the entropy after training, or the share of cut-off responses."""
    values = [row["entropies"][1] if "entropies" in row else row["cut_off"] for row in numbers]
    axis.barh([str(row[key]) for row in numbers][::-1], values[::-1])
    axis.set(title=title)
