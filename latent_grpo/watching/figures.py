"""How every figure looks: no background and mid-tone colours, so that it reads on a light page and on a dark one.

Every figure has a caption, which says what was measured, and where.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#76818d"
COLOURS = ("#3f86d0", "#c9711f", "#2f9460", "#d0564f", "#8f70cc", "#9a7b4f", "#c263a2", "#2a93a0")
CAPTION_WIDTH = 15.0  # characters an inch, at the caption's size
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "grid.color": INK, "grid.alpha": 0.25, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
    "legend.fontsize": 8, "savefig.transparent": True, "svg.fonttype": "none", "svg.hashsalt": "latent-grpo",
}  # fmt: skip


@contextmanager
def drawn_figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], *, caption: str, **options: Any
) -> Iterator[Any]:
    """Axes [rows, columns] of a figure of `size` inches, saved to `path` (SVG or PNG, by the suffix) in the end.

    `options` go to `matplotlib.pyplot.subplots`. The same figure gives the same bytes: no date and no random ids.
    Raises ValueError for an empty caption.
    """
    if not caption.strip():
        raise ValueError("the figure has no caption: say what was measured, and where")
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
        try:
            yield axes
            lines = textwrap.wrap(caption, int(CAPTION_WIDTH * size[0]))
            figure.supxlabel("\n".join(lines), fontsize=8, x=0.01, ha="left", color=INK)
            figure.savefig(path, dpi=144, metadata={"Date": None} if path.suffix == ".svg" else None)
        finally:
            pyplot.close(figure)
