"""A run as one page of HTML: its curves, and the logged responses with the mixture of every latent step.

The page needs no network: style, program and data are inside. Data reach the browser as JSON and are shown as text, so
that nothing a model writes is read as HTML.
"""

from __future__ import annotations

import html
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from latent_grpo.errors import ConfigError
from latent_grpo.saving.atomic_files import replaced_whole
from latent_grpo.watching.curves import PANELS, STEPS_OF
from latent_grpo.watching.inspect_run import read_rows
from latent_grpo.watching.response_log import TOP, completion_steps, read_completions

LOGGED_STEPS = 20  # the most steps of training whose responses a page holds
RESPONSES = 16  # the most responses of each
# The most latent steps of a page, about 10 MB. Long responses are fewer.
LATENT_STEPS = 200_000
TITLE, DATA = "{{title}}", "{{data}}"
FIGURES = ("step", "prompt", "answer", "completion", "reward", "advantage", "advantage_first_step", "finished")


class RunPage:
    """A run as one page of HTML. A notebook shows it as the last value of a cell.

    run: the output_dir of `train` or `sft`. Of the steps that have logged responses, at most LOGGED_STEPS are taken,
    the first and the last among them, and of each at most RESPONSES responses.
    Raises ConfigError if `run` is not the folder of a run.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.data = page_data(self.run)

    @property
    def html(self) -> str:
        """The page, a whole document."""
        template = files("latent_grpo.watching").joinpath("page.html").read_text(encoding="utf-8")
        # A "<" in the data could end the script element that holds them.
        data = json.dumps(self.data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
        before, after = template.split(DATA)
        return before.replace(TITLE, html.escape(self.run.resolve().name)) + data + after

    def write(self, path: str | Path) -> None:
        """Write the page to a file. Raise ConfigError if that fails."""
        try:
            with replaced_whole(Path(path)) as partial:
                partial.write_text(self.html, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"html {str(path)!r} cannot be written ({error.strerror}); give another file") from error

    def _repr_html_(self) -> str:
        # In a frame of its own, so that the style of the page and that of the notebook do not mix.
        style = "width: 100%; height: 80vh; border: 0"
        return f'<iframe srcdoc="{html.escape(self.html)}" style="{style}" title="latent-grpo"></iframe>'


def page_data(run: Path) -> dict[str, Any]:
    """Return what the page shows: curves, the table of tokens, and responses whose mixtures refer to that table."""
    rows = read_rows(run, run / "metrics.jsonl")
    logged = completion_steps(run)
    steps = evenly(logged, LOGGED_STEPS)
    tokens: dict[str, int] = {}
    responses = []
    room = LATENT_STEPS
    for place, step in enumerate(steps):
        share = room // (len(steps) - place)  # what earlier steps leave is for later ones
        for number, row in enumerate(read_completions(run, step)[:RESPONSES]):
            length = len(row["latent_steps"])
            if number and length > share:
                break
            share, room = share - length, room - length
            responses.append(response_data(row, tokens))
    return {
        "run": run.resolve().name,
        "last": f"{rows[-1]['phase']} step {rows[-1]['step']}",
        "logged": len(logged),
        "top": TOP,
        "curves": curve_data(rows),
        "tokens": list(tokens),
        "responses": responses,
    }


def evenly(items: list[int], most: int) -> list[int]:
    """Return at most `most` items at even distances, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def response_data(row: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """Return a logged response for the page. New tokens are added to `tokens`: token to index.

    Each latent step is a flat list: index of a token, its weight in the mixture, the next index, and so on.
    """
    mixtures = [
        [item for part in step for item in (tokens.setdefault(part["token"], len(tokens)), round(part["weight"], 4))]
        for step in row["latent_steps"]
    ]
    # A log of an earlier version lacks some columns.
    figures = {name: finite(row.get(name)) for name in FIGURES}
    rewards = {name.removeprefix("reward/"): finite(row[name]) for name in row if name.startswith("reward/")}
    return {**figures, "rewards": rewards, "length": row.get("response_length"), "steps": mixtures}


def curve_data(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the panels of `draw_curves` that have figures: title, horizontal axis, unit, and lines of points."""
    panels = []
    for name, phase, series, unit in PANELS:
        lines = []
        for key, label in series.items():
            points = [[row["step"], finite(row[key])] for row in rows if row["phase"] == phase and key in row]
            if any(value is not None for _, value in points):
                lines.append({"label": label, "points": points})
        if lines:
            panels.append({"title": name, "axis": f"{STEPS_OF.get(phase, phase)} step", "unit": unit, "lines": lines})
    return panels


def finite(value: Any) -> Any:
    """Return a value, or None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
