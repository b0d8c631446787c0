"""The look of every figure: no background and mid-tone colours, so that it is readable on light and on dark pages.

Every figure has a caption that says what was measured, and where.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#76818d"
COLOURS = ("#3f86d0", "#c9711f", "#2f9460", "#d0564f", "#8f70cc", "#9a7b4f", "#c263a2", "#2a93a0")
CAPTION_WIDTH = 15.0  # characters per inch at the font size of the caption
INKED = (
    "axes.edgecolor",
    "axes.labelcolor",
    "axes.titlecolor",
    "text.color",
    "xtick.color",
    "ytick.color",
    "grid.color",
)
STYLE: dict[Any, Any] = {
    **dict.fromkeys(INKED, INK),
    "grid.alpha": 0.25,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text stays text, which can be searched and scales with the page
    "svg.hashsalt": "latent-grpo",  # ids would be random without a salt
}


@contextmanager
def drawn_figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], *, caption: str, **options: Any
) -> Iterator[Any]:
    """Yield the axes [rows, columns] of a figure of `size` inches. Save it to `path` unless the body raises.

    path: an SVG or PNG file, by its suffix. options: for `matplotlib.pyplot.subplots`.
    The same figure gives the same bytes, because the file holds no date and no random ids.
    Raises ValueError for an empty caption.
    """
    if not caption.strip():
        raise ValueError("the figure has no caption: say what was measured, and where")
    # Imported here: matplotlib takes a second to load, and most commands draw nothing.
    import matplotlib

    matplotlib.use("Agg")  # draws files without a display
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
