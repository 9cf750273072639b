"""Same conditions for every test: one thread, fixed seeds, no network."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

from tenfold_common.seed import seed_everything
from tenfold_common.testing import no_network, real_data_folder

torch.set_num_threads(1)
hypothesis.settings.register_profile("house", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _same_conditions() -> Iterator[None]:
    """Seed everything and refuse connections to other machines."""
    seed_everything(0)
    with no_network(allow_loopback=True):
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real data, or skip the test."""
    return real_data_folder(__file__)


CLUES = ("warm", "lukewarm", "boiling", "freezing", "75", "hot")
TEMPLATE = (
    "{% for m in messages %}<bos> {{ m.role }}: {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant: {% endif %}"
)


def bigram_player(folder: Path, *, chat: bool = True) -> Path:
    """Write a real Llama that plays: its next token depends on the last one only.

    After a prompt it says `<answer>t</answer>`, likelier the farther to the right, or one of CLUES
    in tags, as one token each, and then ends. All its layers add zero to the embedding, which is
    one-hot, so that the head's rows are the table of log-probabilities.
    """
    from tenfold_common.tiny import tiny_llama, word_tokenizer

    answers = [f"<answer>{t}</answer>" for t in range(101)]
    clues = [f"<clue>{c}</clue>" for c in CLUES]
    tokenizer = word_tokenizer([*answers, *clues, "assistant:", "Reply:"])
    if chat:
        tokenizer.chat_template = TEMPLATE
    size = -(-len(tokenizer) // 128) * 128  # of each head 32 or a multiple, as vLLM wants it
    model = tiny_llama(
        len(tokenizer), hidden=size, heads=4, kv_heads=4, layers=1, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids
    table = torch.full((len(tokenizer), len(tokenizer)), -30.0)  # [from, to]
    start = [ids(w) for w in ("assistant:", "Reply:", tokenizer.unk_token)]
    for t, word in enumerate(answers):
        table[start, ids(word)] = t / 50.0 if t % 5 == 0 else -10.0
    for word in clues:
        table[start, ids(word)] = 3.0
    table[[ids(w) for w in (*answers, *clues)], tokenizer.eos_token_id] = 30.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.zero_()
        embedding[:, : len(tokenizer)] = torch.eye(len(tokenizer))
        head = model.get_output_embeddings().weight
        head.zero_()
        head[:, : len(tokenizer)] = table.T / size**0.5  # the last norm scales one-hot rows
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def player(tmp_path_factory) -> Path:
    """A model folder that plays both roles, with a chat template."""
    return bigram_player(tmp_path_factory.mktemp("players") / "player")


@pytest.fixture(scope="session")
def base_player(tmp_path_factory) -> Path:
    """The same without a chat template."""
    return bigram_player(tmp_path_factory.mktemp("players") / "base", chat=False)


class FakeServer:
    """An OpenAI-compatible server on loopback that knows the game and a few clues.

    Attributes:
        models: Names it offers.
        logprobs: "given", "absent" (the field is ignored) or "refused" (answered with 400).
        peaks: Where clues point; others point to 50.
        reply: Text of every reply; by default a position near the clue's, or one of CLUES.
        script: (status, headers, body) to answer the next requests with.
        requests: (path, body, headers) of what was asked by POST.
        held: After so many of those `full` is set and answers wait for `go`.
    """

    def __init__(self) -> None:
        self.models, self.logprobs, self.reply = ["tiny"], "given", None
        self.peaks = {"fire": 90, "ice": 10}
        self.script: list = []
        self.requests: list = []
        self.held: int | None = None
        self.full, self.go, self.lock = threading.Event(), threading.Event(), threading.Lock()

    def asked(self) -> int:
        return len(self.requests)

    def answer(self, path: str, body: dict, headers: dict) -> tuple[int, dict, object]:
        with self.lock:
            self.requests.append((path, body, headers))
            scripted = self.script.pop(0) if self.script else None
            if self.held is not None and self.asked() > self.held:
                self.full.set()
        if self.full.is_set():
            self.go.wait(60)
        if scripted:
            return scripted
        if body["model"] not in self.models:
            return 404, {}, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if path != "/v1/chat/completions":
            return 404, {}, {"error": {"message": "Not Found"}}
        if "prompt_logprobs" in body and self.logprobs == "refused":
            return 400, {}, {"error": {"message": "Unrecognized argument: prompt_logprobs"}}
        message = {"role": "assistant", "content": self._reply(body)}
        found = {
            "choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 4},
        }
        if "prompt_logprobs" in body and self.logprobs == "given":
            found["prompt_logprobs"] = self._scored(body["messages"])
        return 200, {}, found

    def _reply(self, body: dict) -> str:
        choose = Random(body.get("seed", 0))
        if self.reply is not None:
            return self.reply
        text = body["messages"][0]["content"]
        if "<clue>" in text:
            return f"<clue>{choose.choice(CLUES)}</clue>"
        return f"<answer>{self.peak(text) + choose.randint(-10, 10)}</answer>"

    def peak(self, text: str) -> int:
        clue = text.rpartition("Clue:")[2].split("\n")[0].strip()
        return self.peaks.get(clue, 50)

    def _scored(self, messages: list) -> list:
        """Tokens with their log-probability: -|t - peak| / 20 for the number of an answer."""
        user, *reply = (m["content"] for m in messages)
        peak = self.peak(user)
        words = re.findall(r"<answer>|</answer>|[0-9]+|.+?", "".join(reply), re.DOTALL)
        rows = [(w, -abs(int(w) - peak) / 20 if w.isdecimal() else -0.25) for w in words]
        rows = [("user:", None), (user, -700.0), ("assistant:", -0.5), *rows]
        made = [{"7": {"logprob": v, "decoded_token": w}} for w, v in rows]
        return [None, *made[1:]]


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {}, {"data": [{"id": name} for name in self.server.fake.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(*self.server.fake.answer(self.path, body, dict(self.headers)))

    def _send(self, status: int, headers: dict, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # with the default of 5 a client waits a second for its turn
    daemon_threads = True


@pytest.fixture
def start_server() -> Iterator[Callable[[], FakeServer]]:
    """A function that starts one more FakeServer, whose `url` is its address."""
    running = []

    def start() -> FakeServer:
        server: Any = _Server(("127.0.0.1", 0), _Handler)
        server.handle_error = lambda *args: None  # who is interrupted hangs up
        server.fake = FakeServer()
        server.fake.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return server.fake

    yield start
    for server, thread in running:
        server.fake.go.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(start_server: Callable[[], FakeServer]) -> FakeServer:
    """One FakeServer."""
    return start_server()
