"""The rows of a run, and how they are shown and saved."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.cases import Parameters
from latent_grpo.saving.atomic_files import write_whole

SCHEMA = 1  # of the JSON file


@dataclass(frozen=True)
class Report:
    """The environment, and the rows measured in it."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def wrong(self) -> list[Row]:
        """Rows whose provider failed the check."""
        return [row for row in self.rows if row.correct is False]


@dataclass(frozen=True)
class Row:
    """One line of the report. Times are in milliseconds, memory in MB (10^6 bytes); None means not measured.

    ratio: time of the baseline over the time of this provider, median over rounds.
    over_matmul: time of this provider over the time of the bare matrix product, if the case has one.
    gb_per_s: least bytes of the problem over the median time.
    roofline: least time by the measured copy bandwidth and matrix product of the device, over the median time.
    correct: None if the provider did not run.
    """

    op: str
    shape: str
    provider: str
    dtype: str
    parameters: Parameters
    median_ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int = 0
    peak_extra_mb: float | None = None
    ratio: float | None = None
    over_matmul: float | None = None
    gb_per_s: float | None = None
    roofline: float | None = None
    correct: bool | None = None
    note: str = ""


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Print the rows of one case as a table."""
    head = rows[0]
    case = ", ".join(f"{name} {value}" for name, value in head.parameters.items())
    table = Table(title=f"{head.op}  {head.shape}  {head.dtype}  ({case})", title_justify="left")
    names = ("provider", "ms", "p20", "p80", "times eager", "over matmul", "GB/s", "roofline", "peak MB", "note")
    shown = [name for name in names if name != "over matmul" or any(row.over_matmul is not None for row in rows)]
    for name in shown:
        numeric = name not in ("provider", "note")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        share = "-" if row.roofline is None else f"{row.roofline:.0%}"
        measures = (row.median_ms, row.p20, row.p80, row.ratio, row.over_matmul, row.gb_per_s)
        cells = [row.provider, *map(figure, measures), share, figure(row.peak_extra_mb), row.note]
        table.add_row(*(cell for name, cell in zip(names, cells, strict=True) if name in shown))
    console.print(table)


def figure(value: float | None) -> str:
    """Return a number with three digits, or in full from 1,000 on; `-` for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_json(report: Report, path: Path) -> None:
    """Write an object with the number of the schema, the environment, and the rows with the fields of `Row`."""
    content = {"schema": SCHEMA, "environment": report.environment, "rows": [asdict(row) for row in report.rows]}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_csv(report: Report, path: Path) -> None:
    """Write one line per row. Parameters are in JSON; device, threads, versions and commit are repeated."""
    stamp = {name: report.environment[name] for name in ("device", "threads", "torch", "commit")}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), *stamp])
        writer.writeheader()
        for row in report.rows:
            writer.writerow({**asdict(row), "parameters": json.dumps(row.parameters), **stamp})
