"""What the package offers by name, with which signatures, and what importing it costs."""

import inspect
from importlib.metadata import version

import pytest

import flashformer as ff
from tenfold_common.testing import (
    assert_documented,
    defaults,
    import_time,
    imported_by,
    positional,
)

NAMES = {
    "CompilerError", "Explanation", "FlashModel", "KVCache", "Matrix", "ModelSpec", "Plan",
    "PlanError", "Support", "Verification", "__version__", "bench", "compile", "explain",
    "from_pretrained", "load", "quantize", "supported", "verify",
}  # fmt: skip


def test_all_is_the_promised_list():
    assert set(ff.__all__) == NAMES
    assert sorted(ff.__all__) == list(ff.__all__)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_resolves(name):
    assert getattr(ff, name) is not None
    assert name in dir(ff)


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_public_name_has_a_docstring(name):
    assert_documented(getattr(ff, name))


def test_a_function_that_bears_its_module_s_name_is_the_function():

    assert callable(ff.quantize)
    assert callable(ff.verify)
    assert callable(ff.compile)


def test_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="compiel"):
        ff.compiel  # noqa: B018


def test_version_is_the_distribution_s():
    assert ff.__version__ == version("flashformer")


def test_compile_signature():
    assert positional(ff.compile) == ["model"]
    assert defaults(ff.compile) == {
        "weights": None,
        "group_size": 128,
        "symmetric": True,
        "head": None,
        "cache": None,
        "max_len": None,
        "threads": None,
        "backend": "auto",
    }


def test_generate_has_the_signature_of_transformers():
    from transformers import GenerationMixin

    theirs = list(inspect.signature(GenerationMixin.generate).parameters)
    ours = inspect.signature(ff.FlashModel.generate).parameters
    shared = ["generation_config", "logits_processor", "stopping_criteria", "streamer"]
    assert [name for name in theirs if name in shared] == shared
    assert positional(ff.FlashModel.generate) == ["self", "input_ids", *shared]
    assert theirs[1] == "inputs"  # which has another name, and the same place
    assert ours["past_key_values"].kind is inspect.Parameter.KEYWORD_ONLY
    assert ours["seed"].default is None


def test_other_signatures():
    assert positional(ff.FlashModel.decode) == ["self", "cache", "token"]
    assert defaults(ff.FlashModel.decode) == {"temperature": None, "seed": 0, "ends": ()}
    assert positional(ff.FlashModel.step) == ["self", "token", "cache"]
    assert positional(ff.load) == ["folder"]
    assert positional(ff.verify) == ["model", "reference"]
    assert positional(ff.explain) == ["spec"]
    assert positional(ff.supported) == ["config"]
    assert positional(ff.KVCache) == ["spec", "max_len"]
    assert defaults(ff.quantize) == {"group": 128, "symmetric": True, "name": "weight"}


def test_errors_are_of_the_family():
    from tenfold_common import TenfoldError

    assert issubclass(ff.PlanError, TenfoldError)
    assert issubclass(ff.CompilerError, TenfoldError)
    assert issubclass(ff.CompilerError, RuntimeError)


def test_importing_the_package_pulls_in_nothing_heavy():
    heavy = ("torch", "transformers", "triton", "numpy", "safetensors", "matplotlib", "ctypes.util")
    assert imported_by("import flashformer", heavy) == []


def test_importing_the_package_takes_under_50_ms():
    assert import_time("flashformer") < 0.05


def test_planning_and_explaining_need_no_torch():
    code = "import flashformer as ff; ff.Plan; ff.explain; ff.ModelSpec; ff.supported"
    assert imported_by(code, ("torch", "transformers", "numpy")) == []
