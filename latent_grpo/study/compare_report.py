"""The report of `latent-grpo compare`: its results as tables (Markdown and JSON) and one figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from latent_grpo.saving.atomic_files import write_json, write_whole
from latent_grpo.study.compare import ARMS, FULL, LATENT, RESULT, Plan, Run, all_runs
from latent_grpo.study.config import CompareConfig
from latent_grpo.watching.figures import COLOURS, INK, drawn_figure
from latent_grpo.watching.metrics import read_metrics
from latent_grpo.watching.tables import Cells, figure

# Figures of a result and their headings: on the page, and on the console.
COLUMNS = {
    "pass_at_1": "Pass@1",
    "pass@1": "Pass@1 under noise",
    "reasoning_steps": "reasoning steps",
    "response_length": "response length",
    "truncation_rate": "cut off",
}
SHORT = {"pass_at_1": "Pass@1", "pass@1": "under noise", "reasoning_steps": "reasoning steps"}
CURVES = ("reward", "eval_pass_at_1", "latent/mean_length", "completions/mean_length")
NAME = "comparison"
LINE_STYLES = ("-", "--", "-.")
WINDOWS = 15  # points of a curve of lengths; lengths of single steps are noisy


def read_records(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return the records of every arm, one per seed that has a result, each with the curves of its run."""
    records: dict[str, list[dict[str, Any]]] = {}
    for name in ARMS:  # their order is the order of the tables
        for run in (run for run in all_runs(plan.args) if run.arm == name):
            path = run.folder(plan.args) / RESULT
            if path.is_file():
                record = json.loads(path.read_text())
                records.setdefault(name, []).append({**record, "curves": read_curves(plan, run)})
    return records


def read_curves(plan: Plan, run: Run) -> dict[str, dict[str, list[float]]]:
    """Return, for each metric of CURVES, the steps and values of a run. A warm start has none."""
    metrics = run.folder(plan.args) / "metrics.jsonl"
    rows = [row for row in read_metrics(metrics) if row.get("phase") == "train"]
    curves = {}
    for key in CURVES:
        measured = [row for row in rows if key in row]  # eval_pass_at_1 is in few rows
        if measured:
            values = [round(float(row[key]), 4) for row in measured]
            curves[key] = {"steps": [row["step"] for row in measured], "values": values}
    return curves


def summarise(records: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return label, seeds and figures of every arm.

    A figure has its values by seed, their mean and their standard deviation, which is None for one seed.
    `difference` is the Pass@1 of the arm minus the Pass@1 of the full method with the same seed.
    """
    full = {record["seed"]: record["result"]["pass_at_1"] for record in records.get(FULL, [])}
    summary = {}
    for name, runs in records.items():
        figures = {key: _spread([run["result"][key] for run in runs]) for key in COLUMNS}
        # A failed run of the full method leaves its seed out.
        pairs = [run["result"]["pass_at_1"] - full[run["seed"]] for run in runs if run["seed"] in full]
        if pairs and name != FULL:
            figures["difference"] = _spread(pairs)
        summary[name] = {"label": ARMS[name].label, "seeds": [run["seed"] for run in runs], **figures}
    return summary


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = round(stdev(values), 5) if len(values) > 1 else None
    return {"mean": round(mean(values), 5), "std": deviation, "values": [round(value, 5) for value in values]}


def cells(summary: dict[str, dict[str, Any]], ablations: bool, *, short: bool = False) -> Cells:
    """Return the table of the methods, or of the full method and its ablations with their differences to it.

    short: leave out columns, for the console.
    """
    chosen = [name for name in summary if ARMS[name].ablation == ablations or (ablations and name == FULL)]
    columns = COLUMNS if not short else dict(list(SHORT.items())[: 2 if ablations else 3])
    difference = ["difference" if short else "Pass@1 minus Latent-GRPO's"] if ablations else []
    headings = ["ablation" if ablations else "method", *columns.values(), *difference]
    rows = []
    for name in chosen:
        row = [summary[name]["label"], *(_cell(key, summary[name][key]) for key in columns)]
        rows.append([*row, _cell("difference", summary[name].get("difference"))] if ablations else row)
    if not short:
        headings.insert(1, "seeds")
        for name, row in zip(chosen, rows, strict=True):
            row.insert(1, str(len(summary[name]["seeds"])))
    return Cells(headings, rows)


def _cell(name: str, spread: dict[str, Any] | None) -> str:
    if spread is None:
        return ""
    sign = "+" if name == "difference" and spread["mean"] >= 0 else ""
    deviation = "" if spread["std"] is None else f" ± {figure(name, spread['std'])}"
    return f"{sign}{figure(name, spread['mean'])}{deviation}"


def task_line(plan: Plan, records: dict[str, list[dict[str, Any]]]) -> str:
    """Return what was measured, on which task and machine, for captions."""
    one = next(iter(records.values()))[0]
    place, problems = one["environment"], one["result"]["problems"]
    threads = f"{plan.args.threads} thread{'s' * (plan.args.threads > 1)}"
    seeds = f"seed{'s' * (len(plan.args.seeds) > 1)} {', '.join(map(str, plan.args.seeds))}"
    task = f"the {plan.args.world} world" if plan.embedded else f"{plan.grpo.eval_dataset}"
    rollouts, updates = plan.grpo.max_rollouts, plan.grpo.max_steps
    length = f"{rollouts} rollouts" if rollouts > 0 else f"{updates} updates on rollouts"
    return (
        f"{problems} held-out problems of {task}, {seeds}: warm starts of "
        f"{plan.sft.max_steps} steps shared by the arms of a seed, then {length} of "
        f"{plan.grpo.generation_batch_size} responses; {place['device']}, {threads} per run, torch {place['torch']}"
    )


def made_by(plan: Plan, records: dict[str, list[dict[str, Any]]]) -> str:
    """Return the command, the number of its runs and the time that they took."""
    flags = []
    for option in fields(plan.args):
        value, default = getattr(plan.args, option.name), getattr(CompareConfig(), option.name)
        if value != default and option.name != "output_dir":
            words = value if isinstance(value, list) else [value]
            flags.append(f"--{option.name} {' '.join(map(str, words))}")
    runs = [run["seconds"] for arm in records.values() for run in arm]
    seconds = sum(run["train"] + run["evaluate"] for run in runs)
    command = " ".join(["latent-grpo compare", *flags])
    return f"`{command}`: {len(runs)} runs, {seconds:,.0f} s together, {plan.args.workers} at a time."


def write_report(plan: Plan, failures: dict[Run, str]) -> dict[str, dict[str, Any]]:
    """Write comparison.json, .md and .png into the output folder, and return the summary.

    They cover all results in the folder, including those of earlier commands. Without a result nothing is written.
    """
    records = read_records(plan)
    summary = summarise(records)
    if not records:
        return summary
    folder, failed = Path(plan.args.output_dir), {str(run): reason for run, reason in failures.items()}
    runs = [record for arm in records.values() for record in arm]
    document = {
        "options": plan.identity(),
        "environment": runs[0]["environment"],
        "failed": failed,
        "arms": summary,
        "runs": runs,
    }
    write_json(folder / f"{NAME}.json", document)
    draw(plan, records, folder / f"{NAME}.png")
    write_whole(folder / f"{NAME}.md", page(plan, records, summary, failed))
    return summary


def page(
    plan: Plan, records: dict[str, list[dict[str, Any]]], summary: dict[str, dict[str, Any]], failed: dict[str, str]
) -> str:
    """Return the Markdown page."""
    explanation = (
        f"Pass@1, reasoning steps and response length: one noise-free, greedy response per problem. Under noise: "
        f"{plan.args.num_samples} samples per problem, with the noise that the arm is trained with (for text: "
        f"temperature {plan.grpo.temperature:g}). Mean ± standard deviation over seeds; differences are taken seed by "
        "seed. Reasoning steps are latent steps, or text tokens before the end marker. The response length counts the "
        "visible text too."
    )
    parts = [
        "# Comparison",
        f"Measured on {task_line(plan, records)}.",
        made_by(plan, records),
        explanation,
        cells(summary, False).markdown(),
    ]
    if any(ARMS[name].ablation for name in summary):
        parts += ["## Ablations of Latent-GRPO", cells(summary, True).markdown()]
    parts.append(f"![Pass@1 against reasoning steps, and training curves]({NAME}.png)")
    if failed:
        parts += ["## Failed runs", "".join(f"- {run}: {reason}\n" for run, reason in failed.items())]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def draw(plan: Plan, records: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Draw accuracy against reasoning steps, training curves of methods and of ablations, and latent lengths."""
    methods = [name for name in records if not ARMS[name].ablation]
    ablations = [name for name in records if ARMS[name].ablation or name == FULL]
    watched = min(plan.args.watched_problems, plan.args.held_out_problems)
    caption = (
        f"Measured on {task_line(plan, records)}. Points and lines are means over seeds. Bars and bands are standard "
        "deviations; the lower panels show only that of Latent-GRPO. Curves of Pass@1 are noise-free, on "
        f"{watched} of the held-out problems, and begin with the warm start at step 0. Latent steps are of sampled "
        f"responses, averaged over {WINDOWS} windows of steps."
    )
    with drawn_figure(picture, 2, 2, (11, 9), caption=caption) as axes:
        draw_trade(axes[0, 0], records, methods)
        draw_accuracy(axes[0, 1], records, methods, "Pass@1 in training: methods")
        draw_accuracy(axes[1, 0], records, ablations, "Pass@1 in training: ablations")
        draw_lengths(axes[1, 1], records, ablations)


def colour(names: Sequence[str], name: str) -> str:
    """Return the colour of an arm. The full method and the latent warm start have the same colour in every panel."""
    others = [other for other in names if other not in (FULL, LATENT)]
    return COLOURS[0] if name == FULL else INK if name == LATENT else COLOURS[1 + others.index(name)]


def draw_trade(axis: Any, records: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> None:
    """Draw Pass@1 against reasoning steps, with a dashed line from each warm start to the arms that start from it."""
    points = {}
    for name in names:
        spreads = [_spread([run["result"][key] for run in records[name]]) for key in ("reasoning_steps", "pass_at_1")]
        points[name] = [spread["mean"] for spread in spreads]
        x, y = points[name]
        errors = {"xerr": spreads[0]["std"], "yerr": spreads[1]["std"], "capsize": 3}
        look = {"fmt": "o", "markersize": 8, "color": colour(names, name), "label": ARMS[name].label}
        axis.errorbar(x, y, **errors, **look)
    for name in names:
        start = ARMS[name].start
        if start in points and start != name:
            xs, ys = zip(points[start], points[name], strict=True)
            axis.plot(xs, ys, "--", linewidth=1, color=colour(names, name), alpha=0.6, zorder=0)
    axis.set(title="Accuracy against reasoning steps", xlabel="reasoning steps", ylabel="Pass@1, noise-free")
    axis.set_xlim(0, 1.1 * axis.get_xlim()[1])
    axis.legend()


def draw_accuracy(axis: Any, records: dict[str, list[dict[str, Any]]], names: Sequence[str], title: str) -> None:
    """Draw noise-free Pass@1 by training step, from the Pass@1 of the warm start at step 0."""
    starts = {(run["arm"], run["seed"]): run["watched_pass_at_1"] for runs in records.values() for run in runs}
    for name in names:
        curves = []
        for run in records[name]:
            points, start = _points(run, "eval_pass_at_1"), starts.get((ARMS[name].start, run["seed"]))
            curves.append({0: start, **points} if points and start is not None else points)
        _draw_mean(axis, curves, colour(names, name), name)
    _label(axis, title, "Pass@1, noise-free")


def draw_lengths(axis: Any, records: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> None:
    """Draw the latent steps of sampled responses by training step. Each point is a mean over a window of steps."""
    for name in names:
        curves = []
        for points in (_points(run, "latent/mean_length") for run in records[name]):
            width = max(1, len(points) // WINDOWS)
            steps = list(points)[width - 1 :: width]
            curves.append({end: mean(v for s, v in points.items() if end - width < s <= end) for end in steps})
        _draw_mean(axis, curves, colour(names, name), name)
    _label(axis, "Latent steps in training: ablations, lines as on the left", "latent steps a response", legend=False)


def _points(run: dict[str, Any], key: str) -> dict[int, float]:
    curve = run["curves"].get(key, {"steps": [], "values": []})
    return dict(zip(curve["steps"], curve["values"], strict=True))


def _draw_mean(axis: Any, curves: list[dict[int, float]], line: str, name: str) -> None:
    """Draw the mean over seeds at the steps that all seeds have. A method has its standard deviation as a band."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        return
    values = [[curve[step] for curve in curves] for step in steps]
    means, spread = [mean(at) for at in values], [stdev(at) if len(at) > 1 else 0.0 for at in values]
    # An ablation lies exactly on the full method if what it leaves out never acts. So the full method is drawn wide and
    # behind the others, and the others have different dashes.
    style = {"linewidth": 3.5, "zorder": 1} if name == FULL else {"linestyle": LINE_STYLES[list(ARMS).index(name) % 3]}
    axis.plot(steps, means, label=ARMS[name].label, color=line, **style)
    if not ARMS[name].ablation:
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=line, alpha=0.15, linewidth=0)


def _label(axis: Any, title: str, unit: str, *, legend: bool = True) -> None:
    axis.set(title=title, xlabel="Latent-GRPO step" if "ablations" in title else "GRPO step", ylabel=unit)
    if axis.lines and legend:
        axis.legend()
