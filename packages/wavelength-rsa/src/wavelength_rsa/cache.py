"""A model that remembers what it said: an interrupted run goes on, a repeated one asks nothing.

Every answer is kept under a hash of all that decides it: the model and its weights, the prompt, the
settings and the seed. What has changed is simply asked anew, so a cache is never stale.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold_common.errors import UserError
from tenfold_common.lm.base import Generation, Prompt, Score, TextModel, check_sampling, stream_seed

if TYPE_CHECKING:
    from types import TracebackType

_SAMPLED = 64  # values of each weight tensor that enter the fingerprint


class CachedModel:
    """Any `tenfold_common.lm` model with a memory on the disk.

    Samples are asked for and stored in blocks of prompts, so a kill loses at most one block. The
    texts depend on the block size; they are the same whether they come from the model or the file.

    Args:
        model: The model to ask.
        path: The SQLite file; made if missing.
        block: Prompts that are sampled and stored together, at least 1.
        identity: What tells this model from others. Defaults to its name and, for a model in this
            process, a fingerprint of its weights, configuration and chat template.

    Attributes:
        hits: Number of prompts answered from the file.
        misses: Number of prompts the model was asked.

    Raises:
        UserError: the file is not such a cache, cannot be opened, or `block` is below 1.
    """

    def __init__(
        self,
        model: TextModel,
        path: str | PathLike[str],
        *,
        block: int = 16,
        identity: str | None = None,
    ) -> None:
        if block < 1:
            raise UserError(f"block must be at least 1, not {block}")
        self.model = model
        self.path = Path(path)
        self.block = block
        self.identity = identity or fingerprint(model)
        self.hits = self.misses = 0
        if self.path.is_dir() or not self.path.parent.is_dir():
            why = "is a folder" if self.path.is_dir() else "is in no folder that exists"
            raise UserError(f"the cache {str(self.path)!r} {why}; name a file")
        with self._errors():
            self._file = sqlite3.connect(self.path, timeout=60.0)
            try:
                self._file.execute(
                    "create table if not exists answers (key text primary key, value text not null)"
                )
                self._file.commit()
            except BaseException:
                self._file.close()
                raise

    @property
    def name(self) -> str:
        """The name of the model behind."""
        return self.model.name

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model behind, or None where it has none in this process."""
        return getattr(self.model, "tokenizer", None)

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
        """Sample `n` texts per prompt; see `tenfold_common.lm.TextModel.sample`."""
        check_sampling(prompts, n, temperature, top_p, max_tokens, stop, seed)
        settings = {
            "n": n,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "stop": list(stop),
        }
        found: list[list[Generation]] = []
        for start in range(0, len(prompts), self.block):
            some = list(prompts[start : start + self.block])
            own = stream_seed(seed, start, 0) % 2**32
            key = self._key("sample", _plain(some), settings, own)
            value = self._get(key, len(some))
            if value is None:
                made = self.model.sample(
                    some, n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens,
                    stop=stop, seed=own,
                )  # fmt: skip
                value = [[[g.text, g.finish_reason, g.tokens] for g in each] for each in made]
                self._put({key: value})
            found += [[Generation(*g) for g in each] for each in value]
        return found

    def score(self, prefix: Prompt, continuations: Sequence[str]) -> list[Score]:
        """Log-probabilities of continuations; see `tenfold_common.lm.TextModel.score`."""
        return self.score_many([prefix], [continuations])[0]

    def score_many(
        self, prefixes: Sequence[Prompt], continuations: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        """Log-probabilities after several prefixes; see `tenfold_common.lm.TextModel`."""
        keys = [
            self._key("score", _plain([prefix]), list(texts))
            for prefix, texts in zip(prefixes, continuations, strict=True)
        ]
        values = [self._get(key, 1) for key in keys]
        for start in range(0, len(keys), self.block):
            missing = [
                i for i in range(start, min(start + self.block, len(keys))) if values[i] is None
            ]
            if not missing:
                continue
            made = self.model.score_many(
                [prefixes[i] for i in missing], [continuations[i] for i in missing]
            )
            for i, scores in zip(missing, made, strict=True):
                values[i] = [[list(s.logprobs), [list(o) for o in s.offsets]] for s in scores]
            self._put({keys[i]: values[i] for i in missing})
        return [
            [Score(tuple(logs), tuple((a, b) for a, b in spans)) for logs, spans in value]
            for value in values
        ]

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        self._file.close()

    def __enter__(self) -> "CachedModel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: "TracebackType | None",
    ) -> None:
        self.close()

    def _key(self, *parts: object) -> str:
        text = json.dumps([self.identity, *parts], sort_keys=True, ensure_ascii=True)
        return sha256(text.encode()).hexdigest()

    def _get(self, key: str, prompts: int) -> Any:
        with self._errors():
            row = self._file.execute("select value from answers where key = ?", (key,)).fetchone()
        if row is None:
            self.misses += prompts
            return None
        self.hits += prompts
        try:
            return json.loads(row[0])
        except ValueError as error:
            raise UserError(f"the cache {self.path} is damaged ({error}); delete it") from error

    def _put(self, values: dict[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._errors(), self._file:  # one transaction
            self._file.executemany("insert or replace into answers values (?, ?)", rows)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(
                f"the cache {self.path} cannot be used ({error}); it must be a file made here, on "
                "a disk with room, and not held by another run"
            ) from error


def fingerprint(model: TextModel) -> str:
    """Return what tells a model from others: its name, its place, and what it is made of.

    Of a model in this process a sample of every weight tensor enters, so that two checkpoints in
    folders of the same name differ. A server and vLLM are known by address or folder, and name.
    """
    network: Any = getattr(model, "model", None)
    parts: list[object] = [type(model).__name__, model.name]
    parts += [str(getattr(model, name)) for name in ("base_url", "source") if hasattr(model, name)]
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        parts.append(str(getattr(tokenizer, "chat_template", None)))
    options = getattr(getattr(model, "_tokens", None), "_options", None)
    parts.append(json.dumps(options, sort_keys=True, default=str))
    digest = sha256(json.dumps(parts).encode())
    if hasattr(network, "state_dict"):
        digest.update(network.config.to_json_string().encode())
        for name, weight in sorted(network.state_dict().items()):
            flat = weight.detach().flatten()
            some = flat[:: max(1, len(flat) // _SAMPLED)].float().cpu()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return f"{model.name}:{digest.hexdigest()[:16]}"


def _plain(prompts: Sequence[Prompt]) -> list[object]:
    return [p if isinstance(p, str) else [dict(message) for message in p] for p in prompts]
