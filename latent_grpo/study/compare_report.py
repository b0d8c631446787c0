"""What `latent-grpo compare` writes of its runs: one table (Markdown and JSON) and one figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from latent_grpo.saving.atomic import write_json, write_whole
from latent_grpo.study.compare import ARMS, FULL, LATENT, RESULT, Plan, Run, all_runs
from latent_grpo.study.config import CompareConfig
from latent_grpo.watching.figures import COLOURS, INK, drawn_figure
from latent_grpo.watching.tables import Cells, figure

COLUMNS = {
    "pass_at_1": "Pass@1", "pass@1": "Pass@1 under noise", "reasoning_tokens": "reasoning tokens",
    "response_length": "response length", "truncation_rate": "cut off",
}  # fmt: skip
SHORT = {"pass_at_1": "Pass@1", "pass@1": "under noise", "reasoning_tokens": "reasoning tokens"}
CURVES = ("reward", "eval_pass_at_1", "latent_length", "response_length")
NAME = "comparison"
LINES = ("-", "--", "-.")
WINDOWS = 15  # points of a curve of lengths, which are noisy by the step


def read_records(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Results by arm, a record a seed, each with the curves of its run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ARMS:
        for run in (run for run in all_runs(plan.args) if run.arm == name):
            path = run.folder(plan.args) / RESULT
            if path.is_file():
                record = json.loads(path.read_text())
                found.setdefault(name, []).append({**record, "curves": read_curves(plan, run)})
    return found


def read_curves(plan: Plan, run: Run) -> dict[str, dict[str, list[float]]]:
    """Steps and values of a reinforced run's metrics by name; none of a warm start."""
    metrics = run.folder(plan.args) / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if row.get("phase") == "train"]
    curves = {}
    for key in CURVES:
        held = [row for row in rows if key in row]
        if held:
            values = [round(float(row[key]), 4) for row in held]
            curves[key] = {"steps": [row["step"] for row in held], "values": values}
    return curves


def summarise(records: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By arm: seeds, and of every figure the values by seed, their mean and standard deviation (null for one seed).

    `difference` is Pass@1 over that of the full method at the same seed.
    """
    full = {record["seed"]: record["result"]["pass_at_1"] for record in records.get(FULL, [])}
    summary = {}
    for name, runs in records.items():
        figures = {key: _spread([run["result"][key] for run in runs]) for key in COLUMNS}
        pairs = [run["result"]["pass_at_1"] - full[run["seed"]] for run in runs if run["seed"] in full]
        if pairs and name != FULL:
            figures["difference"] = _spread(pairs)
        summary[name] = {"label": ARMS[name].label, "seeds": [run["seed"] for run in runs], **figures}
    return summary


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = round(stdev(values), 5) if len(values) > 1 else None
    return {"mean": round(mean(values), 5), "std": deviation, "values": [round(value, 5) for value in values]}


def cells(summary: dict[str, dict[str, Any]], ablations: bool, *, short: bool = False) -> Cells:
    """The methods, or the full method and its ablations with their differences to it; `short` for a console."""
    chosen = [name for name in summary if ARMS[name].ablation == ablations or (ablations and name == FULL)]
    columns = COLUMNS if not short else dict(list(SHORT.items())[: 2 if ablations else 3])
    over = ["difference" if short else "Pass@1 over Latent-GRPO"] * ablations
    headings = ["ablation" if ablations else "method", *columns.values(), *over]
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
    """What was measured, on what and where, for captions."""
    one = next(iter(records.values()))[0]
    where, problems = one["environment"], one["result"]["problems"]
    threads = f"{plan.args.threads} thread{'s' * (plan.args.threads > 1)}"
    task = "the quickstart's world" if plan.embedded else f"{plan.grpo.eval_dataset}"
    return (
        f"{problems} held-out problems of {task}, seeds {', '.join(map(str, plan.args.seeds))}: warm starts of "
        f"{plan.sft.max_steps} steps shared by the arms of a seed, then {plan.grpo.max_steps} steps of "
        f"{plan.grpo.generation_batch_size} responses; {where['device']}, {threads} a run, "
        f"torch {where['torch']}"
    )


def made_by(plan: Plan, records: dict[str, list[dict[str, Any]]]) -> str:
    """The command, and what its runs took."""
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
    """comparison.json, comparison.md and comparison.png in the output folder; the summary. Nothing without a run."""
    records = read_records(plan)
    summary = summarise(records)
    folder, failed = Path(plan.args.output_dir), {str(run): reason for run, reason in failures.items()}
    if not records:
        return summary
    runs = [record for arm in records.values() for record in arm]
    document = {
        "options": plan.identity(), "environment": runs[0]["environment"], "failed": failed, "arms": summary,
        "runs": runs,
    }  # fmt: skip
    write_json(folder / f"{NAME}.json", document)
    draw(plan, records, folder / f"{NAME}.png")
    write_whole(folder / f"{NAME}.md", page(plan, records, summary, failed))
    return summary


def page(
    plan: Plan, records: dict[str, list[dict[str, Any]]], summary: dict[str, dict[str, Any]], failed: dict[str, str]
) -> str:
    """The Markdown page."""
    noise = (
        f"Pass@1, reasoning tokens and lengths: one noise-free, greedy response a problem. Under noise: "
        f"{plan.args.num_samples} samples a problem with the noise (of text: the temperature "
        f"{plan.grpo.temperature:g}) that the arm is trained with. Mean ± standard deviation over seeds; differences "
        "are taken seed by seed. Reasoning tokens are latent steps, or text tokens before the end marker."
    )
    parts = [
        "# Comparison",
        f"Measured on {task_line(plan, records)}.",
        made_by(plan, records),
        noise,
        cells(summary, False).markdown(),
    ]
    if any(ARMS[name].ablation for name in summary):
        parts += ["## Ablations of Latent-GRPO", cells(summary, True).markdown()]
    parts.append(f"![Pass@1 against reasoning tokens, and training curves]({NAME}.png)")
    if failed:
        parts += ["## Failed runs", "".join(f"- {run}: {reason}\n" for run, reason in failed.items())]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def draw(plan: Plan, records: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Accuracy against reasoning tokens, training curves of methods and of ablations, latent length in training."""
    methods = [name for name in records if not ARMS[name].ablation]
    ablations = [name for name in records if ARMS[name].ablation or name == FULL]
    watched = min(plan.args.watched_problems, plan.args.held_out_problems)
    caption = (
        f"Measured on {task_line(plan, records)}. Points and lines: means over seeds; bars and bands: standard "
        f"deviations, in the lower panels of Latent-GRPO alone. Curves: noise-free Pass@1 on {watched} of the "
        "held-out problems, from the warm start at step 0; latent steps of sampled responses, in "
        f"{WINDOWS} windows of steps."
    )
    with drawn_figure(picture, 2, 2, (11, 9), caption=caption) as axes:
        draw_trade(axes[0, 0], records, methods)
        draw_accuracy(axes[0, 1], records, methods, "Pass@1 in training: methods")
        draw_accuracy(axes[1, 0], records, ablations, "Pass@1 in training: ablations")
        draw_lengths(axes[1, 1], records, ablations)


def colour(names: Sequence[str], name: str) -> str:
    """The full method and the latent warm start look the same everywhere."""
    others = [other for other in names if other not in (FULL, LATENT)]
    return COLOURS[0] if name == FULL else INK if name == LATENT else COLOURS[1 + others.index(name)]


def draw_trade(axis: Any, records: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> None:
    """Pass@1 against reasoning tokens, a dashed line from each warm start to what it became."""
    points = {}
    for name in names:
        spreads = [_spread([run["result"][key] for run in records[name]]) for key in ("reasoning_tokens", "pass_at_1")]
        points[name] = [spread["mean"] for spread in spreads]
        axis.errorbar(
            *([value] for value in points[name]), xerr=spreads[0]["std"], yerr=spreads[1]["std"], fmt="o",
            markersize=8, capsize=3, color=colour(names, name), label=ARMS[name].label,
        )  # fmt: skip
    for name in names:
        start = ARMS[name].start
        if start in points and start != name:
            xs, ys = zip(points[start], points[name], strict=True)
            axis.plot(xs, ys, "--", linewidth=1, color=colour(names, name), alpha=0.6, zorder=0)
    axis.set(title="Accuracy against reasoning tokens", xlabel="reasoning tokens", ylabel="Pass@1, noise-free")
    axis.set_xlim(0, 1.1 * axis.get_xlim()[1])
    axis.legend()


def draw_accuracy(axis: Any, records: dict[str, list[dict[str, Any]]], names: Sequence[str], title: str) -> None:
    """Noise-free Pass@1 by training step."""
    starts = {(run["arm"], run["seed"]): run["watched_pass_at_1"] for runs in records.values() for run in runs}
    for name in names:
        curves = []
        for run in records[name]:
            points, start = _points(run, "eval_pass_at_1"), starts.get((ARMS[name].start, run["seed"]))
            curves.append({0: start, **points} if points and start is not None else points)
        _draw_mean(axis, curves, colour(names, name), name)
    _label(axis, title, "Pass@1, noise-free")


def draw_lengths(axis: Any, records: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> None:
    """Latent steps of sampled responses by training step, each a mean over a window of steps."""
    for name in names:
        curves = []
        for points in (_points(run, "latent_length") for run in records[name]):
            width = max(1, len(points) // WINDOWS)
            steps = list(points)[width - 1 :: width]
            curves.append({end: mean(v for s, v in points.items() if end - width < s <= end) for end in steps})
        _draw_mean(axis, curves, colour(names, name), name)
    _label(axis, "Latent steps in training: ablations, lines as on the left", "latent steps a response", legend=False)


def _points(run: dict[str, Any], key: str) -> dict[int, float]:
    curve = run["curves"].get(key, {"steps": [], "values": []})
    return dict(zip(curve["steps"], curve["values"], strict=True))


def _draw_mean(axis: Any, curves: list[dict[int, float]], line: str, name: str) -> None:
    """Mean over seeds at the steps that all of them have, its standard deviation as a band."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        return
    values = [[curve[step] for curve in curves] for step in steps]
    means, spread = [mean(at) for at in values], [stdev(at) if len(at) > 1 else 0.0 for at in values]
    # Ablations lie on each other where what they leave out never acts: the full method is wide and behind them.
    style = {"linewidth": 3.5, "zorder": 1} if name == FULL else {"linestyle": LINES[list(ARMS).index(name) % 3]}
    axis.plot(steps, means, label=ARMS[name].label, color=line, **style)
    if not ARMS[name].ablation:
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=line, alpha=0.15, linewidth=0)


def _label(axis: Any, title: str, unit: str, *, legend: bool = True) -> None:
    axis.set(title=title, xlabel="Latent-GRPO step" if "ablations" in title else "GRPO step", ylabel=unit)
    if axis.lines and legend:
        axis.legend()
