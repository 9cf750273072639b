"""What the package offers by name, with which signatures, and what importing it costs."""

import importlib.util
import inspect
from importlib.metadata import version

import pytest

import rlcr
from tenfold_common.testing import (
    assert_documented,
    defaults,
    import_time,
    imported_by,
    in_fresh_python,
    positional,
)

NAMES = {
    "CalibrationReport",
    "CalibrationWarning",
    "Isotonic",
    "LinearProbe",
    "NoisySensor",
    "ParsedCompletion",
    "Platt",
    "RLCRConfig",
    "RLCRReward",
    "RLCRTrainer",
    "ScoringRule",
    "SequenceClassifier",
    "Temperature",
    "Verifier",
    "__version__",
    "aggregate",
    "answer_probability",
    "calibration_report",
    "ensemble_analyses",
    "evaluate",
    "get_verifier",
    "parse_completion",
    "read_predictions",
    "reliability_diagram",
    "render_completion",
    "risk_coverage_plot",
    "scoring_rule",
    "sft_warmup",
}
HEAVY = (
    "torch", "transformers", "trl", "datasets", "numpy", "accelerate", "sklearn", "matplotlib",
    "yaml", "pyarrow", "math_verify", "vllm", "peft",
)  # fmt: skip


def test_all_is_the_promised_list():
    assert set(rlcr.__all__) == NAMES
    assert sorted(rlcr.__all__) == list(rlcr.__all__)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_resolves(name):
    assert getattr(rlcr, name) is not None
    assert name in dir(rlcr)


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_public_name_has_a_docstring(name):
    assert_documented(getattr(rlcr, name))


def test_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="RLCRReword"):
        rlcr.RLCRReword  # noqa: B018


def test_version_is_the_distribution_s():
    assert rlcr.__version__ == version("rlcr")


def test_evaluate_is_the_function_whatever_was_imported_before():
    code = (
        "import rlcr.evaluation, rlcr.toy, rlcr.rewards, rlcr; from rlcr import evaluate; "
        "print(rlcr.evaluate is rlcr.evaluation.evaluate is evaluate, type(evaluate).__name__)"
    )
    assert in_fresh_python(code) == "True function"


def test_no_public_name_is_also_a_module():
    """A module of the same name would take its place once it has been imported."""
    for name in NAMES - {"__version__"}:
        assert importlib.util.find_spec(f"rlcr.{name}") is None


def test_evaluate_signature():
    assert positional(rlcr.evaluate) == ["model", "rows", "out"]
    assert defaults(rlcr.evaluate) == {
        "format": "tabc",
        "samples": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 1536,
        "seed": 0,
        "force": True,
        "verifier": None,
        "gold_column": "answer",
        "batch_size": 64,
        "resume": False,
        "metadata": None,
    }


def test_parse_completion_signature():
    assert positional(rlcr.parse_completion) == ["text", "format", "mode"]
    assert defaults(rlcr.parse_completion) == {"format": "tabc", "mode": "strict"}


def test_calibration_report_signature():
    assert positional(rlcr.calibration_report) == ["confidence", "correct"]
    assert defaults(rlcr.calibration_report) == {
        "n_bins": 10,
        "binning": "left",
        "ci": 0.95,
        "n_boot": 1000,
        "seed": 0,
        "scale": 1.0,
    }


def test_reward_signature():
    expected = {
        "verifier": "auto",
        "rule": "brier",
        "correctness_weight": 1.0,
        "calibration_weight": 1.0,
        "format_weight": 1.0,
        "format": "tabc",
        "gold_column": "answer",
        "verifier_column": None,
        "method": "rlcr",
    }
    assert expected.items() <= defaults(rlcr.RLCRReward).items()


def test_other_signatures():
    assert positional(rlcr.aggregate)[:3] == ["answers", "confidences", "method"]
    assert defaults(rlcr.aggregate)["method"] == "majority"
    assert defaults(rlcr.read_predictions) == {
        "confidence": "confidence",
        "correct": "correct",
        "source": "source",
        "weight": None,
        "scale": 1.0,
    }
    assert positional(rlcr.reliability_diagram) == ["confidence", "correct"]
    assert positional(rlcr.risk_coverage_plot) == ["confidence", "correct"]
    assert positional(rlcr.get_verifier) == ["spec"]
    assert {"rule", "method", "calibration_weight"} <= set(rlcr.RLCRConfig.__dataclass_fields__)


def test_no_function_swallows_unknown_names():
    """Only what hands everything on to a rule or a config takes arguments by any name."""
    for name in NAMES - {"__version__", "CalibrationWarning"}:
        value = getattr(rlcr, name)
        kinds = {p.kind for p in inspect.signature(value).parameters.values()}
        if inspect.Parameter.VAR_KEYWORD in kinds:
            assert name in ("scoring_rule", "sft_warmup", "RLCRTrainer"), name


def test_importing_the_package_pulls_in_nothing_heavy():
    assert imported_by("import rlcr", HEAVY) == []


def test_importing_the_package_takes_under_50_ms():
    assert import_time("rlcr") < 0.05


def test_metrics_votes_and_rewards_need_no_torch():
    code = (
        "import rlcr; rlcr.calibration_report([0.9, 0.1], [1, 0], ci=None); "
        "rlcr.aggregate(['a', 'b'], [0.5, 0.6]); rlcr.RLCRReward(verifier='exact_match'); "
        "rlcr.parse_completion('x'); rlcr.read_predictions; rlcr.evaluate"
    )
    heavy = ("torch", "transformers", "trl", "datasets", "sklearn", "matplotlib", "math_verify")
    assert imported_by(code, heavy) == []


def test_modules_are_importable_by_their_documented_names():
    for module in ("data", "prompts", "metrics", "scaling", "predictions", "evaluation", "toy"):
        assert importlib.import_module(f"rlcr.{module}").__doc__
