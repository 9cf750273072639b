"""What decodes a sequence, for timing in turns: ours, and others with the same weights."""

import ctypes
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashformer.cache import KVCache
from flashformer.config import ModelSpec
from flashformer.model import BURST, FlashModel
from tenfold_common.errors import UserError
from tenfold_common.optional import require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel

OURS = "flashformer"
EAGER, STATIC, LLAMA = "transformers eager", "StaticCache + torch.compile", "llama.cpp"
GGUF_TYPES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


class Runner(ABC):
    """Decodes one sequence greedily from a place that can be returned to.

    Attributes:
        name: Of the implementation.
        format: Of its weights, one of `quant.FORMATS`.
        weights: Bytes of weights that a token reads.
        cache_item: Bytes of a number in its cache.
    """

    name: str
    format: str
    weights: int
    cache_item: int
    spec: ModelSpec

    @abstractmethod
    def start(self, prompt: "Tensor", cache: "Cache | None" = None) -> None:
        """Read a prompt `[n]` int64; `cache` of transformers holds it already, if it is given."""

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget the positions from `length` on."""

    @abstractmethod
    def step(self, token: int) -> Any:
        """Read a token and return the logits of the next, `[V]`, tensor or array."""

    def decode(self, token: int, steps: int) -> list[int]:
        """Read a token, choose the next, and so on."""
        found = []
        for _ in range(steps):
            token = int(self.step(token).argmax())
            found.append(token)
        return found

    def seconds(self, token: int, length: int, steps: int) -> float:
        """Return the seconds of decoding `steps` tokens from position `length` on."""
        self.rewind(length)
        start = time.perf_counter()
        self.decode(token, steps)
        return time.perf_counter() - start

    def logits(self, tokens: list[int]) -> "Tensor":
        """Return the logits `[V]` float32 after tokens that are read one by one from nothing."""
        import torch

        self.rewind(0)
        found = None
        for token in tokens:
            found = self.step(token)
        return torch.as_tensor(found).float().clone()

    def bytes(self, length: int) -> int:
        """Return the bytes that a token at position `length` reads."""
        spec = self.spec
        seen = sum(length + 1 if w is None else min(length + 1, w) for w in spec.windows)
        return self.weights + 2 * seen * spec.kv_heads * spec.head_dim * self.cache_item

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Free what it holds."""


class Flash(Runner):
    """A compiled model.

    Args:
        model: It.
        threads: Always so many. Defaults to the model's own choice, which is what users get.
        burst: Tokens of one native call.
    """

    def __init__(
        self, model: FlashModel, *, threads: int | None = None, burst: int = BURST
    ) -> None:
        self.name, self.model, self.threads, self.burst = OURS, model, threads, burst
        self.format, self.spec, self.weights = model.weights, model.spec, model.backend.streamed
        self.cache_item = 4 if model.backend.cache_format == "fp32" else 2
        self.cache = model.new_cache()

    @property
    def settled(self) -> bool:
        """Whether it is known how many threads are best, and none is being tried."""
        return self.threads is not None or self.model._threads.most is None

    def start(self, prompt: "Tensor", cache: "Cache | None" = None) -> None:  # noqa: D102
        if cache is None:
            self.cache.crop(0)
            self.model.prefill(prompt, self.cache)
            return
        self.cache = KVCache.from_transformers(
            cache, self.spec, self.model.max_len, format=self.model.backend.cache_format
        )

    def rewind(self, length: int) -> None:  # noqa: D102
        self.cache.crop(length)

    def step(self, token: int) -> Any:  # noqa: D102
        return self.model.step(token, self.cache)[0]

    def decode(self, token: int, steps: int) -> list[int]:  # noqa: D102
        found: list[int] = []
        self.model._threads.fixed, before = self.threads, self.model._threads.fixed
        try:
            while len(found) < steps:
                size = min(self.burst, steps - len(found))
                found += self.model.decode(self.cache, token, steps=size).tolist()
                token = found[-1]
        finally:
            self.model._threads.fixed = before
        return found


class _Torch(Runner):
    """A transformers model, which must not need gradients."""

    def __init__(self, network: "PreTrainedModel") -> None:
        import torch

        self.network: Any = network
        self.spec = ModelSpec.from_config(network.config)
        self.format = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(
            network.dtype, str(network.dtype).removeprefix("torch.")
        )
        self.cache_item = network.dtype.itemsize
        unread: Any = None if self.spec.tied else network.get_input_embeddings().weight
        self.weights = sum(p.nbytes for p in network.parameters() if p is not unread)
        self.cache: Any = None

    def _call(self, call: Any, token: int) -> "Tensor":
        import torch

        with torch.no_grad():
            out = call(
                input_ids=torch.tensor([[token]]),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[0, -1]

    def _read(self, prompt: "Tensor", cache: "Cache | None", into: Any) -> None:
        """Fill an empty cache with a prompt."""
        import torch

        if cache is None:
            with torch.no_grad():
                self.network(
                    input_ids=prompt[None], past_key_values=into, use_cache=True, logits_to_keep=1
                )
            return
        layers: Any = cache.layers
        for number, layer in enumerate(layers):
            into.update(*(t.to(self.network.dtype) for t in (layer.keys, layer.values)), number)


class Eager(_Torch):
    """The model's own forward with a `DynamicCache`, as `generate` runs it."""

    name = EAGER

    def start(self, prompt: "Tensor", cache: "Cache | None" = None) -> None:  # noqa: D102
        self.rewind(0)
        self._read(prompt, cache, self.cache)

    def rewind(self, length: int) -> None:  # noqa: D102
        from transformers import DynamicCache

        if not length:
            self.cache = DynamicCache()
        elif length < self.cache.get_seq_length():
            self.cache.crop(length - self.cache.get_seq_length())  # negative: so many fewer

    def step(self, token: int) -> Any:  # noqa: D102
        return self._call(self.network, token)


class Static(_Torch):
    """The forward compiled once for one token, with a `StaticCache`; recompiling is an error.

    Args:
        network: The model.
        room: Positions of the cache, all of which are read for every token.
    """

    name = STATIC

    def __init__(self, network: "PreTrainedModel", room: int) -> None:
        import torch
        from transformers import StaticCache

        super().__init__(network)
        self.cache = StaticCache(config=network.config, max_cache_len=room)
        self.room = room
        self._fresh = True
        self._compiled = torch.compile(self.network.forward, dynamic=False, fullgraph=True)
        self._read(torch.zeros(2, dtype=torch.int64), None, self.cache)  # allocates
        start = time.perf_counter()
        self._step(0)
        self._step(0)
        self.compile_seconds = time.perf_counter() - start
        self._fresh = False

    def bytes(self, length: int) -> int:  # noqa: D102
        return super().bytes(self.room - 1)

    def start(self, prompt: "Tensor", cache: "Cache | None" = None) -> None:  # noqa: D102
        self.rewind(0)
        self._read(prompt, cache, self.cache)

    def rewind(self, length: int) -> None:  # noqa: D102
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def _step(self, token: int) -> Any:
        return self._call(self._compiled, token)

    def step(self, token: int) -> Any:  # noqa: D102
        import torch

        with torch.compiler.set_stance("fail_on_recompile"):
            return self._step(token)

    def decode(self, token: int, steps: int) -> list[int]:  # noqa: D102
        import torch

        found = []
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(steps):
                token = int(self._step(token).argmax())
                found.append(token)
        return found

    def close(self) -> None:  # noqa: D102
        import torch

        torch._dynamo.reset()


class LlamaCpp(Runner):
    """llama.cpp by its C functions, without the Python class around them.

    Args:
        network: A Llama or Mistral model, whose weights are written as GGUF into a scratch folder.
        format: All of its matrices, the head and the embedding included, are of this type.
        room: Positions of its cache.
        threads: For both, tokens and prompts.

    Raises:
        MissingDependencyError: llama-cpp-python or gguf is not installed.
        UserError: the model is of a kind that is not written as GGUF here.
    """

    name = LLAMA
    cache_item = 2

    def __init__(self, network: "PreTrainedModel", *, format: str, room: int, threads: int) -> None:
        native: Any = require(
            "llama_cpp", extra="bench", package="flashformer", purpose="the peer llama.cpp"
        )
        self.native, self.format, self.room = native, format, room
        self.spec = ModelSpec.from_config(network.config)
        self._quiet = native.llama_log_callback(lambda level, text, user: None)
        native.llama_log_set(self._quiet, ctypes.c_void_p())
        native.llama_backend_init()
        self._token = (native.llama_token * 1)()
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="flashformer-"))
            path = Path(folder) / "model.gguf"
            self.weights = write_gguf(network, path, format)
            settings = native.llama_model_default_params()
            settings.use_mmap = False
            settings.n_gpu_layers = 0
            model = native.llama_model_load_from_file(str(path).encode(), settings)
            if not model:
                raise UserError("llama.cpp cannot read the GGUF file")
            stack.callback(native.llama_model_free, model)
            settings = native.llama_context_default_params()
            settings.n_ctx, settings.n_batch, settings.n_ubatch = room, 512, 512
            settings.n_threads = settings.n_threads_batch = threads
            settings.no_perf = True
            self.context = native.llama_init_from_model(model, settings)
            if not self.context:
                raise UserError("llama.cpp cannot make a context")
            stack.callback(native.llama_free, self.context)
            self._open = stack.pop_all()
        self._memory = native.llama_get_memory(self.context)

    def _feed(self, tokens: Any) -> Any:
        import numpy as np

        batch = self.native.llama_batch_get_one(tokens, len(tokens))
        code = self.native.llama_decode(self.context, batch)
        if code:
            raise UserError(f"llama.cpp cannot decode: code {code}")
        found = self.native.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, shape=(self.spec.vocab,))

    def start(self, prompt: "Tensor", cache: "Cache | None" = None) -> None:  # noqa: D102
        self.rewind(0)
        tokens = prompt.tolist()
        for k in range(0, len(tokens), 512):
            part = tokens[k : k + 512]
            self._feed((self.native.llama_token * len(part))(*part))

    def rewind(self, length: int) -> None:  # noqa: D102
        self.native.llama_memory_seq_rm(self._memory, 0, length, -1)

    def step(self, token: int) -> Any:  # noqa: D102
        self._token[0] = token
        return self._feed(self._token)

    def close(self) -> None:  # noqa: D102
        self._open.close()


# --------------------------------------------------------------------------------------------------
# GGUF


def gguf_rows(weight: "Tensor", heads: int) -> "Tensor":
    """Reorder the rows of a query or key projection for rotary pairs that lie side by side.

    transformers turns rows d and d + D/2 of a head together, llama.cpp rows 2d and 2d + 1.

    Args:
        weight: `[heads * D, K]`, D even.
        heads: How many.
    """
    rows = weight.shape[0] // heads
    halves = weight.reshape(heads, 2, rows // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(network: "PreTrainedModel", path: Path, format: str) -> int:
    """Write a model as GGUF without a tokenizer, every matrix in one type.

    Args:
        network: A Llama or Mistral model without biases, rotary scaling or sliding windows.
        path: The new file.
        format: One of `GGUF_TYPES`: int8 is q8_0, int4 is q4_0.

    Returns:
        Bytes of weights that a token reads.

    Raises:
        MissingDependencyError: gguf is not installed.
        UserError: the model is of another kind.
    """
    gguf: Any = require("gguf", extra="bench", package="flashformer", purpose="the peer llama.cpp")
    spec = ModelSpec.from_config(network.config)
    base = _plain_rotary(network, spec)
    kind = gguf.GGMLQuantizationType[GGUF_TYPES[format]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.eps)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(base)
    writer.add_vocab_size(spec.vocab)
    writer.add_tokenizer_model("none")
    read = 0
    for name, tensor in _gguf_tensors(network, spec):
        values = tensor.detach().float().cpu().numpy()
        if tensor.ndim == 1:
            writer.add_tensor(name, values)
            read += values.nbytes
            continue
        values = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, values, raw_dtype=kind)
        read += 0 if name == "token_embd.weight" and not spec.tied else values.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _plain_rotary(network: "PreTrainedModel", spec: ModelSpec) -> float:
    """Return the base of the rotary positions, of a model that `write_gguf` can write."""
    rope = getattr(network.config, "rope_parameters", None) or {}
    reasons = {
        f"model_type is {spec.model_type!r}": spec.model_type not in ("llama", "mistral"),
        "it has biases": spec.qkv_bias or spec.output_bias or spec.mlp_bias,
        "it has sliding windows": any(w is not None for w in spec.windows),
        f"rope_type is {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "only a part of a head is turned": spec.rotary != spec.head_dim,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UserError(
            f"the peer llama.cpp takes plain Llama and Mistral models only: {', '.join(found)}; "
            "leave it out of peers"
        )
    return float(rope.get("rope_theta", 10000.0))


def _gguf_tensors(network: "PreTrainedModel", spec: ModelSpec) -> "list[tuple[str, Tensor]]":
    state = network.state_dict()
    found = [("token_embd.weight", state["model.embed_tokens.weight"])]
    found.append(("output_norm.weight", state["model.norm.weight"]))
    if not spec.tied:
        found.append(("output.weight", state["lm_head.weight"]))
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": spec.heads, "attn_k": spec.kv_heads}
    for layer in range(spec.layers):
        for theirs, ours in names.items():
            tensor = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs in heads:
                tensor = gguf_rows(tensor, heads[theirs])
            found.append((f"blk.{layer}.{theirs}.weight", tensor))
    return found
