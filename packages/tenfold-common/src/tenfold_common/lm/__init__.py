"""Language models behind one protocol: transformers, vLLM, any OpenAI-compatible server, a script.

model = load_text_model("path/or/hub-name")
[[reply]] = model.sample(["2 + 2 ="], max_tokens=8, temperature=0)
[yes, no] = model.score("Is water wet? ", ["yes", "no"])
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from tenfold_common.errors import UserError, suggest
from tenfold_common.lm.base import (
    FinishReason,
    Generation,
    Message,
    Prompt,
    PromptTooLong,
    Score,
    TextModel,
)
from tenfold_common.lm.scripted import ScriptedModel

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from tenfold_common.lm.server import ServerModel
    from tenfold_common.lm.transformers_model import TransformersModel
    from tenfold_common.lm.vllm_model import VLLMModel

__all__ = [
    "FinishReason",
    "Generation",
    "Message",
    "Prompt",
    "PromptTooLong",
    "Score",
    "ScriptedModel",
    "ServerModel",
    "TextModel",
    "TransformersModel",
    "VLLMModel",
    "load_text_model",
]

_HOME = {
    "ServerModel": "server",
    "TransformersModel": "transformers_model",
    "VLLMModel": "vllm_model",
}
BACKENDS = ("auto", "transformers", "vllm", "server")


def load_text_model(
    spec: str | Path,
    backend: str = "auto",
    *,
    model: str | None = None,
    api_key_env: str | None = None,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    engine: Mapping[str, object] | None = None,
    template_options: Mapping[str, object] | None = None,
    trust_remote_code: bool = False,
) -> TransformersModel | VLLMModel | ServerModel:
    """Make a model from what a command line was given.

    For further settings call the class itself.

    Args:
        spec: A folder, a name on the hub, or the `http(s)://` address of a server, which may end
            with `#` and the model's name.
        backend: `"transformers"`, `"vllm"`, `"server"`, or `"auto"`: a server for an address,
            else transformers.
        model: With a server, the model's name. Defaults to what `spec` names, or to the only one.
        api_key_env: With a server, the environment variable that holds the key.
        device: With transformers, see `resolve_device`.
        dtype: With transformers and vLLM, the name of a floating-point type.
        engine: With vLLM, further arguments of `vllm.LLM`.
        template_options: With transformers and vLLM, variables for the chat template, such as
            `{"enable_thinking": False}`.
        trust_remote_code: With transformers and vLLM, run Python code that comes with the model.

    Returns:
        The model.

    Raises:
        UserError: the back-end is unknown, does not go with `spec`, or takes no such argument.
    """
    if backend not in BACKENDS:
        raise UserError(
            f"unknown backend {backend!r}; use {', '.join(BACKENDS)}.{suggest(backend, BACKENDS)}"
        )
    address = str(spec).lower().startswith(("http://", "https://"))
    chosen = ("server" if address else "transformers") if backend == "auto" else backend
    if address != (chosen == "server"):
        wanted = (
            "the http:// or https:// address of a server" if not address else "a folder or name"
        )
        raise UserError(f"backend {chosen!r} needs {wanted}, not {str(spec)!r}")
    given = {
        "model": model is not None,
        "api_key_env": api_key_env is not None,
        "device": str(device) != "auto",
        "dtype": dtype != "auto",
        "engine": engine is not None,
        "template_options": template_options is not None,
        "trust_remote_code": trust_remote_code,
    }
    local = ("template_options", "trust_remote_code")
    takes = {
        "transformers": ("device", "dtype", *local),
        "vllm": ("dtype", "engine", *local),
        "server": ("model", "api_key_env"),
    }[chosen]
    for name, is_given in given.items():
        if is_given and name not in takes:
            raise UserError(f"backend {chosen!r} takes no {name}; it takes {', '.join(takes)}")
    if chosen == "transformers":
        from tenfold_common.lm.transformers_model import TransformersModel

        return TransformersModel(
            spec,
            device=device,
            dtype=dtype,
            template_options=template_options,
            trust_remote_code=trust_remote_code,
        )
    if chosen == "vllm":
        from tenfold_common.lm.vllm_model import VLLMModel

        return VLLMModel(
            spec,
            dtype=dtype,
            engine=engine,
            template_options=template_options,
            trust_remote_code=trust_remote_code,
        )
    from tenfold_common.lm.server import ServerModel

    base, _, named = str(spec).partition("#")
    return ServerModel(base, model or named or None, api_key_env=api_key_env)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
