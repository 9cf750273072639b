"""Figures: matplotlib without a screen, colours that colour-blind readers can tell apart."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from tenfold_common.errors import UserError
from tenfold_common.optional import require
from wavelength_rsa.scales import HIGH, LOW, Distribution, Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's palette; markers tell the series apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _figure(width: float = 6.4, height: float = 4.0) -> "Figure":
    """Return a figure on the Agg canvas; nothing global is touched."""
    require("matplotlib", extra="plot", package="wavelength-rsa", purpose="figures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(ax: "Axes | None", width: float = 6.4, height: float = 4.0) -> "Axes":
    axes = _figure(width, height).add_subplot() if ax is None else ax
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(figure: "Figure | SubFigure", path: str | os.PathLike[str]) -> Path:
    """Write a figure with 150 dots per inch; the ending of `path` names the format.

    Raises:
        UserError: the folder does not exist, or the format is unknown.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise UserError(f"cannot write {str(target)!r}: its folder does not exist; make it first")
    try:
        figure.figure.savefig(target, dpi=150)
    except ValueError as error:
        raise UserError(f"cannot write {str(target)!r}: {error}") from error
    return target


def error_curve(
    candidates: Sequence[int],
    errors: Mapping[str, Sequence[float]],
    *,
    ax: "Axes | None" = None,
    title: str = "",
) -> "Axes":
    """Draw the error of speakers against the number of clues they choose from.

    Args:
        candidates: Numbers of clues k, at least 1, on an axis of powers of two.
        errors: For each speaker its error in points, one per k.
        ax: Where to draw. Defaults to a new figure, `result.figure`.
        title: Above the axes.

    Raises:
        UserError: a speaker has another number of errors than there are k.
        MissingDependencyError: matplotlib is not installed.
    """
    for name, values in errors.items():
        if len(values) != len(candidates):
            raise UserError(f"{name!r} has {len(values)} errors for {len(candidates)} numbers k")
    axes = _axes(ax)
    for i, (name, values) in enumerate(errors.items()):
        axes.plot(
            candidates,
            values,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(candidates), [str(k) for k in candidates])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clues to choose from, k")
    axes.set_ylabel("|judge's mean - target|, points")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return axes


def distribution_plot(
    heard: Mapping[str, Distribution],
    scale: Scale,
    *,
    target: float | None = None,
    ax: "Axes | None" = None,
    title: str = "",
) -> "Axes":
    """Draw distributions over one scale, with the target as a dashed line.

    Args:
        heard: For each name the distribution, such as L0, L1 and people's responses.
        scale: Its ends stand below 0 and 100.
        target: The position that was meant. Defaults to none.
        ax: Where to draw. Defaults to a new figure, `result.figure`.
        title: Above the axes.

    Raises:
        UserError: `heard` is empty.
        MissingDependencyError: matplotlib is not installed.
    """
    if not heard:
        raise UserError("heard is empty; give at least one {name: Distribution}")
    axes = _axes(ax)
    for i, (name, found) in enumerate(heard.items()):
        axes.plot(
            found.grid,
            found.probs,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=3,
            linewidth=1.2,
            label=f"{name} (mean {found.mean:.0f})",
        )
    if target is not None:
        axes.axvline(target, color="0.4", linestyle="--", linewidth=1, label=f"target {target:g}")
    axes.set_xlim(LOW - 2, HIGH + 2)
    # Room above for the legend; axes that share their height keep what another panel needs.
    peak = max(float(found.probs.max()) for found in heard.values())
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.4 * peak))
    axes.set_xticks([LOW, 25, 50, 75, HIGH], [f"{LOW}\n{scale.left}", "25", "50", "75",
                    f"{HIGH}\n{scale.right}"])  # fmt: skip
    axes.set_ylabel("probability")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return axes


def panels(count: int) -> "tuple[Figure, list[Axes]]":
    """Return a figure with `count` axes side by side that share the height of the y axis.

    Raises:
        UserError: count is below 1.
    """
    if count < 1:
        raise UserError(f"count must be at least 1, not {count}")
    figure = _figure(4.2 * count, 3.6)
    axes = figure.subplots(1, count, sharey=True, squeeze=False)
    return figure, list(axes[0])


def means_plot(
    true: ArrayLike, means: Mapping[str, ArrayLike], *, ax: "Axes | None" = None, title: str = ""
) -> "Axes":
    """Draw where listeners place clues against where the clues belong, one point per clue.

    Args:
        true: The true mean of every clue, or that of people, `[N]`.
        means: For each listener the mean of its distribution, `[N]`.
        ax: Where to draw. Defaults to a new figure, `result.figure`.
        title: Above the axes.

    Raises:
        UserError: the lengths differ.
        MissingDependencyError: matplotlib is not installed.
    """
    x = np.asarray(true, dtype=np.float64)
    axes = _axes(ax, 4.6, 4.4)
    axes.plot([LOW, HIGH], [LOW, HIGH], color="0.4", linestyle="--", linewidth=1)
    for i, (name, values) in enumerate(means.items()):
        y = np.asarray(values, dtype=np.float64)
        if y.shape != x.shape:
            raise UserError(f"{name!r} has the shape {list(y.shape)}, the true {list(x.shape)}")
        axes.plot(
            x,
            y,
            linestyle="none",
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=3,
            alpha=0.7,
            label=name,
        )
    axes.set_xlim(LOW, HIGH)
    axes.set_ylim(LOW, HIGH)
    axes.set_xlabel("true mean of the clue")
    axes.set_ylabel("mean of the listener")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return axes
