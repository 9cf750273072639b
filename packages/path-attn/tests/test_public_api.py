"""What the package offers by name, with which signatures, and what importing it costs."""

import importlib
import inspect
from importlib.metadata import version

import pytest

import path_attn
from tenfold_common.testing import (
    assert_documented,
    defaults,
    import_time,
    imported_by,
    positional,
)

NAMES = {
    "PaTHAttention",
    "PaTHConfig",
    "PaTHForCausalLM",
    "PaTHKVCache",
    "PaTHModel",
    "__version__",
    "convert_rope_model",
    "global_path_attention",
    "naive_path_attention",
    "parallel_path_attn",
    "path_attention",
    "path_attention_decode",
}
TENSORS = ["q", "k", "v", "w", "beta", "g"]


def test_all_is_the_promised_list():
    assert set(path_attn.__all__) == NAMES
    assert sorted(path_attn.__all__) == list(path_attn.__all__)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_resolves(name):
    assert getattr(path_attn, name) is not None
    assert name in dir(path_attn)


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_public_name_has_a_docstring(name):
    assert_documented(getattr(path_attn, name))


def test_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="path_attentoin"):
        path_attn.path_attentoin  # noqa: B018


def test_version_is_the_distribution_s():
    assert path_attn.__version__ == version("path-attn")


def test_path_attention_signature():
    parameters = inspect.signature(path_attn.path_attention).parameters
    assert positional(path_attn.path_attention) == TENSORS
    expected = {
        "g": None,
        "scale": None,
        "gate_scale": "paper",
        "cu_seqlens": None,
        "attention_mask": None,
        "window": None,
        "softcap": None,
        "cache": None,
        "return_cache": False,
        "backend": "auto",
        "block_size": 64,
        "max_beta": None,
    }
    assert expected.items() <= defaults(path_attn.path_attention).items()
    assert not [p for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def test_parallel_path_attn_has_flash_linear_attention_s_signature():
    parameters = inspect.signature(path_attn.parallel_path_attn).parameters
    assert list(parameters) == [*TENSORS, "scale", "cu_seqlens", "use_cache"]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert defaults(path_attn.parallel_path_attn) == {
        "g": None,
        "scale": None,
        "cu_seqlens": None,
        "use_cache": False,
    }


def test_decode_needs_a_cache_by_name():
    parameters = inspect.signature(path_attn.path_attention_decode).parameters
    assert list(parameters)[:6] == TENSORS
    assert parameters["cache"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["cache"].default is inspect.Parameter.empty


@pytest.mark.parametrize("name", ["naive_path_attention", "global_path_attention"])
def test_reference_signatures(name):
    function = getattr(path_attn, name)
    assert list(inspect.signature(function).parameters)[:6] == TENSORS
    assert defaults(function) == {
        "g": None,
        "scale": None,
        "gate_scale": "paper",
        "window": None,
        "softcap": None,
    }


def test_cache_methods():
    for name in ("crop", "reorder", "repeat"):
        assert callable(getattr(path_attn.PaTHKVCache, name))
    cache = path_attn.PaTHKVCache()
    assert (cache.length, cache.batch, cache.nbytes) == (0, 0, 0)


def test_importing_the_package_pulls_in_nothing_heavy():
    heavy = ("torch", "transformers", "triton", "numpy", "accelerate", "matplotlib", "datasets")
    assert imported_by("import path_attn", heavy) == []


def test_importing_the_package_takes_under_50_ms():
    assert import_time("path_attn") < 0.05


def test_importing_the_operation_pulls_in_neither_transformers_nor_triton():
    code = "import path_attn; path_attn.path_attention; path_attn.PaTHKVCache"
    assert imported_by(code, ("transformers", "triton", "accelerate")) == []


def test_backend_modules_are_importable_by_their_documented_names():
    for module in ("reference", "ops", "cache", "blockwise"):
        assert importlib.import_module(f"path_attn.{module}").__doc__
