"""Figures: matplotlib without a screen, colours that colour-blind readers can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold_common.optional import require

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"path": "PaTH", "path_fox": "PaTH-FoX", "rope": "RoPE", "fox": "FoX", "nope": "NoPE"}
# Okabe and Ito's palette; marker and hatch tell the series apart without colour.
_STYLE = {
    "path": ("#0072B2", "o", ""),
    "path_fox": ("#56B4E9", "s", "//"),
    "rope": ("#D55E00", "^", "xx"),
    "fox": ("#E69F00", "v", ".."),
    "nope": ("#000000", "x", "\\\\"),
}


def _axes(width: float = 6.4, height: float = 4.0) -> "tuple[Figure, Axes]":
    """Return a figure on the Agg canvas and its axes; nothing global is touched."""
    require("matplotlib", extra="plot", package="path-attn")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: "Figure", path: Path) -> Path:
    """Write a PNG of 150 dots per inch and return its path."""
    figure.savefig(path, dpi=150)
    return path


def loss_by_position(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, train_length: int
) -> "Figure":
    """Draw loss against position, one line per position encoding.

    Args:
        curves: For each encoding the points (position in tokens, loss in nats).
        train_length: Marked by a vertical line.
    """
    figure, axes = _axes()
    for name, points in curves.items():
        colour, marker, _ = _STYLE[name]
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            color=colour,
            marker=marker,
            markersize=4,
            label=NAMES[name],
        )
    axes.axvline(train_length, color="0.5", linestyle="--", linewidth=1)
    axes.annotate(
        "training length", (train_length, 0.98), xycoords=("data", "axes fraction"), xytext=(4, 0),
        textcoords="offset points", va="top", fontsize=8, color="0.35",
    )  # fmt: skip
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def error_bars(
    errors: Mapping[str, Mapping[str, float]],
    *,
    spread: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    claim: float | None = None,
) -> "Figure":
    """Draw error rates: one group of bars per evaluation set, one bar per encoding.

    Args:
        errors: For each encoding the error in [0, 1] of each set; the sets in one order for all.
        spread: Lowest and highest error over the seeds, same keys.
        claim: An error in [0, 1] marked by a horizontal line.
    """
    figure, axes = _axes()
    sets = list(next(iter(errors.values())))
    width = 0.8 / len(errors)
    for i, (name, values) in enumerate(errors.items()):
        colour, _, hatch = _STYLE[name]
        places = [j - 0.4 + (i + 0.5) * width for j in range(len(sets))]
        heights = [100 * values[s] for s in sets]
        axes.bar(
            places, heights, width, color=colour, hatch=hatch, edgecolor="white", label=NAMES[name]
        )
        if spread:
            low = [100 * (values[s] - spread[name][s][0]) for s in sets]
            high = [100 * (spread[name][s][1] - values[s]) for s in sets]
            axes.errorbar(
                places, heights, [low, high], fmt="none", ecolor="black", capsize=2, linewidth=1
            )
        for place, height in zip(places, heights, strict=True):
            above = 7 if claim is not None and height < 200 * claim else 2  # clear of the line
            axes.annotate(
                _percent(height),
                (place, height),
                xytext=(0, above),
                textcoords="offset points",
                ha="center",
                fontsize=6,
            )
    if claim is not None:
        axes.axhline(
            100 * claim,
            color="0.3",
            linestyle="--",
            linewidth=1,
            label=f"claim: PaTH below {claim:.0%}",
        )
    axes.set_xticks(range(len(sets)), sets)
    axes.set_ylabel("error (% of scored tokens)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _percent(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f}" if value < 1 else f"{value:.0f}"


def attention_maps(
    maps: "Mapping[str, np.ndarray]", tokens: Sequence[str], *, caption: str = ""
) -> "Figure":
    """Draw attention weights side by side.

    Args:
        maps: For each title the weights `[T, T]`, rows are queries.
        tokens: The T tokens, for the axes.
        caption: Text above the maps.
    """
    require("matplotlib", extra="plot", package="path-attn")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(maps), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    image = None
    for i, (title, weights) in enumerate(maps.items()):
        axes = figure.add_subplot(1, len(maps), i + 1)
        image = axes.imshow(weights, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(tokens)), tokens, fontsize=5)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=5)
        axes.set_xlabel("key", fontsize=8)
        axes.set_ylabel("query", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=figure.axes, shrink=0.8, label="attention weight")
    if caption:
        figure.suptitle(caption, fontsize=9)
    return figure
