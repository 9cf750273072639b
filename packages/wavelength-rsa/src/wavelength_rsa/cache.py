"""A model that remembers what it said: an interrupted run goes on, a repeated one asks nothing.

Every answer is kept under a hash of all that decides it: the model (see `fingerprint`), the
prompts, the settings and the seed. What has changed is simply asked anew.
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
from tenfold_common.lm.base import Generation, Prompt, Score, TextModel, check_sampling

if TYPE_CHECKING:
    from types import TracebackType


class CachedModel:
    """Any `tenfold_common.lm` model with a memory on the disk.

    What a call returns is stored when it returns, so a kill loses at most one call; the listeners
    and speakers of this package ask in blocks. The answers are those of the model itself.

    Args:
        model: The model to ask. Its fingerprint is taken here: make another for other weights.
        path: The SQLite file; made if missing.
        identity: What tells this model from others. Defaults to `fingerprint(model)`.

    Attributes:
        hits: Number of prompts answered from the file.
        misses: Number of prompts the model was asked.

    Raises:
        UserError: the file is not such a cache or cannot be opened.
    """

    def __init__(
        self,
        model: TextModel,
        path: str | PathLike[str],
        *,
        identity: str | None = None,
    ) -> None:
        self.model = model
        self.path = Path(path)
        self.hits = self.misses = 0
        self._file = open_cache(path)
        self.identity = identity or fingerprint(model)

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
        key = self._key("sample", _plain(prompts), settings, seed)
        found = self._get(key, len(prompts))
        if found is None:
            made = self.model.sample(
                prompts, n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens,
                stop=stop, seed=seed,
            )  # fmt: skip
            found = [[[g.text, g.finish_reason, g.tokens] for g in each] for each in made]
            self._put({key: found})
        with _damage(self.path):
            return [[Generation(*g) for g in found[i]] for i in range(len(prompts))]

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
        missing = [i for i, value in enumerate(values) if value is None]
        if missing:
            made = self.model.score_many(
                [prefixes[i] for i in missing], [continuations[i] for i in missing]
            )
            for i, scores in zip(missing, made, strict=True):
                values[i] = [[list(s.logprobs), [list(o) for o in s.offsets]] for s in scores]
            self._put({keys[i]: values[i] for i in missing})
        with _damage(self.path):
            return [
                [Score(tuple(value[i][0]), tuple((a, b) for a, b in value[i][1])) for i in range(n)]
                for value, n in zip(values, map(len, continuations), strict=True)
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
        with _errors(self.path):
            row = self._file.execute("select value from answers where key = ?", (key,)).fetchone()
        if row is None:
            self.misses += prompts
            return None
        self.hits += prompts
        with _damage(self.path):
            return json.loads(row[0])

    def _put(self, values: dict[str, Any]) -> None:
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with _errors(self.path), self._file:  # one transaction
            self._file.executemany("insert or replace into answers values (?, ?)", rows)


def open_cache(path: str | PathLike[str]) -> sqlite3.Connection:
    """Open a cache file, made if missing: what `CachedModel` does before anything is asked.

    Raises:
        UserError: the file is not such a cache, cannot be opened, or has no folder.
    """
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        why = "is a folder" if file.is_dir() else "is in no folder that exists"
        raise UserError(f"the cache {str(file)!r} {why}; name a file")
    with _errors(file):
        connection = sqlite3.connect(file, timeout=60.0)
        try:
            names = [n for (n,) in connection.execute("select name from sqlite_master")]
            if names and "answers" not in names:
                raise UserError(
                    f"{file} is a database of something else (it holds {names[0]!r}); name another "
                    "file"
                )
            connection.execute(
                "create table if not exists answers (key text primary key, value text not null)"
            )
            connection.commit()
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise UserError(
            f"the cache {path} is damaged ({error}); delete it, or name another file"
        ) from error


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(
            f"the cache {path} cannot be used ({error}); name another file, or one made here, on a "
            "disk with room, that no other run holds"
        ) from error


def fingerprint(model: TextModel) -> str:
    """Return what tells a model from others, as `name:hash`; the hash does not depend on the name.

    Of a model in this process every weight enters, with its configuration, generation settings,
    adapters, tokenizer and template options, wherever it lies; of vLLM's the folder with the sizes
    and times of its files; of a server its address, the model's name, and what is sent beside the
    prompt. Other models are known by class and name. A folder replaced behind a server goes
    unnoticed.
    """
    if isinstance(model, CachedModel):
        return model.identity
    known: list[object] = [type(model).__name__]
    network: Any = getattr(model, "model", None)
    if hasattr(network, "state_dict"):
        known += _network(network)
    else:
        folder = Path(str(getattr(model, "source", "")))
        address = str(getattr(model, "base_url", "")).replace("//localhost", "//127.0.0.1")
        known += [model.name, str(folder), address.rstrip("/").removesuffix("/v1")]
        if hasattr(model, "source") and folder.is_dir():
            files = sorted(file for file in folder.iterdir() if file.is_file())
            known += [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    names = ("template_options", "skip_special_tokens", "extra", "context")
    known += [getattr(model, name, None) for name in names]
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        known += [getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map]
        inner = getattr(tokenizer, "backend_tokenizer", None)
        known.append(inner.to_str() if inner is not None else sorted(tokenizer.get_vocab().items()))
    text = json.dumps(known, sort_keys=True, default=_plainly)
    return f"{model.name}:{sha256(text.encode()).hexdigest()[:16]}"


def _network(network: Any) -> list[object]:
    """Return what a network in this process computes with; of its weights their hash."""
    import torch

    config = {k: v for k, v in network.config.to_dict().items() if k != "_name_or_path"}
    known: list[object] = [config, str(network.generation_config)]
    for module in network.modules():
        if hasattr(module, "_disable_adapters"):  # of peft: what scales an adapter is no weight
            names = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
            known.append([str(getattr(module, name, None)) for name in names])
    digest = sha256()
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        plain = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(plain.numpy()))
    return [*known, digest.hexdigest()]


def _plainly(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _plain(prompts: Sequence[Prompt]) -> list[object]:
    return [p if isinstance(p, str) else [dict(message) for message in p] for p in prompts]
