"""The report of `latent-grpo eval`: its results as tables (console and Markdown) and as curves of pass@k.

A *record* is the content of OUT.json. Its results are those of `evaluate` by data set, for one noise scale or for each
of several.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from latent_grpo.saving.atomic_files import write_json, write_whole
from latent_grpo.watching.figures import INK, drawn_figure
from latent_grpo.watching.tables import Cells, figure, with_interval

WIDE = 6  # columns of figures with intervals, and of scales, that fit a console of 80 columns
Results = dict[str, dict[str, Any]]  # by data set
# Column headings of the means of an evaluation. A pass@k is its own heading.
HEADINGS = {
    "pass_at_1": "Pass@1",
    "reasoning_steps": "reasoning steps",
    "response_length": "response length",
    "end_marker_rate": "ended",
    "truncation_rate": "cut off",
}


def results_by_scale(record: dict[str, Any]) -> dict[float, Results]:
    """Return the results of a record by noise scale."""
    if "sweep" in record:
        return {part["noise_scale"]: part["results"] for part in record["sweep"]}
    return {record["noise_scale"]: record["results"]}


def mean_over_data(results: Results) -> dict[str, float]:
    """Return the unweighted mean over data sets, as the paper reports it, of each figure that all of them have."""
    names = [name for name in _names(results) if all(name in result for result in results.values())]
    return {name: sum(result[name] for result in results.values()) / len(results) for name in names}


def _names(results: Results) -> list[str]:
    """Return the figures of any data set: accuracies first, pass@k by k, then the others in their order."""
    names = list(dict.fromkeys(name for result in results.values() for name in result["intervals"]))
    tries = sorted((name for name in names if name.startswith("pass@")), key=lambda name: int(name[5:]))
    return [*(n for n in names if n == "pass_at_1"), *tries, *(n for n in names if not n.startswith("pass"))]


def evaluation_cells(by_scale: dict[float, Results], *, short: bool = False) -> Cells:
    """Return the figures with intervals: a row per data set and noise scale, then the means over several data sets.

    short: for a console, leave out the rate of end markers. Of more than WIDE columns it leaves out the intervals too,
    and all but the accuracies and the response length. With one noise scale there is no column of scales.
    """
    first = next(iter(by_scale.values()))
    names = [name for name in _names(first) if not short or name != "end_marker_rate"]
    several = len(by_scale) > 1
    wide = short and len(names) + several > WIDE
    if wide:
        names = [name for name in names if name.startswith("pass") or name == "response_length"]
    rows = []
    for label in first:
        for scale, result in ((scale, results[label]) for scale, results in by_scale.items()):
            cells = ["" if name not in result else _cell(name, result, interval=not wide) for name in names]
            # A label that is a path is shown without its folder.
            shown = Path(label).name if Path(label).suffix else label
            rows.append([shown, *([f"{scale:g}"] if several else []), str(result["problems"]), *cells])
    for scale, results in by_scale.items() if len(first) > 1 else ():
        means = mean_over_data(results)
        figures = [figure(name, means[name]) if name in means else "" for name in names]
        rows.append([f"mean of {len(first)}", *([f"{scale:g}"] if several else []), "", *figures])
    scales = ["scale" if short else "noise scale"] if several else []
    # The space lets a heading break into two lines.
    headings = [HEADINGS.get(name, name.replace("@", " @") if wide else name) for name in names]
    return Cells(["data", *scales, "n" if short else "problems", *headings], rows)


def _cell(name: str, result: dict[str, Any], *, interval: bool) -> str:
    return with_interval(name, result[name], result["intervals"][name]) if interval else figure(name, result[name])


def accuracies_explained(record: dict[str, Any]) -> str:
    """Return the protocol of a record: how the responses were sampled that the accuracies are of."""
    sampling = record["sampling"]
    tries = max(result["num_samples"] for results in results_by_scale(record).values() for result in results.values())
    noise = ""
    if sampling["latent"]:
        scale = "the given scale" if "sweep" in record else f"scale {record['noise_scale']:g}"
        without = sampling["noise"] == "none"
        noise = (
            "latent steps without noise, " if without else f"latent steps with {sampling['noise']} noise of {scale}, "
        )
    candidates = f"top_p {sampling['top_p']:g}" + (f", top_k {sampling['top_k']}" if sampling["top_k"] else "")
    sampled = f"{noise}text at temperature {sampling['temperature']:g}, {candidates}"
    if record["protocol"] == "released":
        return (
            f"Protocol of the released scripts: each run samples one response per problem ({sampled}). pass@1 is the "
            "accuracy averaged over the runs, pass@k the unbiased estimate from them."
        )
    drawn = f" pass@k: {tries} samples per problem ({sampled}), unbiased estimator." if tries else ""
    return f"Pass@1: one noise-free, greedy response per problem.{drawn}"


def explanation(record: dict[str, Any]) -> str:
    """Return what the figures of a record are: the protocol, the meaning of rates and lengths, the intervals."""
    released = record["protocol"] == "released"
    of = "are averaged within a run, then over the runs" if released else "are those of the greedy responses"
    kinds = {setting["length_of"] for setting in record["settings"].values()}
    finished = " where the settings say so" if len(kinds) > 1 else ""
    rule = f" Responses that reach the limit are left out of the lengths{finished}; nan: all of them reach it."
    left_out = rule if "finished" in kinds else ""
    return (
        f"{accuracies_explained(record)} Rates and lengths {of}. Reasoning steps are the steps before the end marker. "
        "The response length counts all steps, latent steps and visible text: it is what the paper's tables call "
        f"reasoning tokens.{left_out} In brackets: 95% bootstrap intervals over problems."
    )


def settings_cells(record: dict[str, Any]) -> Cells:
    """Return how each data set was evaluated: the limit of a response, whose lengths count, and the runs' seeds."""
    rows = []
    for label, setting in record["settings"].items():
        seeds = setting["run_seeds"]
        runs = [str(len(seeds)), f"{seeds[0]} to {seeds[-1]}"] if seeds else ["", str(record["sampling"]["seed"])]
        rows.append([label, str(setting["max_new_tokens"]), setting["length_of"], *runs])
    return Cells(["data", "limit in steps", "lengths of", "runs", "seeds"], rows)


def evaluation_document(record: dict[str, Any], picture: str | None = None) -> str:
    """Return the Markdown page of an evaluation. picture: the file name of its figure."""
    place = record["environment"]
    parts = [
        f"# {record['model']}",
        f"Reasoning in {'latent steps' if record['sampling']['latent'] else 'text'}. {explanation(record)} "
        f"Measured on {place['device']}, torch {place['torch']}.",
        evaluation_cells(results_by_scale(record)).markdown(),
        *([f"![pass@k over k]({picture})"] if picture else []),
        "How each data set was evaluated:",
        settings_cells(record).markdown(),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def print_report(console: Console, record: dict[str, Any]) -> None:
    """Print the table and what its figures are."""
    cells = evaluation_cells(results_by_scale(record), short=True)
    has_intervals = any("[" in cell for row in cells.rows for cell in row[1:])
    intervals = "Second lines: 95% bootstrap intervals" if has_intervals else "--out writes 95% bootstrap intervals"
    caption = explanation(record).replace("In brackets: 95% bootstrap intervals", intervals)
    console.print(cells.rich("Evaluation", caption))


def write_report(out: Path, record: dict[str, Any]) -> list[Path]:
    """Write OUT.json, OUT.md and, if there are samples, OUT.svg, and return their paths. out: without a suffix."""
    results = [result for part in results_by_scale(record).values() for result in part.values()]
    picture = Path(f"{out}.svg") if any(result["num_samples"] for result in results) else None
    write_json(Path(f"{out}.json"), _without_nan(record))
    if picture is not None:
        draw_pass_curves(record, picture)
    page = Path(f"{out}.md")
    write_whole(page, evaluation_document(record, picture.name if picture else None))
    return [Path(f"{out}.json"), page, *([picture] if picture else [])]


def _without_nan(value: Any) -> Any:
    """Return a record with None where a mean is over no response, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def draw_pass_curves(record: dict[str, Any], picture: Path) -> None:
    """Draw pass@k over k, with a panel per data set and a line per noise scale, as a file of the picture's suffix.

    Bands are the intervals. A dashed line is the noise-free Pass@1, where it was measured.
    """
    by_scale = results_by_scale(record)
    labels = list(next(iter(by_scale.values())))
    columns = min(4, len(labels))
    lines = -(-len(labels) // columns)
    caption = f"{record['model']}. {accuracies_explained(record)} Bands: 95% bootstrap intervals over problems."
    size = (max(6.0, 3.6 * columns), 3.4 * lines + 0.8)
    with drawn_figure(picture, lines, columns, size, caption=caption) as axes:
        for axis in axes.flat[len(labels) :]:
            axis.set_axis_off()
        for axis, label in zip(axes.flat, labels, strict=False):
            for scale, results in by_scale.items():
                _draw_curve(axis, results[label], f"noise scale {scale:g}" if len(by_scale) > 1 else "pass@k")
            greedy = next(iter(by_scale.values()))[label].get("pass_at_1")
            if greedy is not None:
                axis.axhline(greedy, color=INK, linestyle="--", linewidth=1, label="Pass@1, noise-free")
            axis.set(title=label, xlabel="k", ylabel="pass@k")
        handles = axes.flat[0].get_legend_handles_labels()
        axes.flat[0].figure.legend(*handles, loc="outside upper center", ncols=min(len(handles[0]), columns + 1))


def _draw_curve(axis: Any, result: dict[str, Any], name: str) -> None:
    tries = sorted(int(key[5:]) for key in result["intervals"] if key.startswith("pass@"))
    low, high = zip(*(result["intervals"][f"pass@{k}"] for k in tries), strict=True)
    (line,) = axis.plot(tries, [result[f"pass@{k}"] for k in tries], marker="o", markersize=4, label=name)
    axis.fill_between(tries, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(tries, [str(k) for k in tries])
    axis.minorticks_off()
