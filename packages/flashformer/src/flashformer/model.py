"""`FlashModel`: a compiled model that decodes a token, or many, in one call."""

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashformer.backends.base import Backend
from flashformer.cache import KVCache
from flashformer.config import ModelSpec
from flashformer.plan import Plan
from flashformer.sampling import COLDEST, check_seed
from flashformer.threads import Threads
from tenfold_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from flashformer.roofline import Explanation

BURST = 32  # tokens of one native call: Ctrl-C and streamers wait for no more than these
FEED = 16  # prompts up to this length are read token by token


class FlashModel:
    """A model ready to decode one sequence. Made by `compile`, `from_pretrained` and `load`.

    Attributes:
        spec: Its shape.
        plan: Who does what.
        backend: What executes the plan.
        config: Of transformers.
        generation_config: Defaults of `generate`.
        weights: Format of the matrices of the layers.
        head: Format of the head.
        max_len: The longest sequence, prompt and answer together.
        source: The transformers model it was compiled from, which reads long prompts; or None.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        config: "PretrainedConfig",
        generation_config: "GenerationConfig",
        weights: str,
        head: str,
        max_len: int,
        source: "PreTrainedModel | None" = None,
        rebuild: "Callable[[], Backend] | None" = None,
    ) -> None:
        self.backend = backend
        self.plan: Plan = backend.plan
        self.spec: ModelSpec = backend.plan.spec
        self.config, self.generation_config = config, generation_config
        self.weights, self.head, self.max_len = weights, head, max_len
        self.source = source
        self._rebuild = rebuild
        self._versions = _versions(source)
        # Only the CPU back-end has threads to choose; the others take every worker always.
        self._threads = Threads(self.plan.workers if backend.name.startswith("cpu") else 1)

    def __repr__(self) -> str:
        return (
            f"FlashModel({self.spec.model_type}, {self.spec.layers} layers, "
            f"weights={self.weights!r}, head={self.head!r}, max_len={self.max_len}, "
            f"backend={self.backend.name!r})"
        )

    @property
    def device(self) -> Any:
        """Where tokens and logits are."""
        return self.backend.device

    @property
    def dtype(self) -> Any:
        """Of logits."""
        import torch

        return torch.float32

    @property
    def threads(self) -> int | None:
        """How many threads take part in a call; None, the default, finds out while running.

        Results do not depend on it.
        """
        return self._threads.fixed

    @threads.setter
    def threads(self, value: int | None) -> None:
        if value is not None and not (
            isinstance(value, int)
            and not isinstance(value, bool)
            and 1 <= value <= self.plan.workers
        ):
            raise UserError(
                f"threads must be None or a whole number from 1 to {self.plan.workers}, the "
                f"workers of the plan, not {value!r}; compile with more threads"
            )
        self._threads.fixed = value

    def new_cache(self, max_len: int | None = None) -> KVCache:
        """Return an empty cache, with room for `max_len` positions of this model's."""
        room = self.max_len if max_len is None else max_len
        if isinstance(room, int) and room > self.max_len:
            raise UserError(f"max_len is {room}, but the model was compiled for {self.max_len}")
        return KVCache(
            self.spec, room, format=self.backend.cache_format, device=self.backend.device
        )

    # ----------------------------------------------------------------------------------------------
    # Low level

    def step(self, token: "int | Tensor", cache: KVCache) -> "tuple[Tensor, KVCache]":
        """Read one token and return the logits of the next, `[V]` float32, and the cache.

        Raises:
            UserError: the token is out of range, or the cache is full or of another model.
        """
        return self.feed([_whole(token)], cache), cache

    def feed(
        self, tokens: "Sequence[int] | Tensor", cache: KVCache, *, every: bool = False
    ) -> "Tensor":
        """Read tokens.

        Args:
            tokens: n >= 1 of them.
            cache: Its length grows by n.
            every: Whether the logits after each token are wanted.

        Returns:
            Logits `[V]` after the last token, or `[n, V]`, float32.

        Raises:
            UserError: as in `step`.
        """
        import torch

        checked = self._checked(tokens)
        self._check_cache(cache)
        cache.check_room(len(checked))
        parts = [self._decode(few, cache, 0, every=every)[0] for few in checked.split(BURST)]
        return torch.cat(parts) if every else parts[-1]

    def decode(
        self,
        cache: KVCache,
        token: "int | Tensor",
        *,
        steps: int,
        temperature: float | None = None,
        seed: int = 0,
        ends: Sequence[int] = (),
    ) -> "Tensor":
        """Read a token, choose the next, read it, and so on: `steps` tokens in one native call.

        In some more calls while the number of threads is found out, and where one takes far longer
        than it should.

        Args:
            cache: Its length grows by the number of tokens read.
            token: The last token, not yet in the cache.
            steps: How many to choose, at least 1.
            temperature: None takes the most likely token (the lowest number among equals); else
                tokens are drawn from softmax(logits / temperature) by adding Gumbel noise.
            seed: Of the draws: token n of a sequence depends on the seed and its position alone.
            ends: Tokens after which to stop.

        Returns:
            The tokens chosen, `[<= steps]` int64. The last one is not in the cache.

        Raises:
            UserError: as in `step`, or `steps`, `temperature` or `seed` is out of range.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps must be a whole number of at least 1, not {steps!r}")
        if temperature is not None and not COLDEST <= temperature < float("inf"):
            raise UserError(f"temperature must be at least {COLDEST} and finite: {temperature!r}")
        check_seed(seed)
        if isinstance(ends, str) or not isinstance(ends, Sequence):
            raise UserError(f"ends must be a list of tokens, not {ends!r}")
        ends = [_whole(token) for token in ends]
        import torch

        given = self._checked([_whole(token)])
        self._check_cache(cache)
        cache.check_room(steps)
        parts: list[Tensor] = []
        while steps:
            new = min(steps, self._threads.most or steps)
            _, chosen = self._decode(
                given, cache, new, temperature=temperature, seed=seed, ends=ends
            )
            parts.append(chosen)
            given = chosen[-1:]
            steps = 0 if int(given) in ends else steps - len(chosen)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(
        self, given: "Tensor", cache: KVCache, new: int, *, every: bool = False, **sampling: Any
    ) -> "tuple[Tensor, Tensor]":
        import torch

        self._check_cache(cache)
        steps = len(given) + max(new - 1, 0)
        cache.check_room(steps)
        shape = (steps, self.spec.vocab) if every else (self.spec.vocab,)
        logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        # What is only read has no head to compute: such calls say nothing of how long others take.
        timed = self._threads.measured(steps) if len(given) == 1 else self._threads.untimed(steps)
        with timed as call:
            if call.limit is not None:
                sampling["limit"] = call.limit
            chosen = self.backend.decode(
                cache.keys, cache.values, given, position=cache.length, new=new, logits=logits,
                threads=call.threads, **sampling,
            )  # fmt: skip
            call.tokens = len(given) + max(len(chosen) - 1, 0)
        cache.length += call.tokens
        return logits, chosen

    def _checked(self, tokens: "Sequence[int] | Tensor") -> "Tensor":
        import torch

        try:
            found = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"tokens must be a list of whole numbers ({error})") from error
        if found.ndim != 1 or not len(found):
            raise UserError(
                f"tokens must be a list of at least one, not of shape {list(found.shape)}"
            )
        if found.is_floating_point() or found.dtype == torch.bool:
            raise UserError(f"tokens must be whole numbers, not {found.dtype}")
        wrong = found[(found < 0) | (found >= self.spec.vocab)]
        if len(wrong):
            raise UserError(
                f"token {int(wrong[0])} is out of range: the model has the tokens 0 to "
                f"{self.spec.vocab - 1}"
            )
        return found.to(self.device, torch.int64).contiguous()

    def _check_cache(self, cache: KVCache) -> None:
        if not isinstance(cache, KVCache):
            raise UserError(
                f"a KVCache is needed, not {type(cache).__name__}; make one with new_cache() or "
                "KVCache.from_transformers"
            )
        if cache.spec != self.spec or cache.format != self.backend.cache_format:
            raise UserError(
                "this cache is of another model or format; make one with new_cache(), or with "
                f"KVCache.from_transformers(..., format={self.backend.cache_format!r})"
            )
        if cache.max_len > self.max_len:
            raise UserError(
                f"this cache has room for {cache.max_len} positions, but the model was compiled "
                f"for {self.max_len}"
            )

    # ----------------------------------------------------------------------------------------------
    # Generation

    def generate(
        self,
        input_ids: "Tensor | None" = None,
        generation_config: "GenerationConfig | None" = None,
        logits_processor: "Any | None" = None,
        stopping_criteria: "Any | None" = None,
        streamer: "BaseStreamer | None" = None,
        *,
        attention_mask: "Tensor | None" = None,
        past_key_values: KVCache | None = None,
        seed: int | None = None,
        **named: Any,
    ) -> "Tensor | Any":
        """Generate as `transformers` models do, for one sequence.

        Greedy decoding and sampling by temperature alone run in native calls of many tokens.
        Everything else (other processors, stopping criteria, scores asked for) goes through
        transformers' own loop, one native call a token, with the same meaning as there.

        Args:
            input_ids: `[1, n]` int64, n >= 1.
            generation_config: Defaults to that of the model.
            logits_processor: A `LogitsProcessorList`.
            stopping_criteria: A `StoppingCriteriaList`.
            streamer: Gets the prompt and then the tokens as they come.
            attention_mask: `[1, n]`, all ones.
            past_key_values: A cache whose positions are the first of `input_ids`; it is updated.
            seed: Of the draws. Defaults to one drawn from torch's generator.
            **named: Fields of `GenerationConfig`, such as `max_new_tokens`, `do_sample`, `top_p`;
                `tokenizer`, where `stop_strings` are given.

        Returns:
            `[1, n + new]` int64, or what transformers returns with `return_dict_in_generate`.

        Raises:
            UserError: a batch, padding, a prompt that does not fit, a generation mode other than
                greedy and sampling, or weights that changed since compiling; the message says what
                to do.
        """
        from flashformer.generation import generate

        self.check_fresh()
        return generate(
            self, input_ids, generation_config, logits_processor, stopping_criteria, streamer,
            attention_mask=attention_mask, cache=past_key_values, seed=seed, named=named,
        )  # fmt: skip

    __call__ = generate

    def prefill(self, tokens: "Tensor", cache: KVCache) -> "Tensor":
        """Read a prompt into a cache and return the logits after its last token, `[V]` float32.

        Long prompts are read by the transformers model the model was compiled from, in one pass
        with its own weights and in eval mode; short ones, and all of a model that was loaded, token
        by token.

        Raises:
            UserError: as in `step`; weights changed since compiling; or the model was loaded, has
                rotary positions that grow with the text, and the prompt is longer than it was made
                for, so that its tokens would not be those of transformers.
        """
        import torch

        self.check_fresh()
        tokens = self._checked(tokens)
        self._check_cache(cache)
        cache.check_room(len(tokens))
        if self.spec.growing and self.source is None:
            end = cache.length + len(tokens)
            if len(tokens) > 1 and end > self.spec.max_positions:
                raise UserError(
                    f"a prompt up to position {end} is over the {self.spec.max_positions} that the "
                    "model was made for; with dynamic rotary positions it must be read in one "
                    "pass, for which the transformers model is needed: compile it"
                )
        if self.source is None or cache.length or len(tokens) <= FEED:
            return self.feed(tokens, cache)
        from transformers import DynamicCache

        with torch.inference_mode(), _as_new(self.source):
            out: Any = self.source(
                tokens[None].to(self.source.device),
                past_key_values=DynamicCache(),  # without a config: no layer slides
                use_cache=True,
                logits_to_keep=1,
            )
        for number, layer in enumerate(out.past_key_values.layers):
            cache.put(number, layer.keys[0].to(self.device), layer.values[0].to(self.device))
        cache.length = len(tokens)
        return out.logits[0, -1].float().to(self.device)

    # ----------------------------------------------------------------------------------------------
    # Weights

    def check_fresh(self) -> None:
        """Refuse to go on with weights that are no longer those of the source.

        Raises:
            UserError: they changed. What is written through `.data` is noticed where the middle
                element of a weight differs.
        """
        if _versions(self.source) != self._versions:
            raise UserError(
                "the weights of the transformers model changed since it was compiled; call "
                "refresh() to pack them anew"
            )

    def refresh(self) -> None:
        """Pack the weights of the transformers model anew, after they changed.

        Raises:
            UserError: the model was loaded from a folder and has no transformers model.
        """
        if self._rebuild is None:
            raise UserError("this model was loaded and has no transformers model to refresh from")
        self.backend = self._rebuild()
        self._versions = _versions(self.source)

    def save(self, folder: "str | Path", *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Write the packed weights and the plan's settings into a folder that `load` reads.

        Args:
            folder: A new or empty one.
            overwrite: Replace a compiled model that is there.
            tokenizer: Of transformers; saved beside it.

        Raises:
            UserError: the folder is not empty and `overwrite` is not set, it holds other files, or
                the weights changed since compiling.
        """
        from flashformer.files import save

        self.check_fresh()
        save(self, Path(folder), overwrite=overwrite, tokenizer=tokenizer)

    def explain(self, *, gpu: str | None = None, position: int = 0) -> "Explanation":
        """Return what a token costs, stage by stage; see `flashformer.explain`."""
        from flashformer.roofline import explain

        zeros = any(matrix.zeros for matrix in self.backend.packed.values())
        return explain(
            self.spec, weights=self.weights, head=self.head, group=self.backend.group or 128,
            cache=self.backend.cache_format, zeros=zeros,
            gpu=gpu, workers=None if gpu else self.plan.workers, position=position,
            max_len=self.max_len,
        )  # fmt: skip


def _versions(source: "PreTrainedModel | None") -> int:
    """Return a number that grows when a weight is changed in place or replaced."""
    if source is None:
        return 0
    found = []
    for p in source.parameters():
        version = 0 if p.is_inference() else p._version  # those of inference mode have none
        found.append((p.data_ptr(), version, p.detach().view(-1)[p.numel() // 2].item()))
    return hash(tuple(found))


@contextmanager
def _as_new(source: "PreTrainedModel") -> Iterator[None]:
    """Put a model into eval mode, and rotary positions that grew with a text before back."""
    training = [module for module in source.modules() if module.training]
    rotary: Any = getattr(source.get_decoder(), "rotary_emb", None)
    grown = getattr(rotary, "rope_type", None) == "dynamic"
    if grown and rotary.max_seq_len_cached > rotary.original_max_seq_len:
        rotary.register_buffer("inv_freq", rotary.original_inv_freq, persistent=False)
        rotary.max_seq_len_cached = rotary.original_max_seq_len
    try:
        source.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _whole(token: "int | Tensor") -> int:
    """Return a token as a whole number, refusing what is none."""
    kind = getattr(token, "dtype", None)
    if isinstance(token, bool | float) or (kind is not None and "int" not in str(kind)):
        raise UserError(f"a token is a whole number, not {token!r}")
    try:
        return operator.index(token)
    except (TypeError, ValueError) as error:
        raise UserError(f"a token is a whole number, not {token!r}") from error


def warn_training(model: "PreTrainedModel") -> None:
    """Warn about a model in training mode: dropout is not compiled."""
    if model.training:
        warnings.warn(
            "the model is in training mode; compiled models have no dropout. Call model.eval()",
            stacklevel=4,
        )
