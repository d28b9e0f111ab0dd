"""How the figures of studies look. Importing this takes a moment; only what draws does."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.figure import Figure

# Colours that people with any colour vision tell apart (Okabe and Ito), in the order in which they are taken.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
GREY = "#777777"


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, in the style of all, to be filled in the context."""
    style = mpl.rc_context(
        {
            "axes.grid": True,
            "axes.prop_cycle": f"cycler(color={list(COLOURS)})",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": "medium",
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "savefig.facecolor": "white",
        }
    )
    with style:
        yield Figure(figsize=(width, height))
