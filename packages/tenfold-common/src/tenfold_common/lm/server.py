"""A language model behind any server that speaks OpenAI's HTTP interface."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from tenfold_common.errors import UserError, suggest
from tenfold_common.lm.base import (
    FinishReason,
    Generation,
    Prompt,
    Score,
    check_continuations,
    check_sampling,
    check_scoring,
    first_stop,
    stream_seed,
)
from tenfold_common.lm.tokens import common_length

if TYPE_CHECKING:
    from http.client import HTTPResponse

T = TypeVar("T")
R = TypeVar("R")

_BUSY = frozenset({429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for
_LARGEST = 256 * 2**20  # bytes of an answer


class ServerModel:
    """Samples and scores through `/v1/completions` (texts) and `/v1/chat/completions` (messages).

    Every sample is a request of its own with its own seed, `concurrency` of them at a time.
    Requests are tried again after 429, 500, 502, 503, 504, a broken connection or a time-out, with
    waits that double, or as long as `Retry-After` says (at most a minute). Redirects are not
    followed and proxies of the environment are not used. How reproducible samples are is up to
    the server, and so are settings that are not sent, such as `top_k`: name them in `extra`.

    Args:
        base_url: Such as `"http://127.0.0.1:8000"`; without a path, `/v1` is added.
        model: The model's name there. Defaults to the only one the server offers.
        api_key_env: Name of the environment variable with the API key. Defaults to no key.
        timeout: Seconds to wait for an answer. Defaults to 120.
        retries: How often a request is tried again. Defaults to 5.
        backoff: Seconds before the first new try. Defaults to 0.5.
        concurrency: The most requests under way. Defaults to 8.
        extra: Further fields for every request, such as `{"top_k": -1}`.

    Raises:
        UserError: the address is not http(s), the variable is not set, or the server cannot be
            reached, offers no such model, refuses, or does not answer as it should.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 0.5,
        concurrency: int = 8,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        self._secure, self._host, self._port, self._path = _split(base_url)
        self.base_url = base_url
        for label, number, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if number < least:
                raise UserError(f"{label} must be at least {least}, not {number}")
        if timeout <= 0 or backoff < 0:
            raise UserError(
                f"timeout {timeout} must be above 0 and backoff {backoff} at least 0 (seconds)"
            )
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.concurrency = concurrency
        self.extra = dict(extra or {})
        self._api_key_env = api_key_env
        self._key = _key(api_key_env)
        self.name = model or self._only_model()

    def __repr__(self) -> str:
        return f"ServerModel({self.base_url!r}, {self.name!r})"

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
        different = n if temperature > 0 else 1
        settings: dict[str, object] = {
            **{"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens},
            **({"stop": list(stop)} if stop else {}),
        }

        def one(job: tuple[int, int], halt: threading.Event) -> Generation:
            i, j = job
            fields = {**settings, "seed": stream_seed(seed, i, j)}
            return _generation(*self._complete(prompts[i], fields, halt), stop)

        jobs = [(i, j) for i in range(len(prompts)) for j in range(different)]
        done = dict(zip(jobs, self._all(one, jobs), strict=True))
        return [[done[i, j % different] for j in range(n)] for i in range(len(prompts))]

    def score(self, prefix: Prompt, continuations: Sequence[str]) -> list[Score]:
        """Log-probabilities of texts that could follow a prefix; see `TextModel.score`.

        The server must return log-probabilities of the prompt: for texts through `echo`, for
        messages through vLLM's `prompt_logprobs`. One more request for the prefix alone tells
        whether it does, and where the prefix ends.
        """
        check_continuations(prefix, continuations)
        return self.score_many([prefix], [continuations])[0]

    def score_many(
        self, prefixes: Sequence[Prompt], continuations: Sequence[Sequence[str]]
    ) -> list[list[Score]]:
        """Scores for several prefixes, all requests at once; see `TextModel.score_many`."""
        check_scoring(prefixes, continuations)
        items = list(zip(prefixes, continuations, strict=True))
        # The prefixes first: a server that cannot score has then been asked for little.
        alone = [prefix for prefix, texts in items if texts]
        whole = [_extended(prefix, text) for prefix, texts in items for text in texts]
        found = iter(self._all(self._prompt_tokens, alone + whole))
        starts = iter([next(found) for _ in alone])
        scores = []
        for _, texts in items:
            start = next(starts) if texts else []
            scores.append([_score(start, next(found), text) for text in texts])
        return scores

    def _complete(
        self, prompt: Prompt, fields: Mapping[str, object], halt: threading.Event
    ) -> tuple[dict, dict]:
        """The whole answer and its only choice."""
        body = {"model": self.name, "n": 1, **fields, **self.extra}
        if isinstance(prompt, str):
            answer = self._post("completions", {**body, "prompt": prompt}, halt)
        else:
            messages = [dict(message) for message in prompt]
            if messages[-1]["role"] == "assistant":
                if messages[-1]["content"]:
                    body |= {"add_generation_prompt": False, "continue_final_message": True}
                else:
                    del messages[-1]  # nothing said yet: the reply just begins
            answer = self._post("chat/completions", {**body, "messages": messages}, halt)
        choice = _field(answer, "choices", 0)
        if not isinstance(choice, dict):
            raise UserError(f"the server's first choice is {choice!r}, not an object")
        return answer, choice

    def _prompt_tokens(
        self, prompt: Prompt, halt: threading.Event
    ) -> list[tuple[str, float | None]]:
        """Text and log-probability of each token of a prompt (the first has None)."""
        fields = {"max_tokens": 1, "temperature": 0}
        if isinstance(prompt, str):
            answer, choice = self._complete(prompt, {**fields, "echo": True, "logprobs": 0}, halt)
            found = choice.get("logprobs") or {}
            texts, values = found.get("tokens") or [], found.get("token_logprobs") or []
            tokens = list(zip(texts, values, strict=False))[: len(texts) - _generated(answer)]
        else:
            answer, _ = self._complete(prompt, {**fields, "prompt_logprobs": 0}, halt)
            rows = answer.get("prompt_logprobs") or []
            tokens = [_first_of(row) for row in rows]
        if not tokens or tokens[0][1] is not None or any(v is None for _, v in tokens[1:]):
            raise UserError(
                f"the server at {self.base_url} gives no log-probabilities of prompts for "
                f"{self.name!r}, so it cannot score; vLLM's server does"
            )
        return tokens

    def _only_model(self) -> str:
        offered = self._offered(threading.Event())
        if len(offered) != 1:
            raise UserError(
                f"the server at {self.base_url} offers {_listed(offered)}; name the model to use"
            )
        return offered[0]

    def _offered(self, halt: threading.Event) -> list[str]:
        status, text = self._request("GET", "models", None, halt)
        if status != 200:
            raise self._refusal(status, text, "models")
        models = _field(_parsed(text, self.base_url), "data")
        return [str(_field(entry, "id")) for entry in models]

    def _post(self, path: str, body: Mapping[str, object], halt: threading.Event) -> dict:
        import json

        status, text = self._request("POST", path, json.dumps(body).encode(), halt)
        if status == 200:
            return _parsed(text, self.base_url)
        if status in (400, 404) and "model" in text.lower():
            offered = self._offered(halt)
            if self.name not in offered:
                raise UserError(
                    f"the server at {self.base_url} has no model {self.name!r}; it offers "
                    f"{_listed(offered)}.{suggest(self.name, offered)}"
                )
        raise self._refusal(status, text, path)

    def _refusal(self, status: int, text: str, path: str) -> UserError:
        said = self._told(text)
        if status in (401, 403):
            remedy = (
                f"check the key in the environment variable {self._api_key_env}"
                if self._api_key_env
                else "name the environment variable that holds the key (api_key_env)"
            )
            return UserError(
                f"the server at {self.base_url} refuses access ({status}: {said}); {remedy}"
            )
        return UserError(f"{self.base_url} answered {status} to {self._path}/{path}: {said}")

    def _told(self, text: str) -> str:
        """What an error body says, in one line of bounded length, never with the key."""
        import json

        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict):
            error = value.get("error", value)
            inner = error.get("message") if isinstance(error, dict) else error
            text = str(inner or text)
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:300] or "no explanation"

    def _request(
        self, method: str, path: str, body: bytes | None, halt: threading.Event
    ) -> tuple[int, str]:
        """Status and text of the answer, after as many tries as it takes."""
        from http.client import HTTPException
        from random import Random

        jitter = Random()
        attempt, failure = 0, ""
        for attempt in range(self.retries + 1):
            asked = None
            try:
                status, text, asked = self._once(method, path, body)
                if status not in _BUSY:
                    return status, text
                failure = f"{status}: {self._told(text)}"
            except ConnectionRefusedError as error:
                raise UserError(
                    f"no server listens at {self.base_url} (connection refused); start it, or "
                    "check the address and the port"
                ) from error
            except TimeoutError:
                failure = f"no answer within {self.timeout:g} seconds; a larger timeout may help"
            except (ConnectionError, HTTPException) as error:
                failure = f"the connection broke ({type(error).__name__})"
            except OSError as error:
                raise UserError(f"cannot reach {self.base_url}: {error}") from error
            if attempt < self.retries:
                wait = self.backoff * 2**attempt * (1 + jitter.random() / 4)
                halt.wait(min(wait if asked is None else asked, _LONGEST_WAIT))
            if halt.is_set():
                break
        raise UserError(
            f"{self.base_url} failed {attempt + 1} times on {self._path}/{path}; the last time: "
            f"{failure}"
        )

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, str, float | None]:
        from http.client import HTTPConnection, HTTPSConnection

        kind = HTTPSConnection if self._secure else HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        headers = {"Accept": "application/json", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, f"{self._path}/{path}", body, headers)
            with connection.getresponse() as response:
                return response.status, _read(response), _retry_after(response)
        finally:
            connection.close()

    def _all(self, job: Callable[[T, threading.Event], R], items: Sequence[T]) -> list[R]:
        """Run a job per item in threads; the first failure ends them all."""
        from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

        halt = threading.Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(job, item, halt) for item in items]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                halt.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]


def _split(url: str) -> tuple[bool, str, int | None, str]:
    from urllib.parse import urlsplit

    if "@" in url.partition("://")[2].partition("/")[0]:  # shown nowhere: it may hold a password
        raise UserError("the server's address holds a user name; give the key by api_key_env")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{url!r} is not an address: {error}") from error
    if any(c.isspace() or not c.isprintable() for c in url):
        raise UserError(f"an address has no white space or control characters, unlike {url!r}")
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(
            f"a server's address starts with http:// or https:// and a host, not {url!r}"
        )
    if parts.query or parts.fragment:
        raise UserError(f"a server's address has no ? or # part, unlike {url!r}")
    return parts.scheme == "https", host, port, parts.path.rstrip("/") or "/v1"


def _key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} with the API key is not set")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the API key in the environment variable {variable} has odd characters")
    return key


def _read(response: HTTPResponse) -> str:
    from http.client import IncompleteRead

    data = response.read(_LARGEST + 1)
    if response.length and len(data) <= _LARGEST:
        raise IncompleteRead(data)  # read() with a limit does not say so itself
    if len(data) > _LARGEST:
        raise UserError(f"the server's answer is larger than {_LARGEST // 2**20} MiB")
    return data.decode("utf-8", "replace")


def _retry_after(response: HTTPResponse) -> float | None:
    """Seconds that the server asks to wait: a number, or the time until a date."""
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _parsed(text: str, url: str) -> dict:
    import json

    try:
        value = json.loads(text)
    except ValueError as error:
        start = " ".join(text.split())[:80]
        raise UserError(f"the answer of {url} is not JSON; it starts with {start!r}") from error
    if not isinstance(value, dict):
        raise UserError(f"the answer of {url} is no JSON object, so no OpenAI-compatible server")
    return value


def _field(value: Any, *path: str | int) -> Any:
    """A field of an answer, or a UserError that names it."""
    for depth, key in enumerate(path):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError) as error:
            place = ".".join(map(str, path[: depth + 1]))
            raise UserError(
                f"the server's answer has no {place}; is it an OpenAI-compatible server?"
            ) from error
    return value


def _generation(answer: dict, choice: dict, stop: Sequence[str]) -> Generation:
    if "message" in choice:
        message = choice["message"] or {}
        text = message.get("content")
        if text is None and (message.get("reasoning_content") or message.get("reasoning")):
            raise UserError(
                "the server splits replies into reasoning and content; start it without a "
                "reasoning parser, so that texts come whole"
            )
        text = text or ""
    else:
        text = _field(choice, "text")
    reasons: dict[object, FinishReason] = {"stop": "stop", "length": "length", None: "stop"}
    given = choice.get("finish_reason")
    if given not in reasons or not isinstance(text, str):
        raise UserError(
            f"the server ended a reply with finish_reason {given!r}, not stop or length"
        )
    tokens = _generated(answer)
    end = first_stop(text, stop)
    if end is not None:
        return Generation(text[:end], "stop", tokens)
    return Generation(text, reasons[given], tokens)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no model"


def _generated(answer: dict) -> int:
    """How many tokens the server says it generated."""
    tokens = _field(answer, "usage", "completion_tokens")
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise UserError(f"the server counts {tokens!r} completion tokens, which is no number")
    return tokens


def _extended(prefix: Prompt, text: str) -> Prompt:
    if isinstance(prefix, str):
        return prefix + text
    if prefix[-1]["role"] == "assistant":
        return [*prefix[:-1], {"role": "assistant", "content": prefix[-1]["content"] + text}]
    return [*prefix, {"role": "assistant", "content": text}]


def _first_of(row: Mapping[str, object] | None) -> tuple[str, float | None]:
    """Text and log-probability of the only entry of one of vLLM's `prompt_logprobs`."""
    if not row:
        return "", None
    entry = next(iter(row.values()))
    return str(_field(entry, "decoded_token")), float(_field(entry, "logprob"))


def _score(
    start: Sequence[tuple[str, float | None]], both: Sequence[tuple[str, float | None]], text: str
) -> Score:
    words = [word for word, _ in both]
    before, told = _compact("".join(word for word, _ in start)), _compact("".join(words))
    if told != before + _compact(text):
        raise UserError(
            f"the tokens that the server names do not spell the prefix and then {text!r}: its "
            "chat template changes them, or a character is split over tokens"
        )
    first = common_length([word for word, _ in start], words)
    if first == len(words):
        raise UserError(f"the continuation {text!r} adds no token to the prefix")
    if first == 0:
        raise UserError(
            f"no token comes before the continuation {text!r}, so it has no probability; give a "
            "longer prefix"
        )
    ends = list(accumulate((len(_compact(word)) for word in words), initial=-len(before)))
    spans = [_span(text, *pair) for pair in zip(ends[first:], ends[first + 1 :], strict=False)]
    return Score(tuple(float(v or 0.0) for _, v in both[first:]), tuple(spans))


def _compact(text: str) -> str:
    """A text without white space: servers differ in the spaces of single tokens."""
    return "".join(text.split())


def _span(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the visible characters number `start` to `end` of a text are; a gap if none."""
    places = [k for k, character in enumerate(text) if not character.isspace()]
    start, end = max(0, start), max(0, end)
    if start < end:
        return places[start], places[end - 1] + 1
    left = places[start - 1] + 1 if start else 0
    return left, max(left, places[start] if 0 < start < len(places) else left)
