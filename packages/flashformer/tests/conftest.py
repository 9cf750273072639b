"""Same conditions for every test, and tiny random models of every kind."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch
from checkpoint_files import write

from tenfold_common.seed import seed_everything
from tenfold_common.testing import no_network, poisoned_empty, real_data_folder

torch.set_num_threads(1)
hypothesis.settings.register_profile("house", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _same_conditions() -> Iterator[None]:
    """Seed everything, refuse connections to other machines, fill torch.empty with NaN."""
    seed_everything(0)
    with no_network(allow_loopback=True), poisoned_empty():
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real data, or skip the test."""
    return real_data_folder(__file__)


# Odd on purpose: no size is a multiple of 16, heads are 12 wide, and eps is large enough to matter.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
THETA = {"rope_theta": 1000.0}
LONG = {"short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0], "long_factor": [2.0, 3, 4, 5, 6, 7.0]}
WINDOWED = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7}
# name: (class, other fields than SIZES)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-wide-heads": ("Llama", {"head_dim": 20}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-no-groups": ("Llama", {"num_key_value_heads": 4}),
    "llama-groups-of-7": ("Llama", {"hidden_size": 56, "num_attention_heads": 14}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, **WINDOWED}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 12}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "smollm3-window": (
        "SmolLM3",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, **WINDOWED},
    ),
    "phi3": ("Phi3", {}),
    "phi3-partial": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}},
    ),
    "rope-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}}),
    "rope-llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                **THETA,
            }
        },
    ),
    "rope-yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                **THETA,
            }
        },
    ),
    "rope-dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA},
            "max_position_embeddings": 16,
        },
    ),
    "rope-longrope": (
        "Phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 16,
                **LONG,
                **THETA,
            },
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 64,
        },
    ),
}
# Frequencies depend on the length so far: compared token by token.
LENGTH_DEPENDENT = ("rope-dynamic", "rope-longrope")


def make_config(kind: str = "llama", **changes: Any) -> Any:
    """Return the config of a kind, with some fields changed."""
    import transformers

    name, fields = KINDS[kind]
    return getattr(transformers, f"{name}Config")(**{**SIZES, **copy.deepcopy(fields), **changes})


def make_model(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """Return a model in float32 with weights that all matter: no bias is 0 and no norm is 1."""
    import transformers

    config = make_config(kind, **changes)
    model = getattr(transformers, f"{KINDS[kind][0]}ForCausalLM")(config).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = torch.randn(weight.shape, generator=noise)
            if weight.ndim == 2:
                value = value if "embed" in name else value * 1.5 * weight.shape[1] ** -0.5
            elif "norm" in name:
                value = 1 + 0.3 * value
            weight.copy_(value)
    return model


def their_logits(model: Any, tokens: list[int], *, one_by_one: bool = False) -> torch.Tensor:
    """Return the logits of a transformers model after every token, `[n, V]`."""
    from transformers import DynamicCache

    ids = torch.tensor([tokens])
    with torch.inference_mode():
        if not one_by_one:
            return model(ids, use_cache=False).logits[0]
        cache = DynamicCache()
        rows = [model(t[None, None], past_key_values=cache).logits[0, 0] for t in ids[0]]
    return torch.stack(rows)


def some_tokens(count: int, vocab: int = 97, seed: int = 5) -> list[int]:
    """Return tokens that look random."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (count,), generator=noise).tolist()


class Kit:
    """The helpers above, for tests."""

    KINDS, LENGTH_DEPENDENT, SIZES = KINDS, LENGTH_DEPENDENT, SIZES
    config = staticmethod(make_config)
    model = staticmethod(make_model)
    logits = staticmethod(their_logits)
    tokens = staticmethod(some_tokens)

    @staticmethod
    def weights(
        model: Any, format: str = "fp32", *, group: int = 32, head: str | None = None,
        symmetric: bool = True, positions: int = 128,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Return a model's spec and its weights in a format."""
        from flashformer.config import ModelSpec
        from flashformer.quant import default_head
        from flashformer.weights import read_weights, rotary_tables

        spec = ModelSpec.from_config(model.config)
        found = read_weights(
            spec, model.state_dict(), rotary_tables(model, positions), format=format, group=group,
            head=head or default_head(format), symmetric=symmetric,
        )  # fmt: skip
        return spec, found

    @staticmethod
    def fed(
        backend: Any, tokens: list[int], *, max_len: int = 128, threads: int = 1
    ) -> torch.Tensor:
        """Return a back-end's logits after every token, `[n, V]`, read in one call."""
        from flashformer.cache import KVCache

        cache = KVCache(backend.plan.spec, max_len, format=backend.cache_format)
        out = torch.empty(len(tokens), backend.plan.spec.vocab)
        backend.decode(
            cache.keys, cache.values, torch.tensor(tokens), position=0, new=0, logits=out,
            threads=threads,
        )  # fmt: skip
        return out


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    """Tiny models, their logits, their weights."""
    return Kit


# Checkpoints, see checkpoint_files.py


@pytest.fixture(scope="module")
def written(tmp_path_factory, kit):
    """Checkpoints by case, written once; not to be changed."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = write(tmp_path_factory.mktemp("checkpoints") / case, kit, case)
        return made[case]

    return get


@pytest.fixture
def fresh(tmp_path, kit):
    """Write a checkpoint that may be spoilt; by default with one layer."""

    def get(case, **changes):
        return write(tmp_path / case, kit, case, **{"num_hidden_layers": 1, **changes})

    return get


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Put a folder into the hub's cache under a name; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put_there(folder, name):
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs/main").write_text("a" * 40)
        (home / "snapshots").mkdir()
        (home / "snapshots" / ("a" * 40)).symlink_to(folder)

    return put_there


@pytest.fixture
def plain(kit, tmp_path):
    """An unquantised checkpoint and its model."""
    model = kit.model("qwen2")
    model.save_pretrained(tmp_path / "plain")
    return SimpleNamespace(
        folder=tmp_path / "plain", model=model,
        config=json.loads((tmp_path / "plain/config.json").read_text()),
    )  # fmt: skip
