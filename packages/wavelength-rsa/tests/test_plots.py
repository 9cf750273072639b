import subprocess
import sys

import numpy as np
import pytest

from tenfold_common.errors import UserError
from wavelength_rsa import plots
from wavelength_rsa.scales import Distribution, Scale

SLOW = Scale("slow", "fast")


def words(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_error_curve():
    errors = {"direct": [18, 18.5, 18], "RSA": [18.0, 14.0, 11.0]}
    axes = plots.error_curve([1, 4, 32], errors, title="exact judge")
    assert words(axes) == ["direct", "RSA"]
    first, second = axes.get_lines()
    assert list(second.get_xdata()) == [1, 4, 32]
    assert list(second.get_ydata()) == errors["RSA"]
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "32"]
    assert axes.get_ylim()[0] == 0
    assert "points" in axes.get_ylabel()
    with pytest.raises(UserError, match="'RSA' has 2 errors for 3"):
        plots.error_curve([1, 2, 3], {"RSA": [1.0, 2.0]})


def test_distributions_with_the_target_marked():
    heard = {"L0": Distribution.from_samples([20, 30, 40]), "L1": Distribution.point(30)}
    axes = plots.distribution_plot(heard, SLOW, target=35, title="bicycle")
    assert words(axes) == ["L0 (mean 30)", "L1 (mean 30)", "target 35"]
    l0, l1, target = axes.get_lines()
    assert list(l0.get_ydata()) == list(heard["L0"].probs)
    assert list(l1.get_xdata()) == list(heard["L1"].grid)
    assert list(target.get_xdata()) == [35, 35]
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks[0] == "0\nslow"
    assert ticks[-1] == "100\nfast"
    assert len(plots.distribution_plot({"L0": heard["L0"]}, SLOW).get_lines()) == 1
    with pytest.raises(UserError, match="heard is empty"):
        plots.distribution_plot({}, SLOW)


def test_panels_and_saving(tmp_path):
    figure, axes = plots.panels(2)
    for ax in axes:
        assert plots.distribution_plot({"L0": Distribution.uniform()}, SLOW, ax=ax) is ax
    assert figure.axes == axes
    plots.distribution_plot({"L0": Distribution.point(30)}, SLOW, ax=axes[0])
    plots.distribution_plot({"L0": Distribution.uniform()}, SLOW, ax=axes[1])
    assert [ax.get_ylim() for ax in axes] == [(0, 1.4)] * 2  # nothing is cut off
    path = plots.save(figure, tmp_path / "two.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="does not exist"):
        plots.save(figure, tmp_path / "no" / "two.png")
    with pytest.raises(UserError, match="cannot write"):
        plots.save(figure, tmp_path / "two.xyz")
    with pytest.raises(UserError, match="at least 1, not 0"):
        plots.panels(0)


def test_means_against_true_means():
    true = np.linspace(5, 95, 10)
    axes = plots.means_plot(true, {"trained": true + 1, "50 steps": np.full(10, 50)})
    diagonal, trained, _ = axes.get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 100]
    assert list(trained.get_ydata()) == list(true + 1)
    assert words(axes) == ["trained", "50 steps"]
    with pytest.raises(UserError, match=r"'a' has the shape \[2\], the true \[10\]"):
        plots.means_plot(true, {"a": [1, 2]})


def test_pyplot_is_not_imported():
    code = (
        "import sys, wavelength_rsa.plots as p; assert 'matplotlib' not in sys.modules;"
        "p.means_plot([1], {'a': [2]}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
