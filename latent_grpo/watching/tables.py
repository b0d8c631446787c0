"""Results as people read them: the same cells as a table on the console and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

LENGTHS = ("reasoning_steps", "response_length")
INTERVAL = re.compile(r" \[(.*), (.*)\]")  # as `with_interval` writes it


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


def with_interval(name: str, value: float, interval: Sequence[float]) -> str:
    """Return a mean with its interval, as `0.210 [0.130, 0.290]`."""
    low, high = (figure(name, bound) for bound in interval)
    return f"{figure(name, value)} [{low}, {high}]"
