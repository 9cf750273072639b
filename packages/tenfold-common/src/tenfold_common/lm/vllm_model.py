"""A language model in vLLM's engine, started by this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tenfold_common.errors import UserError
from tenfold_common.lm.base import (
    Generation,
    Prompt,
    Score,
    check_continuations,
    check_sampling,
    check_scoring,
    stream_seed,
)
from tenfold_common.lm.tokens import Tokens, check_length
from tenfold_common.lm.transformers_model import check_source, source_name
from tenfold_common.optional import require

if TYPE_CHECKING:
    from pathlib import Path


class VLLMModel:
    """Samples and scores with vLLM.

    The engine runs in a process of its own: guard scripts with `if __name__ == "__main__"`.
    Prompts are tokenised as `TransformersModel` does; the sampled texts differ from its, since
    the random numbers do, and the likeliest ones (temperature 0) agree but for rounding.

    Args:
        model: A folder or a name on the hub.
        dtype: A name that vLLM knows, or `"auto"`: float32 on a CPU, else what vLLM chooses.
        engine: Further arguments of `vllm.LLM`, such as `{"max_model_len": 4096}` or, on a CPU,
            `{"enforce_eager": True}`. Defaults to none.
        template_options: Variables for the chat template, such as `{"enable_thinking": False}`.
        skip_special_tokens: Leave special tokens out of generated texts. Defaults to True.
        trust_remote_code: Run Python code that comes with the model. Defaults to False.

    Raises:
        UserError: there is no such folder, or vLLM does not take the model or an argument.
        MissingDependencyError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        engine: Mapping[str, object] | None = None,
        template_options: Mapping[str, object] | None = None,
        skip_special_tokens: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        check_source(model)
        self._vllm = require("vllm", extra="vllm", package="tenfold-common", purpose="VLLMModel")
        platforms = require("vllm.platforms", extra="vllm", package="tenfold-common")
        if dtype == "auto" and platforms.current_platform.is_cpu():
            dtype = "float32"
        named = {"trust_remote_code": trust_remote_code, **(engine or {})}
        try:
            self.engine = self._vllm.LLM(model=str(model), dtype=dtype, **named)
        except (ValueError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:400]
            raise UserError(f"vLLM does not start with {str(model)!r}: {reason}") from error
        self.name = source_name(model)
        self.source = str(model)
        self.template_options = dict(template_options or {})
        self.skip_special_tokens = skip_special_tokens
        self.tokenizer = self.engine.get_tokenizer()
        self.context = int(self.engine.llm_engine.model_config.max_model_len)
        self._tokens = Tokens(self.tokenizer, template_options, skip_special_tokens)

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[Generation]]:
        """Sample `n` texts per prompt; see `TextModel.sample`."""
        check_sampling(prompts, n, temperature, top_p, max_tokens, stop, seed)
        encoded = [self._tokens.encode(prompt) for prompt in prompts]
        different = n if temperature > 0 else 1
        params = [
            self._vllm.SamplingParams(
                n=different,
                temperature=temperature,
                top_p=top_p,
                max_tokens=min(max_tokens, max(1, self.context - len(ids))),
                stop=list(stop),
                seed=stream_seed(seed, i, 0),
                skip_special_tokens=self._tokens.skip_special_tokens,
            )
            for i, ids in enumerate(encoded)
        ]
        results = []
        for output in self._run(encoded, params):
            found = [
                Generation(
                    one.text,
                    "stop" if one.finish_reason == "stop" else "length",
                    len(one.token_ids),
                )
                for one in sorted(output.outputs, key=lambda one: one.index)
            ]
            results.append([found[j % different] for j in range(n)])
        return results

    def score(self, prefix: Prompt, continuations: Sequence[str]) -> list[Score]:
        """Log-probabilities of texts that could follow a prefix; see `TextModel.score`.

        vLLM wants room for one more token, which is generated and thrown away.
        """
        check_continuations(prefix, continuations)
        return self.score_many([prefix], [continuations])[0]

    def score_many(
        self, prefixes: Sequence[Prompt], continuations: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        """Scores for several prefixes in one run of the engine; see `TextModel.score_many`."""
        check_scoring(prefixes, continuations)
        items = [self._tokens.joint(*pair) for pair in zip(prefixes, continuations, strict=True)]
        joints = [joint for item in items for joint in item]
        params = self._vllm.SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False
        )
        outputs = self._run([joint.ids for joint in joints], [params] * len(joints))
        scores = iter(
            [
                joint.score(
                    [
                        output.prompt_logprobs[k][joint.ids[k]].logprob
                        for k in range(joint.first, len(joint.ids))
                    ]
                )
                for joint, output in zip(joints, outputs, strict=True)
            ]
        )
        return [[next(scores) for _ in item] for item in items]

    def close(self) -> None:
        """Stop the engine and free its memory; the model cannot be used afterwards."""
        self.engine.llm_engine.engine_core.shutdown()

    def _run(self, rows: list[list[int]], params: list) -> list:
        for ids in rows:
            check_length(len(ids), self.context, spare=1)
        if not rows:
            return []
        prompts = [{"prompt_token_ids": ids} for ids in rows]
        return self.engine.generate(prompts, params, use_tqdm=False)
