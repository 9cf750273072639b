"""The random models, the gates' references, and vLLM in an environment of its own."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashformer.config import ModelSpec
from flashformer.model import FlashModel
from flashformer.pack import gate_order, unpack
from flashformer.peers import GGUF_TYPES, Runner
from tenfold_common.errors import UserError

VLLM = "vLLM"
SIZES = {  # hidden, intermediate, layers, heads, kv heads, tokens; shaped like SmolLM2, tied
    "5M": (256, 704, 6, 8, 4, 4096),
    "30M": (512, 1408, 9, 8, 4, 8192),
    "100M": (768, 2048, 12, 12, 4, 16384),
    "360M": (960, 2560, 32, 15, 5, 49152),
}
LONGEST = 4096


def random_model(size: str, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of one of `SIZES` with seeded weights, all of them numbers of bfloat16.

    Matrices have the standard deviation K^-1/2, so that attention scores are of order 1 and the
    order of rotary positions matters.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocab = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        network: Any = LlamaForCausalLM(config)
    network.to_empty(device="cpu")
    network.tie_weights()
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=stream))
            else:
                std = parameter.shape[1] ** -0.5
                parameter.copy_(std * torch.randn(parameter.shape, generator=stream))
            parameter.copy_(parameter.bfloat16().float())
    network.to(dtype)
    network.model.rotary_emb = type(network.model.rotary_emb)(config)  # its frequencies: float32
    return network.eval().requires_grad_(False)


def ours_dequantised(network: Any, model: FlashModel) -> Any:
    """A copy of a network with the weights that a model compiled from it streams."""
    changed, spec = _untied_copy(network), model.spec
    packed: Any = model.backend.packed
    dense = {name: unpack(found.tiles, found).dense() for name, found in packed.items()}
    order = gate_order(spec.intermediate)
    there = order >= 0
    changed.lm_head.weight.copy_(dense["head"][: spec.vocab])
    for number, layer in enumerate(changed.model.layers):
        found = {k: dense[f"layer {number} {k}"] for k in ("qkv", "output", "up", "down")}
        attention, mlp = layer.self_attn, layer.mlp
        keys = spec.kv_heads * spec.head_dim
        rows = [spec.heads * spec.head_dim, keys, keys]
        parts = found["qkv"][: sum(rows)].split(rows)
        for one, part in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), parts, strict=True
        ):
            one.weight.copy_(part)
        both = torch.empty(2 * spec.intermediate, spec.hidden)
        both[order[there]] = found["up"][: len(order)][there]
        mlp.gate_proj.weight.copy_(both[: spec.intermediate])
        mlp.up_proj.weight.copy_(both[spec.intermediate :])
        attention.o_proj.weight.copy_(found["output"][: spec.hidden])
        mlp.down_proj.weight.copy_(found["down"][: spec.hidden])
    return changed


def gguf_dequantised(network: Any, format: str) -> Any:
    """A copy of a network with the weights that its GGUF file of a format holds."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[GGUF_TYPES[format]]
    changed = _untied_copy(network)
    for parameter in changed.parameters():
        if parameter.ndim == 2:
            values = quants.dequantize(quants.quantize(parameter.numpy(), kind), kind)
            parameter.copy_(torch.from_numpy(values))
    return changed


def _untied_copy(network: Any) -> Any:
    changed = copy.deepcopy(network).requires_grad_(False)
    weight = torch.nn.Parameter(changed.lm_head.weight.clone(), requires_grad=False)
    changed.lm_head.weight = weight
    return changed


class VLLMRunner(Runner):
    """vLLM in a process of another Python, which times itself.

    It cannot be rewound: a time is that of `steps + 1` tokens less that of 1, after the same
    prompt, which its cache of prefixes holds.

    Args:
        network: In bfloat16; is saved into a scratch folder.
        python: Of an environment with vLLM.
        room: Longest sequence.
        threads: For OpenMP.
    """

    name, format, cache_item = VLLM, "bf16", 2

    def __init__(self, network: Any, *, python: str, room: int, threads: int) -> None:
        self.spec = ModelSpec.from_config(network.config)
        self.weights = sum(p.nbytes for p in network.parameters())
        self._folder = tempfile.TemporaryDirectory(prefix="flashformer-")
        network.save_pretrained(self._folder.name)
        env = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        env.pop("PYTHONPATH", None)
        self._log = (Path(self._folder.name) / "log").open("w+")
        worker = Path(__file__).with_name("vllm_worker.py")
        self._process = subprocess.Popen(
            [python, str(worker), self._folder.name, str(room)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env,
            start_new_session=True,
        )  # fmt: skip
        self._prompt: list[int] = []
        self._read: list[int] = []
        self.compile_seconds = self._ask({"do": "hello"})

    def _ask(self, request: dict) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it ended: the answer below is missing as well
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:]
            raise UserError(f"vLLM ended: {' '.join(last)}")
        self._signal(signal.SIGSTOP)
        return json.loads(line)

    def _signal(self, number: int) -> None:
        """Stop or go on: its workers spin while they wait, on cores that others are timed on."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def start(self, prompt: Tensor, cache: Any = None) -> None:
        """Remember the prompt."""
        self._prompt = self._read = prompt.tolist()

    def rewind(self, length: int) -> None:
        """Forget what was read from there on; every request sends its whole sequence."""
        self._read = self._read[:length]

    def step(self, token: int) -> Tensor:
        """Send the whole sequence anew, which is not how it is timed."""
        self._read = [*self._read, token]
        return self.logits(self._read)

    def seconds(self, token: int, length: int, steps: int) -> float:
        """As the worker measured."""
        return self._ask({"do": "time", "prompt": self._prompt[:length], "steps": steps})

    def logits(self, tokens: list[int]) -> Tensor:
        """All logits after tokens."""
        return torch.tensor(self._ask({"do": "logits", "prompt": tokens}))

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()
