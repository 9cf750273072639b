"""A language model of transformers in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tenfold_common.errors import UserError
from tenfold_common.lm.base import (
    Generation,
    Prompt,
    Score,
    check_continuations,
    check_sampling,
    check_scoring,
    first_stop,
    stream_seed,
)
from tenfold_common.lm.prefixes import Prefixes, join, past_length, shared_start
from tenfold_common.lm.tokens import Joint, Tokens, check_length
from tenfold_common.optional import require

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


class TransformersModel:
    """Samples and scores in batches with a model of transformers.

    A prompt of which several samples are wanted is run once, and so is what all prompts begin with;
    of models with a sliding window or with states in place of keys, only scores share their
    prefixes, or nothing does. No key or value outlives a call, so the weights may change between.

    Every sample draws one uniform number per token from its own stream, so results do not depend
    on `batch_size` or on the other prompts, but for rounding: with other padding the logits differ
    in the last digits, which can tip a choice that is nearly even. The random state of torch is
    neither used nor changed. The settings of the model's `generation_config` (such as a repetition
    penalty) are left aside, but for its end tokens. A model in training mode is set to eval mode
    during a call and back afterwards.

    Args:
        model: A causal language model (a PEFT model too), used where and as it is; a folder; or a
            name on the hub.
        tokenizer: Its tokenizer. Defaults to the one in the folder; required with a model object.
        device: See `resolve_device`; only with a folder or name. Defaults to `"auto"`.
        dtype: See `resolve_dtype`; only with a folder or name. Defaults to `"auto"`.
        batch_size: The most rows computed together. Defaults to 16.
        context: The most tokens the model can read. Defaults to what its config says.
        template_options: Variables for the chat template, such as `{"enable_thinking": False}`.
        skip_special_tokens: Leave special tokens out of generated texts. Defaults to True.
        trust_remote_code: Run Python code that comes with the model. Defaults to False.

    Raises:
        UserError: there is no such model, it has no tokenizer, or an argument does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int = 16,
        context: int | None = None,
        template_options: Mapping[str, object] | None = None,
        skip_special_tokens: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        for module in ("torch", "transformers"):
            require(module, extra="lm", package="tenfold-common", purpose="TransformersModel")
        if isinstance(model, (str, os.PathLike)):
            self.name = source_name(model)
            model, tokenizer = _load(model, tokenizer, device, dtype, trust_remote_code)
        elif str(device) != "auto" or str(dtype) != "auto":
            raise UserError("a model object is used where and as it is; leave out device and dtype")
        elif tokenizer is None:
            raise UserError(
                "a model object needs its tokenizer: TransformersModel(model, tokenizer)"
            )
        else:
            self.name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        inner = _inner(model)
        text_config = inner.config.get_text_config()
        self.context = context or getattr(text_config, "max_position_embeddings", None)
        self._inner = inner
        self.template_options = dict(template_options or {})
        self.skip_special_tokens = skip_special_tokens
        self._tokens = Tokens(tokenizer, template_options, skip_special_tokens)
        self._ends = _end_tokens(inner, tokenizer)
        pads = (tokenizer.pad_token_id, *sorted(self._ends), 0)
        self._pad = next(token for token in pads if token is not None)

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
        for ids in encoded:
            check_length(len(ids), self.context, spare=1)

        def room(row: tuple[int, int]) -> int:
            length = len(encoded[row[0]])
            return max_tokens if self.context is None else min(max_tokens, self.context - length)

        # The longest first: if memory does not suffice, it shows at once. Rows of one batch end
        # alike, so that a row's result does not depend on its neighbours.
        different = n if temperature > 0 else 1
        rows = [(i, j) for i in range(len(encoded)) for j in range(different)]
        rows.sort(key=lambda row: (-len(encoded[row[0]]), encoded[row[0]]))
        done: dict[tuple[int, int], Generation] = {}
        with self._inference():
            shared = self._shared_prompts([encoded[i] for i, _ in rows])
            for limit, alike in groupby(rows, key=room):
                for batch in _batches(list(alike), self.batch_size):
                    inputs = [encoded[i] for i, _ in batch]
                    draws = [_draws(stream_seed(seed, i, j), limit) for i, j in batch]
                    chooser = _Chooser(_width(inputs), draws, temperature, top_p)
                    cache = join(shared.pasts([ids[:-1] for ids in inputs])) if shared else None
                    for row, ids in zip(
                        batch, self._generate(inputs, cache, limit, chooser, stop), strict=True
                    ):
                        done[row] = self._tokens.generation(encoded[row[0]], ids, self._ends, stop)
        return [[done[i, j % different] for j in range(n)] for i in range(len(encoded))]

    def score(self, prefix: Prompt, continuations: Sequence[str]) -> list[Score]:
        """Log-probabilities of texts that could follow a prefix; see `TextModel.score`.

        The prefix is run once and its keys and values are shared by all continuations, but for
        models whose cache holds other things, such as linear attention; the log-softmax is
        computed in float32.
        """
        check_continuations(prefix, continuations)
        return self.score_many([prefix], [continuations])[0]

    def score_many(
        self, prefixes: Sequence[Prompt], continuations: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        """Scores for several prefixes; see `TextModel.score_many`.

        What all prefixes begin with is run once, then the rest of each, then the continuations of
        `batch_size` prefixes together; logits are made for the continuations only.
        """
        check_scoring(prefixes, continuations)
        items = [self._tokens.joint(*pair) for pair in zip(prefixes, continuations, strict=True)]
        for joint in (joint for item in items for joint in item):
            check_length(len(joint.ids), self.context, spare=0)
        # The last common token is run with the continuations: it predicts their first.
        starts = {
            i: item[0].ids[: min(joint.first for joint in item) - 1]
            for i, item in enumerate(items)
            if item
        }
        scores: dict[tuple[int, int], Score] = {}
        if not starts:
            return [[] for _ in items]
        with self._inference():
            order = sorted(starts, key=lambda i: (-len(starts[i]), starts[i]))
            shared = Prefixes(self._forward, list(starts.values()), self.batch_size)
            for group in _batches(order, shared.together):
                pasts = dict(zip(group, shared.pasts([starts[i] for i in group]), strict=True))
                tails = [(i, k) for i in group for k in range(len(items[i]))]
                for row, score in self._score_tails(items, pasts, tails):
                    scores[row] = score
        return [[scores[i, k] for k in range(len(item))] for i, item in enumerate(items)]

    def _score_tails(
        self,
        items: list[list[Joint]],
        pasts: dict[int, DynamicCache | None],
        tails: list[tuple[int, int]],
    ) -> Iterator[tuple[tuple[int, int], Score]]:
        """Scores of continuations, named by prefix and number, after what was run of the prefix."""
        known = {i: past_length(past) for i, past in pasts.items()}
        tails = sorted(tails, key=lambda row: known[row[0]] - len(items[row[0]][row[1]].ids))
        for batch in map(sorted, _batches(tails, self.batch_size)):  # each prefix's side by side
            joints = [items[i][k] for i, k in batch]
            rows = [joint.ids[known[i] : -1] for (i, _), joint in zip(batch, joints, strict=True)]
            width = _width(rows)
            # Where each continuation's logits begin; the rows are padded on the right.
            begins = [
                joint.first - 1 - known[i] for (i, _), joint in zip(batch, joints, strict=True)
            ]
            logits = self._forward(
                rows, [pasts[i] for i, _ in batch], keep=width - min(begins), cache=False
            ).logits
            skipped = width - logits.shape[1]
            for row, joint, begin, found in zip(batch, joints, begins, logits, strict=True):
                targets = joint.ids[joint.first :]
                wanted = found[begin - skipped :][: len(targets)]
                yield row, joint.score(_logprobs(wanted, targets))

    @contextmanager
    def _inference(self) -> Iterator[None]:
        import torch
        from transformers import GenerationConfig

        training = [module for module in self.model.modules() if module.training]
        settings = self._inner.generation_config
        self.model.eval()
        self._inner.generation_config = GenerationConfig()  # generate() would take gaps from it
        try:
            with torch.no_grad():
                yield
        finally:
            self._inner.generation_config = settings
            for module in training:
                module.training = True

    def _shared_prompts(self, prompts: list[list[int]]) -> Prefixes | None:
        """What to run before sampling from prompts; None if they are as well run by themselves."""
        rows = [ids[:-1] for ids in prompts]  # the last token is left: it predicts the first
        if not any(rows):
            return None
        start = len(shared_start(rows))
        distinct = {tuple(row): len(row) - start for row in rows}
        if 2 * (start + sum(distinct.values())) > sum(map(len, rows)):
            return None  # holding keys and values twice is for half the work or less
        shared = Prefixes(self._forward, rows, self.batch_size)
        return shared if shared.kind == "padded" else None

    def _generate(
        self,
        rows: list[list[int]],
        cache: DynamicCache | None,
        limit: int,
        chooser: _Chooser,
        stop: Sequence[str],
    ) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        width = _width(rows)
        padded = [[self._pad] * (width - len(ids)) + ids for ids in rows]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
        device = self._inner.device
        network: Any = self.model
        sequences = network.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            **({} if cache is None else {"past_key_values": cache}),
            generation_config=GenerationConfig(
                max_new_tokens=limit,
                do_sample=False,  # the chooser leaves one token per row
                use_cache=True,
                pad_token_id=self._pad,
                eos_token_id=sorted(self._ends) or None,
            ),
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList(
                [_StopStrings(self._tokens, width, stop)] if stop else []
            ),
        )
        return sequences[:, width:].tolist()

    def _forward(
        self,
        rows: list[list[int]],
        pasts: Sequence[DynamicCache | None],
        *,
        keep: int = 1,
        cache: bool = True,
    ) -> Any:
        """Run rows of tokens, each after its past and padded on the right.

        Args:
            rows: New tokens, at least one per row.
            pasts: For each row the cache of what comes before; see `Prefixes`.
            keep: Of how many last columns the logits are needed; some models give all.
            cache: Whether the output must hold the cache.
        """
        import inspect

        import torch

        width = _width(rows)
        lengths = [past_length(past) for past in pasts]
        before = max(lengths)
        named: dict[str, Any] = {}
        known = inspect.signature(self._inner.forward).parameters
        device = self._inner.device
        if "logits_to_keep" in known:
            named["logits_to_keep"] = keep
        if before:
            named["past_key_values"] = join(pasts)
        if before and "position_ids" in known:
            # Padding repeats the last position: one more could lie beyond the context.
            named["position_ids"] = torch.tensor(
                [
                    [length + min(k, len(ids) - 1) for k in range(width)]
                    for ids, length in zip(rows, lengths, strict=True)
                ],
                device=device,
            )
        mask = [
            [0] * (before - length) + [1] * (length + len(ids)) + [0] * (width - len(ids))
            for ids, length in zip(rows, lengths, strict=True)
        ]
        return self.model(
            input_ids=torch.tensor(
                [ids + [self._pad] * (width - len(ids)) for ids in rows], device=device
            ),
            attention_mask=torch.tensor(mask, device=device),
            use_cache=cache or before > 0,
            **named,
        )


class _Chooser:
    """Picks each row's next token by its own uniform numbers; all other scores become -inf."""

    def __init__(
        self, width: int, draws: list[list[float]], temperature: float, top_p: float
    ) -> None:
        self._width = width
        self._draws = draws
        self._temperature = temperature
        self._top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        if scores.isnan().any():
            raise UserError("the model's logits are not numbers (NaN); try dtype float32")
        if self._temperature == 0:
            return scores
        step = min(input_ids.shape[1] - self._width, len(self._draws[0]) - 1)
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        draws = torch.tensor([[d[step]] for d in self._draws], dtype=wide, device=scores.device)
        level = scores.to(wide) - scores.amax(-1, keepdim=True)
        chances = (level / self._temperature).softmax(-1)
        order = None
        if self._top_p < 1:
            chances, order = chances.sort(dim=-1, descending=True, stable=True)
            chances = chances.masked_fill(chances.cumsum(-1) - chances >= self._top_p, 0)
        heap = chances.cumsum(-1)
        # The first token whose cumulated chance exceeds the draw; never one without a chance.
        chosen = torch.searchsorted(heap, draws * heap[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[-1] - 1)
        if order is not None:
            chosen = order.gather(-1, chosen)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0)


class _StopStrings:
    """Says which rows have reached a stop string, from the text of their last tokens."""

    def __init__(self, tokens: Tokens, width: int, stop: Sequence[str]) -> None:
        self._tokens = tokens
        self._width = width
        self._stop = stop
        self._tail = 1 + max(len(text.encode()) for text in stop)
        self._done: set[int] = set()

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **named: object
    ) -> torch.Tensor:
        import torch

        start = max(self._width, input_ids.shape[1] - self._tail)
        for row, ids in enumerate(input_ids[:, start:].tolist()):
            if row not in self._done:
                text = self._tokens.decode_after(input_ids[row, : self._width].tolist(), ids)
                if first_stop(text, self._stop) is not None:
                    self._done.add(row)
        finished = [row in self._done for row in range(len(input_ids))]
        return torch.tensor(finished, device=input_ids.device)


def _load(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tenfold_common.device import resolve_device, resolve_dtype

    check_source(source)
    place = resolve_device(device).value
    kind = resolve_dtype(dtype, place).value
    what = "language model"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=kind, trust_remote_code=trust_remote_code
        )
        what = "tokenizer"
        found: Any = (
            tokenizer
            if tokenizer is not None
            else AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load a {what} from {str(source)!r}: {reason}") from error
    return model.to(place), found


def check_source(source: str | Path) -> None:
    """Raise a UserError for a folder that is missing or holds no model; hub names pass."""
    from pathlib import Path

    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"the folder {str(source)!r} holds no model: it has no config.json")
    elif path.exists():
        raise UserError(f"{str(source)!r} is a file; a model is a folder with a config.json")
    elif isinstance(source, Path) or str(source)[:1] in "./~" or str(source).count("/") > 1:
        raise UserError(f"there is no folder {str(source)!r}")


def source_name(source: str | Path) -> str:
    """What to call a model: the last part of a folder's path, or the whole name on the hub."""
    from pathlib import Path

    return Path(source).resolve().name if Path(source).is_dir() else str(source)


def _inner(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, out of its PEFT wrapper."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(model, "get_base_model") else model


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    own: Any = tokenizer.eos_token_id
    return frozenset(token for token in (*listed, own) if token is not None)


def _draws(seed: int, count: int) -> list[float]:
    from random import Random

    stream = Random(seed)
    return [stream.random() for _ in range(count)]


def _batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _width(rows: list[list[int]]) -> int:
    return max(map(len, rows))


def _logprobs(logits: torch.Tensor, targets: list[int]) -> list[float]:
    import torch

    found = logits.float().log_softmax(-1)
    chosen = found.gather(-1, torch.tensor(targets, device=logits.device)[:, None])[:, 0]
    if chosen.isnan().any():
        raise UserError("the model's logits are not numbers (NaN); try dtype float32")
    return chosen.tolist()
