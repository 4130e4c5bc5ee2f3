"""Empty matplotlib figures and axes in one look: transparent, with ink that is legible on white and on black."""

import math
import textwrap

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#7d7d7d"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, safe for colour-blind eyes, that show on white and on black."""


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` characters; its own line ends stay."""
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def blank(width: float, height: float) -> Figure:
    """A transparent figure in inches that pyplot has already forgotten, so that it is shown only once."""
    figure = plt.figure(figsize=(width, height), dpi=96)
    figure.patch.set_alpha(0)
    plt.close(figure)
    return figure


def panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, each `width` x `height` inches, in the neutral ink."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = blank(columns * width, rows * height)
    axes_list = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    for axes in axes_list:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=INK, labelsize=9)
        axes.spines[:].set_color(INK)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, axes_list


def label(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Title and axis labels in the neutral ink."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
