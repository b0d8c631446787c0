"""Figures of a benchmark's JSON: `python -m bench.plot RESULTS.json [...]`, one figure per operator.

A figure has one panel per case: the median of a provider as a dot, p20 to p80 as a line, and below it peak memory if it
was measured. If a case was timed at three or more numbers of rows, its panel shows curves over the rows instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from latent_grpo.watching.figures import COLOURS, INK, drawn_figure

Row = dict[str, Any]  # a row of the JSON, with the fields of bench.harness.report.Row
ENOUGH_ROWS = 3  # different numbers of rows that make curves
PANEL_WIDTH, PANEL_HEIGHT = 3.6, 2.4  # inches
TITLE_WIDTH = 36  # characters per line of a title that fit above a panel
# A provider has one colour in all figures. Other providers take the colours that are left.
PROVIDER_COLOURS = {
    "ours-triton": COLOURS[2],
    "ours-eager": COLOURS[0],
    "eager": COLOURS[1],
    "matmul": INK,
    "reference": COLOURS[5],
    "compile": COLOURS[4],
    "liger": COLOURS[3],
    "trl": COLOURS[1],
    "generate": COLOURS[1],
    "ours-text": COLOURS[0],
    "ours-latent": COLOURS[2],
    "generate-static": COLOURS[4],
}
MEASURES = (("median_ms", "ms"), ("peak_extra_mb", "peak memory beyond the inputs, MB"))


class ResultsError(ValueError):
    """A file holds no results of `python -m bench --json`. The message has one line."""


def read_results(path: Path) -> dict[str, Any]:
    """Return the report in a file that `python -m bench --json` wrote. Raises ResultsError for any other file."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(report["environment"], dict) or not isinstance(report["rows"], list):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "give a file written by `python -m bench --json`"
        raise ResultsError(f"{path} holds no results ({type(error).__name__}): {remedy}") from error
    return report


def caption_of(report: dict[str, Any], rows: list[Row]) -> str:
    """Return what was measured and where: samples, device, versions, commit and date."""
    stamp = report["environment"]
    samples = sorted({row["samples"] for row in rows if row["samples"]})
    count = str(samples[0]) if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    triton = "" if stamp.get("triton") is None else f", triton {stamp['triton']}"
    threads = f", {stamp['threads']} threads" if stamp["device_type"] == "cpu" else ""
    return (
        f"{rows[0]['op']}: median of {count} samples, lines from p20 to p80; {stamp['device']}{threads}, "
        f"torch {stamp['torch']}{triton}, commit {stamp['commit']}, {stamp['date'][:10]}."
    )


def panels_of(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the timed rows by the title of their panel: shape, dtype and the parameters in which cases differ."""
    timed = [row for row in rows if row["median_ms"] is not None]
    counts: dict[str, set[Any]] = {}
    for row in timed:
        counts.setdefault(row["shape"], set()).add(row["parameters"].get("rows"))
    differing = [name for name in timed[0]["parameters"] if len({row["parameters"].get(name) for row in timed}) > 1]
    panels: dict[str, list[Row]] = {}
    for row in timed:
        over_rows = len(counts[row["shape"]]) >= ENOUGH_ROWS
        left_out = {"vocab", "hidden", "model"}  # the name of the shape tells them
        if over_rows:
            left_out.add("rows")
        words = [f"{name} {row['parameters'].get(name)}" for name in differing if name not in left_out]
        words = [word.removeprefix("logits ").replace("_", " ") for word in words]
        panels.setdefault(", ".join([row["shape"], row["dtype"], *words]), []).append(row)
    return panels


def colours_of(names: list[str]) -> dict[str, str]:
    """Return a colour for every provider."""
    left = [colour for colour in COLOURS if colour not in {PROVIDER_COLOURS.get(name) for name in names}]
    return {name: PROVIDER_COLOURS.get(name) or left[i % len(left)] for i, name in enumerate(names)}


def draw_dots(axis: Any, rows: list[Row], measure: str, colours: dict[str, str]) -> None:
    """Draw one line per provider: the figure as a dot and, for times, the spread from p20 to p80."""
    names = [name for name in colours if any(row["provider"] == name and row[measure] is not None for row in rows)]
    for place, name in enumerate(names):
        (row,) = (row for row in rows if row["provider"] == name)
        if measure == "median_ms":
            axis.plot([row["p20"], row["p80"]], [place, place], color=colours[name], linewidth=2.5, alpha=0.6)
        axis.plot(row[measure], place, "o", color=colours[name])
        label = f"{row[measure]:,.3g}" if row[measure] < 1000 else f"{row[measure]:,.0f}"
        above = {"textcoords": "offset points", "xytext": (0, 6), "ha": "center"}
        axis.annotate(label, (row[measure], place), fontsize=8, color=colours[name], **above)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.2)
    axis.set_xlim(0, 1.15 * max(row["p80"] if measure == "median_ms" else row[measure] for row in rows) or 1)
    axis.invert_yaxis()


def draw_lines(axis: Any, rows: list[Row], measure: str, colours: dict[str, str]) -> None:
    """Draw one curve per provider over the number of rows, for times with the spread from p20 to p80 as a band."""
    for name, colour in colours.items():
        points = [row for row in rows if row["provider"] == name and row[measure] is not None]
        points.sort(key=lambda row: row["parameters"]["rows"])
        if not points:
            continue
        counts = [row["parameters"]["rows"] for row in points]
        axis.plot(counts, [row[measure] for row in points], "o-", color=colour, label=name, markersize=4)
        if measure == "median_ms":
            low, high = [row["p20"] for row in points], [row["p80"] for row in points]
            axis.fill_between(counts, low, high, color=colour, alpha=0.25, linewidth=0)
    counts = sorted({row["parameters"]["rows"] for row in rows})
    axis.set(xscale="log", yscale="log", xlabel="rows")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()


def draw_operator(report: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Draw the figure of one operator. At least one of its rows must have been timed."""
    panels = panels_of(rows)
    timed = [row for panel in panels.values() for row in panel]
    colours = colours_of(list(dict.fromkeys(row["provider"] for row in timed)))
    measures = [(m, unit) for m, unit in MEASURES if any(row[m] is not None for row in timed)]
    height = max(PANEL_HEIGHT, 0.35 * len(colours) + 1.0) * len(measures) + 0.5
    size = (PANEL_WIDTH * max(2, len(panels)), height)
    with drawn_figure(path, len(measures), len(panels), size, caption=caption_of(report, timed)) as axes:
        for column, (title, panel) in enumerate(panels.items()):
            axes[0, column].set_title(textwrap.fill(title, TITLE_WIDTH))
            over_rows = len({row["parameters"].get("rows") for row in panel}) >= ENOUGH_ROWS
            for line, (measure, unit) in enumerate(measures):
                shown = [row for row in panel if row[measure] is not None]
                axis = axes[line, column]
                if not shown:
                    axis.set_axis_off()
                    continue
                (draw_lines if over_rows else draw_dots)(axis, shown, measure, colours)
                axis.set(**{"ylabel" if over_rows else "xlabel": unit})


def draw_results(path: Path, folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw a figure for every timed operator of a results file, as FOLDER/STEM-OPERATOR, and return the paths."""
    report = read_results(path)
    written = []
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["op"] == op]
        if all(row["median_ms"] is None for row in rows):
            continue
        # A file that is named after its only operator need not name it twice.
        stem = path.stem if path.stem.endswith(f"-{op}") else f"{path.stem}-{op}"
        written.append(folder / f"{stem}{suffix}")
        draw_operator(report, rows, written[-1])
    return written


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help="from `python -m bench --json`")
    parser.add_argument("--out", type=Path, help="existing folder for the figures (default: next to each file)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="default: svg")
    options = parser.parse_args(arguments)
    try:
        for path in options.results:
            for figure in draw_results(path, options.out or path.parent, f".{options.format}"):
                print(f"wrote {figure}")
    except (ResultsError, OSError) as error:
        print(f"bench.plot: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
