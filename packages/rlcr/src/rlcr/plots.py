"""Figures: matplotlib without a screen, colours that colour-blind readers can tell apart."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from rlcr.metrics import UNINFORMATIVE_STD, auroc, check_inputs, reliability_bins, risk_coverage
from rlcr.metrics import aurc as area_under_risk
from rlcr.metrics import ece as calibration_error
from tenfold_common.errors import UserError
from tenfold_common.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from rlcr.scaling import VoteCurve

# Okabe and Ito's palette; markers tell the series apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _figure(width: float = 6.4, height: float = 4.0) -> "Figure":
    """Return a figure on the Agg canvas; nothing global is touched."""
    require("matplotlib", extra="plot", package="rlcr", purpose="figures")
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


def reliability_diagram(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    n_bins: int = 10,
    binning: str = "left",
    ax: "Axes | None" = None,
    label: str | None = None,
) -> "Axes":
    """Draw accuracy against stated confidence, with the share of answers in each bin below.

    Bars are the accuracy of each bin; points stand at the bin's mean confidence, with the Wilson
    95% interval of its accuracy; perfect confidences lie on the diagonal. Grey bars in an inset
    below are the share of the answers, with their number. The legend gives ECE, AUROC and
    accuracy, and marks ECE as uninformative when q hardly varies.

    Args:
        confidence: q, `[n]`.
        correct: c, `[n]`, 0 or 1.
        n_bins: Bins of equal width.
        binning: `"left"`, `"right"` or `"reference"`, see `rlcr.metrics.ece`.
        ax: Where to draw. Defaults to a new figure, `result.figure`.
        label: Name of the method.

    Raises:
        UserError: see `rlcr.metrics.check_inputs`.
        MissingDependencyError: matplotlib is not installed.
    """
    q, c = check_inputs(confidence, correct, soft=False)
    bins = reliability_bins(q, c, n_bins, binning)
    axes = _axes(ax, 4.6, 5.0)
    filled = bins.count > 0
    count = bins.count[filled]
    low, high = _wilson(bins.accuracy[filled], count)
    width = 1 / n_bins
    axes.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1, label="perfect")
    axes.bar(
        bins.lower[filled],
        bins.accuracy[filled],
        width,
        align="edge",
        color=COLOURS[5],
        edgecolor="white",
        alpha=0.6,
    )
    accuracy = bins.accuracy[filled]
    axes.errorbar(
        bins.confidence[filled],
        accuracy,
        [np.maximum(accuracy - low, 0), np.maximum(high - accuracy, 0)],
        fmt="o",
        color=COLOURS[0],
        markersize=4,
        capsize=2,
        linewidth=1,
        clip_on=False,
        label=_summary(q, c, n_bins, binning, label),
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy")
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    counts = axes.inset_axes((0.0, -0.3, 1.0, 0.25), sharex=axes)
    counts.bar(bins.lower, bins.count / len(q), width, align="edge", color="0.6", edgecolor="white")
    for place, number in zip(bins.lower[filled], count, strict=True):
        counts.annotate(
            f"{number}",
            (place + width / 2, number / len(q)),
            xytext=(0, 1),
            textcoords="offset points",
            ha="center",
            fontsize=6,
        )
    counts.spines[["top", "right"]].set_visible(False)
    counts.margins(y=0.25)
    counts.set_ylabel("share", fontsize=8)
    counts.set_xlabel("confidence q")
    return axes


def _summary(q: np.ndarray, c: np.ndarray, n_bins: int, binning: str, label: str | None) -> str:
    error = f"ECE {calibration_error(q, c, n_bins, binning):.3f}"
    if q.std() < UNINFORMATIVE_STD:
        error += "\n(uninformative: q hardly varies)"
    # Asked for only where it is defined, so that a figure needs no warning.
    area = f"{auroc(q, c):.3f}" if 0 < c.mean() < 1 else "undefined"
    lines = [error, f"AUROC {area}", f"accuracy {c.mean():.3f}"]
    return "\n".join(lines if label is None else [label, *lines])


def _wilson(rate: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's 95% interval of a rate."""
    z2 = 1.96**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (rate * (1 - rate) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return centre - half, centre + half


def reliability_diagrams(
    sets: Mapping[str, tuple[ArrayLike, ArrayLike]], *, n_bins: int = 10, binning: str = "left"
) -> "Figure":
    """Draw reliability diagrams side by side.

    Args:
        sets: For each name the pair (confidence, correct).
        n_bins: Bins of equal width.
        binning: See `rlcr.metrics.ece`.

    Raises:
        UserError: `sets` is empty; see `rlcr.metrics.check_inputs`.
    """
    if not sets:
        raise UserError("sets is empty; give at least one {name: (confidence, correct)}")
    figure = _figure(3.6 * len(sets), 4.6)
    figure.set_layout_engine("constrained", rect=(0, 0.02, 1, 0.98))  # the lowest label needs room
    for i, (name, (confidence, correct)) in enumerate(sets.items()):
        axes = figure.add_subplot(1, len(sets), i + 1)
        reliability_diagram(confidence, correct, n_bins=n_bins, binning=binning, ax=axes)
        axes.set_title(name, fontsize=10)
    return figure


def risk_coverage_plot(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    ax: "Axes | None" = None,
    label: str | None = None,
) -> "Axes":
    """Draw the error rate among the most confident answers against the share answered.

    Call it again with `ax` to compare methods; each call takes the next colour. The dotted line
    is the error rate when everything is answered.

    Raises:
        UserError: see `rlcr.metrics.check_inputs`.
        MissingDependencyError: matplotlib is not installed.
    """
    coverage, risk = risk_coverage(confidence, correct)
    axes = _axes(ax)
    colour = COLOURS[len(axes.get_lines()) // 2 % len(COLOURS)]
    area = f"AURC {area_under_risk(confidence, correct):.3f}"
    axes.plot(coverage, risk, color=colour, label=area if label is None else f"{label}: {area}")
    axes.axhline(float(risk[-1]), color=colour, linestyle=":", linewidth=1)
    axes.set_xlim(0, 1)
    axes.autoscale(axis="y")  # to every line on these axes, earlier ones included
    axes.set_ylim(bottom=0)
    axes.set_xlabel("coverage (share of answers kept, most confident first)")
    axes.set_ylabel("error rate among them")
    axes.legend(frameon=False, fontsize=8)
    return axes


def votes_plot(curve: "VoteCurve", *, ax: "Axes | None" = None) -> "Axes":
    """Draw accuracy against the number of samples, one line per way of voting.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    axes = _axes(ax)
    for i, (name, accuracy) in enumerate(curve.accuracy.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(curve.samples, accuracy, color=colour, marker=marker, markersize=4, label=name)
    axes.plot(
        curve.samples, curve.pass_at_n, color="0.6", linestyle=":", label="any right (pass@N)"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(curve.samples, [str(n) for n in curve.samples])
    axes.minorticks_off()
    axes.set_xlabel("number of samples N")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=8)
    return axes
