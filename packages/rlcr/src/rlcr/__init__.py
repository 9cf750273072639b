"""RL with calibration rewards (arXiv 2507.16806): models that say how sure they are and mean it.

Names are loaded on first use, so importing the package costs no time and pulls in neither torch
nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from rlcr._version import __version__

if TYPE_CHECKING:
    from rlcr.baselines import LinearProbe, SequenceClassifier, answer_probability
    from rlcr.config import RLCRConfig
    from rlcr.evaluation import evaluate
    from rlcr.metrics import CalibrationReport, calibration_report
    from rlcr.monitor import CalibrationWarning
    from rlcr.parsing import ParsedCompletion, parse_completion, render_completion
    from rlcr.plots import reliability_diagram, risk_coverage_plot
    from rlcr.predictions import read_predictions
    from rlcr.recalibration import Isotonic, Platt, Temperature
    from rlcr.rewards import RLCRReward
    from rlcr.scaling import aggregate, ensemble_analyses
    from rlcr.scoring import ScoringRule, scoring_rule
    from rlcr.toy import NoisySensor
    from rlcr.trainer import RLCRTrainer, sft_warmup
    from rlcr.verify import Verifier, get_verifier

_MODULES = {
    "baselines": "LinearProbe SequenceClassifier answer_probability",
    "config": "RLCRConfig",
    "evaluation": "evaluate",
    "metrics": "CalibrationReport calibration_report",
    "monitor": "CalibrationWarning",
    "parsing": "ParsedCompletion parse_completion render_completion",
    "plots": "reliability_diagram risk_coverage_plot",
    "predictions": "read_predictions",
    "recalibration": "Isotonic Platt Temperature",
    "rewards": "RLCRReward",
    "scaling": "aggregate ensemble_analyses",
    "scoring": "ScoringRule scoring_rule",
    "toy": "NoisySensor",
    "trainer": "RLCRTrainer sft_warmup",
    "verify": "Verifier get_verifier",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
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
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rlcr' has no attribute {name!r}")
    return getattr(import_module(f"rlcr.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
