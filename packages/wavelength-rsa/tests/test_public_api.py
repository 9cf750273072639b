"""What the package offers by name, with which signatures, and what importing it costs."""

import importlib.util
import inspect
from importlib import import_module
from importlib.metadata import version

import pytest

import wavelength_rsa
from tenfold_common.testing import (
    assert_documented,
    defaults,
    import_time,
    imported_by,
    positional,
)

NAMES = {
    "RSA",
    "CachedModel",
    "Distribution",
    "Item",
    "Listener",
    "LogprobListener",
    "PragmaticReranker",
    "RSAListener",
    "RSASpeaker",
    "Report",
    "Rules",
    "SamplingListener",
    "SamplingSpeaker",
    "Scale",
    "Speaker",
    "TableListener",
    "WavelengthPrompts",
    "__version__",
    "check_clue",
    "compare",
    "evaluate_listener",
    "evaluate_speaker",
    "fit_rsa",
    "grid",
    "human_baseline",
    "load_items",
    "pragmatic_rerank",
    "prompts_for",
    "save_items",
}
HEAVY = (
    "torch", "transformers", "numpy", "scipy", "jinja2", "sqlite3", "matplotlib", "vllm", "pandas",
)  # fmt: skip
MODULES = (
    "cache", "cli", "data", "demo", "evaluate", "experiment", "fitting", "human", "listeners",
    "metrics", "parsing", "play", "plots", "prompts", "reference", "rerank", "rsa", "rules",
    "scales", "speakers", "toy",
)  # fmt: skip


def test_all_is_the_promised_list():
    assert set(wavelength_rsa.__all__) == NAMES
    assert len(wavelength_rsa.__all__) == len(NAMES)
    assert dir(wavelength_rsa) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_resolves(name):
    assert getattr(wavelength_rsa, name) is not None


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_public_name_has_a_docstring(name):
    assert_documented(getattr(wavelength_rsa, name))


def test_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="RSASpeeker"):
        wavelength_rsa.RSASpeeker  # noqa: B018


def test_version_is_the_distribution_s():
    assert wavelength_rsa.__version__ == version("wavelength-rsa")


def test_no_public_name_is_also_a_module():
    """A module of the same name would take its place once it has been imported."""
    for name in NAMES - {"__version__"}:
        assert importlib.util.find_spec(f"wavelength_rsa.{name}") is None


def test_listener_signatures():
    assert positional(wavelength_rsa.LogprobListener) == ["model", "prompts"]
    assert defaults(wavelength_rsa.LogprobListener) == {
        "prompts": None,
        "step": 5,
        "normalize": "none",
        "temperature": 1.0,
        "end": None,
    }
    assert positional(wavelength_rsa.SamplingListener) == ["model", "prompts"]
    assert defaults(wavelength_rsa.SamplingListener) == {
        "prompts": None,
        "step": 5,
        "num_samples": 32,
        "cot": False,
        "temperature": 1.0,
        "smoothing": None,
        "max_tokens": None,
        "max_retries": 10,
    }
    assert positional(wavelength_rsa.TableListener) == ["table"]
    assert defaults(wavelength_rsa.TableListener) == {"step": 5, "default": None, "name": "table"}
    assert positional(wavelength_rsa.Listener.listen) == ["self", "questions"]
    assert positional(wavelength_rsa.Listener.distribution) == ["self", "scale", "clues"]
    assert positional(wavelength_rsa.RSAListener)[0] == "listener"
    expected = {"alpha": 1.0, "depth": 1, "null": True, "state_prior": None}
    assert expected.items() <= defaults(wavelength_rsa.RSAListener).items()


def test_speaker_signatures():
    assert positional(wavelength_rsa.SamplingSpeaker) == ["model", "prompts"]
    expected = {
        "prompts": None,
        "num_candidates": 32,
        "cot": False,
        "temperature": 1.0,
        "max_tokens": None,
        "on_violation": "keep",
    }
    assert expected.items() <= defaults(wavelength_rsa.SamplingSpeaker).items()
    assert positional(wavelength_rsa.RSASpeaker) == ["speaker", "listener"]
    assert defaults(wavelength_rsa.RSASpeaker) == {
        "alpha": 1.0,
        "prior_weight": 1.0,
        "cost": None,
        "utility": "log_prob",
        "tau": 10.0,
        "select": "sample",
    }
    assert positional(wavelength_rsa.Speaker.propose) == ["self", "tasks"]
    assert positional(wavelength_rsa.Speaker.speak) == ["self", "scale", "target"]


def test_rsa_signatures():
    assert defaults(wavelength_rsa.RSA) == {
        "alpha": 1.0,
        "depth": 1,
        "cost": None,
        "state_prior": None,
        "utterance_prior": None,
        "prior_weight": 1.0,
        "null": "uniform",
        "utility": "log_prob",
        "positions": None,
        "tau": 1.0,
    }
    assert positional(wavelength_rsa.fit_rsa) == ["log_l0s", "heard", "human", "groups"]
    assert {"folds": 10, "seed": 0}.items() <= defaults(wavelength_rsa.fit_rsa).items()
    assert positional(wavelength_rsa.pragmatic_rerank)[:3] == ["candidates", "states", "target"]
    assert positional(wavelength_rsa.PragmaticReranker)[0] == "score"


def test_data_and_evaluation_signatures():
    assert positional(wavelength_rsa.Item) == ["scale", "clue", "target", "responses", "id"]
    assert positional(wavelength_rsa.load_items) == ["path"]
    assert positional(wavelength_rsa.save_items) == ["items", "path"]
    assert positional(wavelength_rsa.evaluate_listener) == ["listener", "items"]
    assert positional(wavelength_rsa.evaluate_speaker) == ["speaker", "items"]
    judge = inspect.signature(wavelength_rsa.evaluate_speaker).parameters["judge"]
    assert judge.default is judge.empty  # who judges is never left to a default
    for function in (wavelength_rsa.evaluate_listener, wavelength_rsa.evaluate_speaker):
        assert defaults(function) == {"seed": 0, "resamples": 10_000}
    assert positional(wavelength_rsa.compare) == ["first", "second"]
    assert positional(wavelength_rsa.CachedModel) == ["model", "path"]
    assert defaults(wavelength_rsa.CachedModel) == {"identity": None}
    assert defaults(wavelength_rsa.human_baseline) == {"step": 5, "seed": 0, "resamples": 10_000}
    assert defaults(wavelength_rsa.grid) == {"step": 5}


def test_no_function_swallows_unknown_names():
    for name in NAMES - {"__version__"}:
        kinds = {
            p.kind for p in inspect.signature(getattr(wavelength_rsa, name)).parameters.values()
        }
        assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_importing_the_package_pulls_in_nothing_heavy():
    assert imported_by("import wavelength_rsa", HEAVY) == []


def test_importing_the_package_takes_under_50_ms():
    assert import_time("wavelength_rsa") < 0.05


def test_no_module_imports_torch_or_transformers():
    """Not even all of them: what needs torch asks for it when it is called."""
    code = (
        "from importlib import import_module; "
        f"[import_module('wavelength_rsa.' + m) for m in {MODULES}]"
    )
    assert imported_by(code, ("torch", "transformers", "matplotlib", "vllm")) == []


def test_scales_rules_data_and_tables_need_no_torch():
    code = (
        "from wavelength_rsa import *; s = Scale('Cold', 'Hot'); check_clue('tea', s); "
        "t = TableListener({}, default='uniform'); t.distribution(s, 'tea').mean; "
        "evaluate_listener(t, [Item(s, 'tea', 50)], resamples=5).to_json(); "
        "Distribution.from_samples([5.0]).crps(5); WavelengthPrompts().listener(s, 'tea')"
    )
    assert imported_by(code, ("torch", "transformers")) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    found = import_module(f"wavelength_rsa.{module}")
    assert found.__doc__
    assert len(found.__doc__.splitlines()[0]) > 20


def test_it_is_typed():
    from pathlib import Path

    assert (Path(wavelength_rsa.__file__).parent / "py.typed").is_file()
