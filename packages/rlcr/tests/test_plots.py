import sys

import numpy as np
import pytest

from rlcr import plots
from rlcr.scaling import vote_curve
from tenfold_common.errors import UserError


def drawn(n=500, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.random(n).round(1)
    return q, (rng.random(n) < q**2).astype(int)


def words(axes):
    return " ".join(text.get_text() for text in axes.get_legend().get_texts())


def test_reliability_diagram_draws_bins_counts_and_numbers():
    q, c = drawn()
    axes = plots.reliability_diagram(q, c, label="RLCR")
    assert "RLCR" in words(axes)
    assert "ECE 0.1" in words(axes)
    assert "AUROC" in words(axes)
    heights = [bar.get_height() for bar in axes.patches]
    assert heights[0] == pytest.approx(c[q < 0.1].mean())
    assert heights[3] == pytest.approx(c[q == 0.3].mean())
    (counts,) = axes.child_axes
    shares = [bar.get_height() for bar in counts.patches]
    assert sum(shares) == pytest.approx(1)
    assert shares[3] == pytest.approx((q == 0.3).mean())
    assert str((q == 0.3).sum()) in [text.get_text() for text in counts.texts]


def test_empty_bins_constant_confidence_and_one_class_need_no_warning():
    axes = plots.reliability_diagram([0.7] * 10, [1] * 7 + [0] * 3)
    assert "uninformative" in words(axes)
    assert len(axes.patches) == 1
    assert "AUROC undefined" in words(plots.reliability_diagram([0.2, 0.4], [1, 1]))


def test_intervals_stay_inside_the_unit_interval():
    low, high = plots._wilson(np.array([0.0, 0.5, 1.0]), np.array([1, 100, 10]))
    assert (low >= -1e-12).all()
    assert (high <= 1 + 1e-12).all()
    assert low[1] == pytest.approx(0.4038, abs=1e-4)  # Wilson's interval of 50 of 100
    assert high[1] == pytest.approx(0.5962, abs=1e-4)


def test_side_by_side_and_saved(tmp_path):
    figure = plots.reliability_diagrams({"RLVR": drawn(), "RLCR": drawn(seed=1)})
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["RLVR", "RLCR"]
    path = plots.save(figure, tmp_path / "two.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="does not exist"):
        plots.save(figure, tmp_path / "no" / "two.png")
    with pytest.raises(UserError, match="cannot write"):
        plots.save(figure, tmp_path / "two.xyz")
    with pytest.raises(UserError, match="empty"):
        plots.reliability_diagrams({})


def test_risk_coverage_of_two_methods_on_one_axes():
    q, c = drawn()
    axes = plots.risk_coverage_plot(q, c, label="a")
    assert plots.risk_coverage_plot(1 - q, c, ax=axes, label="b") is axes
    first, _, second, _ = axes.get_lines()
    assert first.get_color() != second.get_color()
    assert first.get_ydata()[-1] == pytest.approx(1 - c.mean())
    assert "a: AURC" in words(axes)
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] >= max(line.get_ydata()[-1] for line in (first, second))
    assert axes.get_ylim()[1] >= max(second.get_ydata())


def test_votes_plot():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, (50, 8))
    curve = vote_curve(ids, rng.random((50, 8)), ids == 0, [1, 2, 4, 8])
    axes = plots.votes_plot(curve)
    assert [line.get_label() for line in axes.get_lines()] == [
        *curve.accuracy,
        "any right (pass@N)",
    ]
    assert list(axes.get_lines()[0].get_ydata()) == list(curve.accuracy["majority"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "8"]


def test_pyplot_is_not_imported():
    import subprocess

    code = (
        "import sys, rlcr.plots as p; assert 'matplotlib' not in sys.modules;"
        "p.reliability_diagram([.5], [1]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
