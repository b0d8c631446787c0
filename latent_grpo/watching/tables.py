"""Results as people read them: the same cells as a table on the console and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

# Column headings of the means of an evaluation. A pass@k, which is measured under noise, is its own heading.
HEADINGS = {
    "pass_at_1": "Pass@1",
    "reasoning_steps": "reasoning steps",
    "response_length": "length",
    "end_marker_rate": "ended",
    "truncation_rate": "cut off",
}
LENGTHS = ("reasoning_steps", "response_length")
INTERVAL = re.compile(r" \[(.*), (.*)\]")  # as `_with_interval` writes it


@dataclass
class Cells:
    """A table: its headings, and one list of strings per row. The first column is text, the others are figures."""

    headings: list[str]
    rows: list[list[str]]

    def rich(self, title: str, caption: str = "") -> Table:
        """Return the table for the console. To be narrow, it has intervals on a second line, as `.13-.29`."""
        table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, heading in enumerate(self.headings):
            if number == 0:
                table.add_column(heading, min_width=max(len(row[0]) for row in self.rows), overflow="fold")
            else:
                # Least widths keep figures whole: on a narrow console the headings wrap instead.
                table.add_column(heading, justify="right", min_width=5 if number > 1 else 3)
        for row in self.rows:
            table.add_row(row[0], *(INTERVAL.sub(_on_second_line, cell) for cell in row[1:]))
        return table

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        align = [":--", *["--:"] * (len(self.headings) - 1)]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in (self.headings, align, *escaped))


def _on_second_line(interval: re.Match[str]) -> str:
    low, high = (bound.removeprefix("0") if bound != "0" else bound for bound in interval.groups())
    return f"\n[dim]{low}-{high}"


def figure(name: str, value: float) -> str:
    """Return a mean as text: a length in steps with two decimals, any other figure with three."""
    return f"{value:.2f}" if name in LENGTHS else f"{value:.3f}"


def evaluation_cells(results: dict[str, dict[str, Any]], *, short: bool = False) -> Cells:
    """Return one row of figures with intervals per data set and, for several, the mean over data sets.

    short: for a console, leave out the response length and the rate of end markers.
    """
    names = list(next(iter(results.values()))["intervals"])
    names.sort(key=lambda name: (name != "pass_at_1", not name.startswith("pass@")))  # accuracies first
    if short:
        names = [name for name in names if name not in ("response_length", "end_marker_rate")]
    headings = ["data", "n" if short else "problems", *(HEADINGS.get(name, name) for name in names)]
    rows = []
    for label, result in results.items():
        cells = [_with_interval(name, result[name], result["intervals"][name]) for name in names]
        # A label that is a path is shown without its folder.
        rows.append([Path(label).name if Path(label).suffix else label, str(result["problems"]), *cells])
    if len(results) > 1:
        means = mean_over_data(results)
        rows.append([f"mean of {len(results)}", "", *(figure(name, means[name]) for name in names)])
    return Cells(headings, rows)


def mean_over_data(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the unweighted mean over data sets of each figure, as the paper reports it."""
    names = next(iter(results.values()))["intervals"]
    return {name: sum(result[name] for result in results.values()) / len(results) for name in names}


def _with_interval(name: str, value: float, interval: Sequence[float]) -> str:
    low, high = (figure(name, bound) for bound in interval)
    return f"{figure(name, value)} [{low}, {high}]"


def evaluation_document(record: dict[str, Any]) -> str:
    """Return the Markdown page of an evaluation. `record` is the content of the OUT.json of `latent-grpo eval`."""
    results, sampling = record["results"], record["sampling"]
    tries = max(result["num_samples"] for result in results.values())
    noise = f"with {sampling['noise']} noise of scale {sampling['noise_scale']:g}, " if sampling["latent"] else ""
    sampled = (
        f" pass@k: {tries} samples per problem, {noise}text at temperature {sampling['temperature']:g}, unbiased "
        "estimator."
    )
    place = record["environment"]
    return (
        f"# {record['model']}\n\n"
        f"Reasoning in {'latent steps' if sampling['latent'] else 'text'}, at most {sampling['max_new_tokens']} steps. "
        f"Pass@1, reasoning steps and lengths: one noise-free, greedy response per problem.{sampled if tries else ''} "
        "In brackets: 95% bootstrap intervals over problems. "
        f"Seed {sampling['seed']}, {place['device']}, torch {place['torch']}.\n\n{evaluation_cells(results).markdown()}"
    )
