"""Results as people read them: the same cells as a table on the console and in Markdown, files written whole."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from latent_grpo.config import ConfigError
from latent_grpo.saving.atomic import write_whole

# Heads of a result's means; pass@k are under noise and are their own heads.
HEADS = {
    "pass_at_1": "Pass@1", "reasoning_tokens": "reasoning tokens", "response_length": "length",
    "end_marker_rate": "ended", "truncation_rate": "cut off",
}  # fmt: skip
LENGTHS = ("reasoning_tokens", "response_length")
BREAK = re.compile(r"\n *")  # in JSON only between values: strings hold it escaped
PLAIN_LIST = re.compile(r"\[\n([^\[\]{}]*)\n *\]")
BRACKET = re.compile(r" \[(.*), (.*)\]")


@dataclass
class Cells:
    """A table: its heads, and a list of strings a row. The first column is text, the others are figures."""

    heads: list[str]
    rows: list[list[str]]

    def rich(self, title: str, caption: str = "") -> Table:
        """For the console: brackets on a second line, as `.13-.29`, to be narrow."""
        table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, head in enumerate(self.heads):
            if number == 0:
                table.add_column(head, min_width=max(len(row[0]) for row in self.rows), overflow="fold")
            else:
                table.add_column(head, justify="right", min_width=5 if number > 1 else 3)
        for row in self.rows:
            table.add_row(row[0], *(BRACKET.sub(_second_line, cell) for cell in row[1:]))
        return table

    def markdown(self) -> str:
        """A GitHub table."""
        align = [":--", *["--:"] * (len(self.heads) - 1)]
        lines = [self.heads, align, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _second_line(bracket: re.Match[str]) -> str:
    low, high = (bound.removeprefix("0") if bound != "0" else bound for bound in bracket.groups())
    return f"\n[dim]{low}-{high}"


def figure(name: str, value: float) -> str:
    """A mean as it is printed: shares to three places, lengths in steps to two."""
    return f"{value:.2f}" if name in LENGTHS else f"{value:.3f}"


def evaluation_cells(results: dict[str, dict[str, Any]], *, short: bool = False) -> Cells:
    """One row a data set, with intervals, and the mean over data sets where there are several. `short`, for a
    console, leaves out what can be read off the rest."""
    names = list(next(iter(results.values()))["intervals"])
    names.sort(key=lambda name: (name != "pass_at_1", not name.startswith("pass@")))  # accuracies first
    if short:
        names = [name for name in names if name not in ("response_length", "end_marker_rate")]
    heads = ["data", "n" if short else "problems", *(HEADS.get(name, name) for name in names)]
    rows = []
    for label, result in results.items():
        cells = [_with_interval(name, result[name], result["intervals"][name]) for name in names]
        rows.append([Path(label).name if Path(label).suffix else label, str(result["problems"]), *cells])
    if len(results) > 1:
        means = mean_over_data(results)
        rows.append([f"mean of {len(results)}", "", *(figure(name, means[name]) for name in names)])
    return Cells(heads, rows)


def mean_over_data(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Unweighted mean over data sets of every figure, as the paper reports it."""
    names = next(iter(results.values()))["intervals"]
    return {name: sum(result[name] for result in results.values()) / len(results) for name in names}


def _with_interval(name: str, value: float, interval: Sequence[float]) -> str:
    low, high = (figure(name, bound) for bound in interval)
    return f"{figure(name, value)} [{low}, {high}]"


def evaluation_document(record: dict[str, Any]) -> str:
    """The Markdown page of an evaluation's record (see `command_eval`)."""
    results, sampling = record["results"], record["sampling"]
    tries = max(result["num_samples"] for result in results.values())
    noise = f"{sampling['noise']} noise, scale {sampling['noise_scale']:g}, " if sampling["latent"] else ""
    sampled = (
        f" pass@k: under {noise}text at temperature {sampling['temperature']:g}, {tries} samples a problem, unbiased "
        "estimator."
        if tries
        else ""
    )
    where = record["environment"]
    return (
        f"# {record['model']}\n\n"
        f"Reasoning in {'latent steps' if sampling['latent'] else 'text'}, at most {sampling['max_new_tokens']} steps. "
        f"Pass@1, reasoning tokens and lengths: one noise-free, greedy response a problem.{sampled} "
        "In brackets: 95% bootstrap intervals over problems. "
        f"Seed {sampling['seed']}, {where['device']}, torch {where['torch']}.\n\n{evaluation_cells(results).markdown()}"
    )


def environment(device: Any = "cpu") -> dict[str, Any]:
    """Where figures were taken: device, threads, versions."""
    on_gpu = torch.device(device).type == "cuda"
    names = ("torch", "transformers", "latent-grpo")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(), "platform": platform.platform(), "python": platform.python_version(),
        **{name.replace("-", "_"): _version(name) for name in names},
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_writable(path: Path) -> None:
    """Make the folder of a file to be written; ConfigError where that cannot be, before hours of work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}; choose another path") from error
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write {str(path)!r}: its folder may not be written; choose another path")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and its folder where that is missing."""
    require_writable(path)
    write_whole(path, text)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON, a list of plain values on one line."""
    text = PLAIN_LIST.sub(lambda found: f"[{re.sub(BREAK, ' ', found[1]).strip()}]", json.dumps(value, indent=1))
    write_text(path, text + "\n")
