"""A run in a notebook: one table and one bar that are written anew, in place of a block of output for every step."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from latent_grpo.watching.run_table import columns_for

LINES = 200  # the newest lines that a table keeps
WIDTH = 140  # characters; a notebook scrolls wider tables


def in_notebook() -> bool:
    """Return whether this Python serves a notebook, whose outputs are HTML."""
    from rich.console import Console

    return Console().is_jupyter


class Output:
    """A block of output that is written anew."""

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, page: str) -> None:
        """Replace the block by a piece of HTML."""
        from IPython.display import HTML, display

        if self.handle is None:
            self.handle = display(HTML(page), display_id=True)
        else:
            self.handle.update(HTML(page))


class NotebookTable:
    """The table of a run."""

    def __init__(self) -> None:
        self.output, self.rows, self.notes = Output(), list[Mapping[str, Any]](), list[str]()

    def add(self, values: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
        """Add the metrics of a step, and lines that stand below the table."""
        self.rows = [*self.rows, values][-LINES:]
        self.notes += notes
        columns = columns_for(values, WIDTH)
        head = "".join(f'<th title="{html.escape(c.meaning)}">{html.escape(c.heading)}</th>' for c in columns)
        lines = (
            "".join(f"<td>{row[c.metric]:{c.form}}</td>" if c.metric in row else "<td></td>" for c in columns)
            for row in self.rows
        )
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        below = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        self.output.show(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}")


class NotebookBar:
    """A progress bar with a short line of figures."""

    def __init__(self, label: str, total: int, done: int) -> None:
        self.output, self.label, self.total, self.done = Output(), label, total, done
        self.show("")

    def advance(self, figures: str = "") -> None:
        """Move the bar by one step."""
        self.done += 1
        self.show(figures)

    def show(self, figures: str) -> None:
        """Write the bar anew."""
        text = f"{self.label.strip()} {self.done}/{self.total} {figures}"
        self.output.show(f'<progress value="{self.done}" max="{self.total}"></progress> {html.escape(text)}')
