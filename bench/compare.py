"""Regressions between two results: `python -m bench.compare BEFORE.json AFTER.json`.

A time has changed if the intervals from p20 to p80 do not meet and the medians differ by more than a threshold. Memory
hardly varies: it has changed if it differs by more than the threshold and by more than a megabyte. A provider that was
right before and is now wrong or gone is a regression too.
Exit codes: 0 no regression, 1 a regression, 2 the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.plot import ResultsError, Row, read_results

THRESHOLD = 0.05  # relative change of a median
LEAST_MB = 1.0
SAME = ("device", "threads")  # of the environment; times of different machines say nothing about the code
REGRESSIONS = ("slower", "more memory", "no longer right", "gone")


@dataclass(frozen=True)
class Change:
    """What became of one provider on one case. after_over_before: ratio of the median times or of the memory."""

    op: str
    case: str
    provider: str
    verdict: str
    after_over_before: float | None = None

    @property
    def regression(self) -> bool:
        """Whether the change is for the worse."""
        return self.verdict in REGRESSIONS


def case_of(row: Row) -> tuple[str, str, str]:
    """Return operator, provider, and the case as text. Rows that agree in them are the same measurement."""
    parameters = ", ".join(f"{name} {value}" for name, value in sorted(row["parameters"].items()))
    return row["op"], row["provider"], f"{row['shape']}, {row['dtype']}, {parameters}"


def time_verdict(before: Row, after: Row, threshold: float) -> str:
    """Return "slower", "faster" or "same"."""
    ratio = after["median_ms"] / before["median_ms"]
    if after["p20"] > before["p80"] and ratio > 1 + threshold:
        return "slower"
    return "faster" if after["p80"] < before["p20"] and ratio < 1 / (1 + threshold) else "same"


def memory_verdict(before: float, after: float, threshold: float) -> str:
    """Return "more memory", "less memory" or "same". Memory is in MB."""
    if abs(after - before) <= max(LEAST_MB, threshold * before):
        return "same"
    return "more memory" if after > before else "less memory"


def compare_rows(before: list[Row], after: list[Row], threshold: float = THRESHOLD) -> list[Change]:
    """Return a change for every measurement of both lists, and for every provider that was timed only in one."""
    old_rows, new_rows = ({case_of(row): row for row in rows} for rows in (before, after))
    changes = []
    for key in dict.fromkeys([*old_rows, *new_rows]):  # in order, each once
        op, provider, case = key
        old, new = old_rows.get(key), new_rows.get(key)
        timed_before, timed_after = (row is not None and row["median_ms"] is not None for row in (old, new))
        if old is not None and new is not None and timed_before and timed_after:
            ratio = new["median_ms"] / old["median_ms"]
            changes.append(Change(op, case, provider, time_verdict(old, new, threshold), ratio))
            peaks = old["peak_extra_mb"], new["peak_extra_mb"]
            if None not in peaks and (verdict := memory_verdict(*peaks, threshold)) != "same":
                changes.append(Change(op, case, provider, verdict, peaks[1] / peaks[0] if peaks[0] else None))
        elif timed_before:
            wrong = new is not None and new["correct"] is False
            changes.append(Change(op, case, provider, "no longer right" if wrong else "gone"))
        elif timed_after:
            changes.append(Change(op, case, provider, "new"))
    return changes


def changes_table(changes: list[Change]) -> Table:
    """Return a table of changes."""
    table = Table(title="after against before", title_justify="left")
    for column in ("operator", "case", "provider", "after / before", ""):
        table.add_column(column, justify="right" if "/" in column else "left")
    for change in changes:
        colour = "red" if change.regression else "green"
        ratio = "-" if change.after_over_before is None else f"{change.after_over_before:.2f}"
        table.add_row(change.op, change.case, change.provider, ratio, f"[{colour}]{change.verdict}[/]")
    return table


def environments_differ(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Return why the times of two reports cannot be compared, or None."""
    for name in SAME:
        old, new = (report["environment"].get(name) for report in (before, after))
        if old != new:
            return f"{name} {old!r} and {new!r} differ"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        before, after = (read_results(path) for path in (options.before, options.after))
    except ResultsError as error:
        print(f"bench.compare: error: {error}", file=sys.stderr)
        return 2
    difference = environments_differ(before, after)
    if difference and not options.any_device:
        remedy = "measure both on one machine, or give --any-device"
        print(f"bench.compare: error: {difference}: {remedy}", file=sys.stderr)
        return 2
    changes = compare_rows(before["rows"], after["rows"], options.threshold)
    if not changes:
        print("bench.compare: error: the files have no timed row in common", file=sys.stderr)
        return 2
    changed = [change for change in changes if change.verdict != "same"]
    if changed:
        Console(width=None if sys.stdout.isatty() else 160).print(changes_table(changed))
    counts = Counter(change.verdict for change in changes)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if options.json is not None:
        options.json.write_text(json.dumps([vars(change) for change in changes], indent=1) + "\n")
    return 1 if any(change.regression for change in changes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE.json", help="from `python -m bench --json`")
    parser.add_argument("after", type=Path, metavar="AFTER.json", help="the same, measured later")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="least relative change of a median (default: %(default)s)"
    )
    parser.add_argument("--any-device", action="store_true", help="compare results of different devices all the same")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the changes as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
