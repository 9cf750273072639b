"""ServerModel against a small server on loopback that behaves well, or badly on purpose."""

import json
import math
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tenfold_common import Generation, Score, ServerModel, UserError
from tenfold_common.testing import no_network

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def _offline():
    with no_network(allow_loopback=True):
        yield


class FakeServer:
    """Answers like a model that echoes; `script` holds replies to give first."""

    def __init__(self):
        self.requests = []
        self.script = []  # (status, headers, body) or a function of the handler
        self.models = ["tiny"]
        self.running = 0
        self.most = 0
        self.pause = 0.0
        self.lock = threading.Lock()

    def posts(self):
        return [body for method, _, body, _ in self.requests if method == "POST"]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer("GET", None)

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        self._answer("POST", json.loads(self.rfile.read(size)))

    def _answer(self, method, body):
        fake = self.server.fake
        with fake.lock:
            fake.requests.append((method, self.path, body, dict(self.headers)))
            step = fake.script.pop(0) if fake.script else None
            fake.running += 1
            fake.most = max(fake.most, fake.running)
        time.sleep(fake.pause)
        with fake.lock:
            fake.running -= 1
        if callable(step):
            step(self)
        elif step:
            self.send(*step)
        elif self.path == "/v1/models":
            self.send(200, {}, {"data": [{"id": name} for name in fake.models]})
        elif method == "GET":
            self.send(404, {}, "no such page")
        elif body["model"] not in fake.models:
            self.send(404, {}, {"error": {"message": f"The model `{body['model']}` is not here."}})
        elif self.path == "/v1/completions":
            self.send(200, {}, completion(body))
        elif self.path == "/v1/chat/completions":
            self.send(200, {}, chat(body))
        else:
            self.send(404, {}, "no such page")

    def send(self, status, headers, body):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def completion(body):
    text = f"<{body['prompt']}> s{body.get('seed', 0) % 1000} END tail"
    choice = {"text": text, "finish_reason": "length"}
    if body.get("echo"):
        words = pieces(body["prompt"])
        values = [None, *(-float(len(word)) for word in words[1:])]
        choice["logprobs"] = {"tokens": [*words, "!"], "token_logprobs": [*values, -9.0]}
    return {"choices": [choice], "usage": {"completion_tokens": 1 if body.get("echo") else 7}}


def chat(body):
    laid_out = "".join(f"[{m['role']}] {m['content']}" for m in body["messages"])
    laid_out += "" if body.get("continue_final_message") else "[assistant] "
    answer = {
        "choices": [{"message": {"content": laid_out}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 3},
    }
    if "prompt_logprobs" in body:
        rows = [{str(k): {"logprob": -2.0, "decoded_token": c}} for k, c in enumerate(laid_out)]
        answer["prompt_logprobs"] = [None, *rows[1:]]
        # vLLM names no text for the first token; the fake's first character is lost likewise.
    return answer


def pieces(text):
    """Tokens of at most three characters that break before a space."""
    found = []
    for c in text:
        if found and c != " " and len(found[-1]) < 3:
            found[-1] += c
        else:
            found.append(c)
    return found


@pytest.fixture
def fake():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # clients hang up on purpose
    server.fake = FakeServer()
    server.fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.fake
    server.shutdown()
    server.server_close()
    thread.join()


def quick(fake, model="tiny", **named):
    return ServerModel(fake.url, model, **{"backoff": 0.001, **named})


def test_samples_come_in_order_with_seeds_of_their_own(fake):
    model = quick(fake)
    prompts = [f"p{i}" for i in range(12)]
    found = model.sample(prompts, n=2, seed=4, max_tokens=9, top_p=0.5, stop=["zz"])
    assert all(row[0].text.startswith(f"<p{i}>") for i, row in enumerate(found))
    assert found == model.sample(prompts, n=2, seed=4, max_tokens=9, top_p=0.5, stop=["zz"])
    assert found[0][0] == Generation(found[0][0].text, "length", 7)
    posts = fake.posts()
    assert len({body["seed"] for body in posts}) == 24
    del posts[0]["seed"], posts[0]["prompt"]
    assert posts[0] == {
        **{"model": "tiny", "n": 1, "temperature": 1.0, "top_p": 0.5, "max_tokens": 9},
        "stop": ["zz"],
    }


def test_a_text_is_cut_at_the_stop_string_if_the_server_does_not(fake):
    [[found]] = quick(fake).sample(["p"], stop=[" END"])
    assert found.text.startswith("<p> s")
    assert found.text[-1].isdecimal()
    assert found.finish_reason == "stop"


def test_greedy_asks_once_for_all_samples(fake):
    [row] = quick(fake).sample(["p"], n=5, temperature=0)
    assert len(row) == 5
    assert len(fake.posts()) == 1


def test_nothing_in_nothing_out(fake):
    assert quick(fake).sample([]) == []
    assert quick(fake).score("p", []) == []
    assert fake.requests == []


def test_messages_and_prefill(fake):
    model = quick(fake, extra={"top_k": -1})
    prefilled = [*CHAT, {"role": "assistant", "content": "so"}]
    begun = [*CHAT, {"role": "assistant", "content": ""}]
    texts = [row[0].text for row in model.sample([CHAT, prefilled, begun])]
    assert texts == ["[user] hi[assistant] ", "[user] hi[assistant] so", "[user] hi[assistant] "]
    for body in fake.posts():
        assert body["top_k"] == -1
        extras = ("continue_final_message" in body, body.get("add_generation_prompt"))
        assert extras == ((True, False) if len(body["messages"]) == 2 else (False, None))


def test_the_number_of_requests_under_way_is_bounded(fake):
    fake.pause = 0.02
    quick(fake, concurrency=3).sample(["p"], n=12)
    assert fake.most == 3


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(fake, status):
    fake.script = [(status, {}, "busy"), (status, {}, "busy")]
    [[found]] = quick(fake, concurrency=1).sample(["p"])
    assert found.tokens == 7
    posts = fake.posts()
    assert len(posts) == 3
    assert posts[0] == posts[2]


def test_retry_after_is_honoured(fake):
    def date():
        return formatdate(time.time() + 2, usegmt=True)

    for value, least, most in ((lambda: "1", 1, 20), (date, 0.5, 20), (lambda: "soon", 0, 0.9)):
        fake.script = [(429, {"Retry-After": value()}, "busy")]
        start = time.monotonic()
        quick(fake).sample(["p"])
        assert least <= time.monotonic() - start < most, value()


def test_a_broken_connection_is_tried_again(fake):
    fake.script = [lambda handler: handler.connection.close()]
    assert quick(fake, retries=1).sample(["p"])[0][0].tokens == 7

    def half(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")

    fake.script = [half]
    assert quick(fake, retries=1).sample(["p"])[0][0].tokens == 7


def test_an_answer_that_ends_with_the_connection_is_whole(fake):
    body = json.dumps(completion({"prompt": "p"})).encode()
    fake.script = [lambda handler: handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)]
    assert quick(fake, retries=0).sample(["p"])[0][0].tokens == 7


def test_after_the_last_try_the_reason_is_told(fake):
    fake.script = [(503, {}, {"error": {"message": "still loading"}})] * 3
    with pytest.raises(UserError, match=r"failed 3 times on /v1/completions.*503: still loading"):
        quick(fake, retries=2).sample(["p"])
    assert len(fake.posts()) == 3


def test_a_slow_server_times_out(fake):
    fake.pause = 0.5
    with pytest.raises(UserError, match=r"failed 2 times .* no answer within 0.05 seconds"):
        quick(fake, timeout=0.05, retries=1).sample(["p"])


def test_one_failure_ends_the_rest(fake):
    fake.script = [(400, {}, {"error": "bad request"})]
    fake.pause = 0.01
    with pytest.raises(UserError, match="answered 400 to /v1/completions: bad request"):
        quick(fake, concurrency=2).sample(["p"], n=100)
    assert len(fake.posts()) < 20


def test_a_wrong_model_name_lists_the_right_ones(fake):
    fake.models = ["tiny", "large"]
    with pytest.raises(UserError, match=r"no model 'tinny'; it offers tiny, large. Did you mean"):
        quick(fake, "tinny").sample(["p"])
    with pytest.raises(UserError, match="offers tiny, large; name the model"):
        quick(fake, None)
    fake.models = []
    with pytest.raises(UserError, match="offers no model; name"):
        quick(fake, None)
    fake.models = ["one"]
    assert quick(fake, None).name == "one"


def test_no_server_is_said_at_once():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = server.server_port
    server.server_close()
    with pytest.raises(UserError, match=r"no server listens at .*refused"):
        ServerModel(f"http://127.0.0.1:{port}", "m").sample(["p"])


def test_something_else_at_the_address(fake):
    with pytest.raises(UserError, match="answered 404 to /other/completions: no such page"):
        ServerModel(f"{fake.url}/other/", "tiny").sample(["p"])
    with pytest.raises(UserError, match="answered 404 to /other/models"):
        ServerModel(f"{fake.url}/other")
    fake.script = [(302, {"Location": f"{fake.url}/v1/completions"}, "")]
    with pytest.raises(UserError, match="answered 302"):
        quick(fake).sample(["p"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>hello", "is not JSON; it starts with '<html>hello'"),
        ("[1]", "is no JSON object"),
        ({}, "has no choices"),
        ({"choices": []}, "has no choices.0"),
        ({"choices": ["x"]}, "first choice is 'x', not an object"),
        ({"choices": [{"finish_reason": "stop"}]}, "has no text"),
        ({"choices": [{"text": "a", "finish_reason": "stop"}]}, "has no usage"),
        (
            {"choices": [{"text": "a"}], "usage": {"completion_tokens": "many"}},
            "counts 'many' completion tokens",
        ),
        (
            {"choices": [{"text": "a", "finish_reason": "tool_calls"}], "usage": {}},
            "finish_reason 'tool_calls'",
        ),
    ],
)
def test_malformed_answers_are_refused(fake, body, message):
    fake.script = [(200, {}, body)]
    with pytest.raises(UserError, match=message):
        quick(fake).sample(["p"])


def test_split_reasoning_is_refused_and_empty_replies_pass(fake):
    def answer(message):
        return (
            200,
            {},
            {
                "choices": [{"message": message, "finish_reason": None}],
                "usage": {"completion_tokens": 1},
            },
        )

    fake.script = [answer({"content": None, "reasoning_content": "hm"})]
    with pytest.raises(UserError, match="without a reasoning parser"):
        quick(fake).sample([CHAT])
    fake.script = [answer({"content": None})]
    assert quick(fake).sample([CHAT]) == [[Generation("", "stop", 1)]]


def test_the_key_is_sent_and_never_shown(fake, monkeypatch, caplog):
    monkeypatch.setenv("THE_KEY", "sk-secret")
    model = quick(fake, api_key_env="THE_KEY")
    model.sample(["p"])
    assert fake.requests[0][3]["Authorization"] == "Bearer sk-secret"
    fake.script = [(401, {}, {"error": {"message": "wrong key sk-secret"}})]
    with pytest.raises(UserError, match=r"401: wrong key \*\*\*.*variable THE_KEY") as caught:
        model.sample(["p"])
    assert "sk-secret" not in f"{caught.value!r}{model!r}{caplog.text}"
    fake.script = [(403, {}, "")]
    with pytest.raises(UserError, match=r"403: no explanation.*api_key_env"):
        quick(fake).sample(["p"])
    assert "Authorization" not in fake.requests[-1][3]


@pytest.mark.parametrize("value", [None, " ", "a\nb", "ü"])
def test_a_missing_or_odd_key_is_refused(monkeypatch, value):
    monkeypatch.delenv("THE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(UserError, match="variable THE_KEY"):
        ServerModel("http://h", "m", api_key_env="THE_KEY")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "starts with http:// or https://"),
        ("ftp://h/v1", "starts with http"),
        ("h:8000", "starts with http"),
        ("http://", "starts with http"),
        ("http://h:99999", "is not an address"),
        ("http://h/v1?x=1", r"no \? or # part"),
        ("http://h/a b", "white space"),
    ],
)
def test_addresses_that_are_none_are_refused(url, message):
    with pytest.raises(UserError, match=message):
        ServerModel(url, "m")


def test_a_password_in_the_address_is_not_shown():
    with pytest.raises(UserError, match="api_key_env") as caught:
        ServerModel("http://me:hidden@h/v1", "m")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "named", [{"timeout": 0}, {"backoff": -1}, {"retries": -1}, {"concurrency": 0}]
)
def test_wrong_settings_are_refused(named):
    with pytest.raises(UserError, match=next(iter(named))):
        ServerModel("http://h", "m", **named)


def test_an_unreachable_host_is_told():
    with pytest.raises(UserError, match="cannot reach http://localhost"), unresolved():
        ServerModel("http://localhost:1", "m").sample(["p"])


@contextmanager
def unresolved():
    import socket
    from unittest import mock

    with mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror("unknown name")):
        yield


def test_scores_of_texts(fake):
    scores = quick(fake).score("abc de", [" fgh", "xyz", " "])
    # The tokens: abc| de| fg|h and abc| de|xyz: the prefix is abc| de.
    assert scores[0] == Score((-3.0, -1.0), ((1, 3), (3, 4)))
    assert scores[1] == Score((-3.0,), ((0, 3),))
    assert scores[2].logprobs == (-1.0,)
    # Of abcd|... the prefix alone ends in a token of its own that merges: abc|d against abc|dxy.
    [merged] = quick(fake).score("abcd", ["xyz"])
    assert merged == Score((-3.0, -1.0), ((0, 2), (2, 3)))
    assert math.isclose(merged.total, -4.0)
    body = fake.posts()[0]
    assert (body["echo"], body["logprobs"], body["max_tokens"]) == (True, 0, 1)


def test_scores_of_messages(fake):
    prefilled = [*CHAT, {"role": "assistant", "content": "so"}]
    [score] = quick(fake).score(prefilled, [" it"])
    assert score == Score((-2.0,) * 3, ((0, 0), (1, 2), (2, 3)))
    [begun] = quick(fake).score(CHAT, ["it"])
    assert begun == Score((-2.0,) * 2, ((0, 1), (1, 2)))


def test_scores_of_many_prefixes_are_those_of_each_asked_at_once(fake):
    prefixes, texts = ["abc de", CHAT, "abcd", "z"], [[" fgh", "xyz"], ["it"], ["xyz", "q w"], []]
    wanted = [quick(fake).score(*pair) for pair in zip(prefixes, texts, strict=True)]
    alone = len(fake.posts())
    fake.pause = 0.05
    assert quick(fake, concurrency=4).score_many(prefixes, texts) == wanted
    assert fake.most == 4
    assert len(fake.posts()) == 2 * alone == 16  # a prefix without texts is not asked for
    assert quick(fake).score_many([], []) == []


def test_a_server_without_log_probabilities_is_told(fake):
    def plain(handler):
        handler.send(
            200,
            {},
            {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}},
        )

    for prefix in ("abc", CHAT):
        fake.script = [plain]
        with pytest.raises(UserError, match="gives no log-probabilities of prompts for 'tiny'"):
            quick(fake).score(prefix, ["d"])
    only_new = {"tokens": ["x"], "token_logprobs": [-1.0]}
    fake.script = [
        (
            200,
            {},
            {"choices": [{"logprobs": only_new}], "usage": {"completion_tokens": 1}},
        )
    ]
    with pytest.raises(UserError, match="gives no log-probabilities"):
        quick(fake).score("abc", ["d"])


def test_tokens_that_do_not_spell_the_text_are_refused(fake):
    def odd(handler):
        logprobs = {"tokens": ["ab", "?", "!"], "token_logprobs": [None, -1.0, -1.0]}
        handler.send(
            200, {}, {"choices": [{"logprobs": logprobs}], "usage": {"completion_tokens": 1}}
        )

    fake.script = [odd, odd]
    with pytest.raises(UserError, match="do not spell the prefix and then 'd'"):
        quick(fake).score("abc", ["d"])
    with pytest.raises(UserError, match="no token comes before"):
        quick(fake).score("a", ["b"])
