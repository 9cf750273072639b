import dataclasses
import fcntl
import json
import math
import socket
import subprocess
import time
import urllib.request

import pytest
import torch

from tenfold_common import (
    UserError,
    assert_matches_reference,
    no_network,
    poisoned_empty,
    rms_ratio,
)
from tenfold_common.testing import (
    NetworkBlockedError,
    assert_documented,
    defaults,
    import_time,
    imported_by,
    in_fresh_python,
    letter_tokenizer,
    positional,
    promised,
    python_blocks,
    real_data_folder,
    script_output,
    stale_tables,
    vllm_server,
)

# the two-times rule ---------------------------------------------------------------------------


def triple(dtype=torch.bfloat16, shape=(3, 5)):
    ref = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ref.to(dtype), ref, ref.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (1,)], ids=str)
def test_what_is_as_good_as_low_precision_passes(dtype, shape):
    out, ref, low = triple(dtype, shape)
    ratio = assert_matches_reference(out, ref, low, name="o")
    assert ratio == rms_ratio(out, ref)


def test_the_bound_is_two_times_and_no_more():
    ref = torch.zeros(4, dtype=torch.float64)  # rounds exactly, so that only `low` gives room
    low = torch.tensor([0.0, 1.0, 0.0, 0.0])
    out = torch.tensor([0.0, 0.0, 2.0, 0.0])
    assert_matches_reference(out, ref, low, name="o")
    out[2] = 2.001
    with pytest.raises(
        AssertionError, match=r"o: the largest error 2\.001e\+00 at \(2,\) exceeds 2"
    ):
        assert_matches_reference(out, ref, low, name="o")


def test_rounding_of_the_reference_gives_room():
    ref = torch.full((3,), 1.0, dtype=torch.float32) + 1e-3
    room = 2 * ((ref + 0.3 - 0.3) - ref).abs().max().item()
    assert room > 0
    assert_matches_reference(ref + room / 2, ref, ref.clone(), name="o")
    with pytest.raises(AssertionError, match="exceeds"):
        assert_matches_reference(ref + 3 * room, ref, ref.clone(), name="o")


def test_a_small_bug_in_one_element_is_found():
    out, ref, low = triple()
    out[1, 2] *= 1.05
    with pytest.raises(AssertionError, match=r"at \(1, 2\).*RMS ratio"):
        assert_matches_reference(out, ref, low, name="dq")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_values_that_are_not_finite_fail(bad, place):
    tensors = [tensor.clone() for tensor in triple()]
    tensors[place][0, 0] = bad
    with pytest.raises(AssertionError, match=f"1 of 15 values of {('out', 'ref', 'low')[place]}"):
        assert_matches_reference(*tensors, name="o")


def test_shapes_and_dtypes_must_fit():
    out, ref, low = triple()
    with pytest.raises(AssertionError, match=r"shapes of out, ref, low differ: \(5, 3\), \(3, 5\)"):
        assert_matches_reference(out.T, ref, low, name="o")
    with pytest.raises(AssertionError, match="shapes"):
        assert_matches_reference(out, ref, low[:1], name="o")
    with pytest.raises(AssertionError, match=r"out is torch\.float32, low is torch\.bfloat16"):
        assert_matches_reference(out.float(), ref, low, name="o")
    with pytest.raises(AssertionError, match=r"ref is torch\.bfloat16"):
        assert_matches_reference(out, ref.bfloat16(), low, name="o")


def test_gradients_may_be_attached():
    out, ref, low = triple(torch.float32)
    assert_matches_reference(out.requires_grad_(), ref.requires_grad_(), low, name="o")


def test_rms_ratio():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])
    assert rms_ratio(a, torch.tensor([0.0, 5.0])) == pytest.approx(math.sqrt(10) / 5)
    assert rms_ratio(b, b) == 0.0
    assert rms_ratio(b[:0], b[:0]) == 0.0
    assert rms_ratio(a, b) == math.inf
    with pytest.raises(UserError, match=r"shapes differ: \(2,\) and \(1,\)"):
        rms_ratio(a, b[:1])


# poisoned memory ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str
)
def test_empty_memory_is_nan(dtype):
    like = torch.zeros(2, dtype=dtype, requires_grad=True)
    with poisoned_empty():
        made = [
            torch.empty(2, 3, dtype=dtype),
            torch.empty_like(like),
            torch.empty_like(like, requires_grad=True),
            torch.empty_strided((2, 2), (2, 1), dtype=dtype),
            like.new_empty((3,)),
        ]
    assert all(bool(torch.isnan(tensor).all()) for tensor in made)
    assert made[2].requires_grad


def test_other_types_stay_and_the_end_restores():
    before = torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty
    with pytest.raises(ZeroDivisionError), poisoned_empty():  # noqa: PT012 - the block is the test
        assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
        assert torch.empty(2, dtype=torch.bool).dtype == torch.bool
        assert torch.empty is not before[0]
        raise ZeroDivisionError
    assert before == (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)


# no network (the fixture in conftest.py blocks it in all tests) -------------------------------


@pytest.mark.parametrize(
    ("family", "address"),
    [
        (socket.AF_INET, ("192.0.2.1", 80)),
        (socket.AF_INET, ("127.0.0.1", 80)),
        (socket.AF_INET6, ("2001:db8::1", 80, 0, 0)),
    ],
)
def test_every_way_out_is_blocked(family, address):
    with socket.socket(family, socket.SOCK_DGRAM) as datagram:
        for call in (datagram.connect, datagram.connect_ex):
            with pytest.raises(NetworkBlockedError, match="offline test"):
                call(address)
        with pytest.raises(NetworkBlockedError):
            datagram.sendto(b"x", address)
        with pytest.raises(NetworkBlockedError):
            datagram.sendto(b"x", 0, address)


def test_names_and_web_pages_are_blocked():
    with pytest.raises(NetworkBlockedError, match=r"'example\.com'.*allow_loopback=True"):
        socket.getaddrinfo("example.com", 80)
    with pytest.raises(NetworkBlockedError):
        socket.create_connection(("example.com", 80), timeout=1)
    with pytest.raises(NetworkBlockedError):
        urllib.request.urlopen("http://example.com", timeout=1)


def test_loopback_passes_when_allowed():
    with no_network(allow_loopback=True), socket.create_server(("127.0.0.1", 0)):
        pass  # the outer block of conftest.py still refuses; see below for a connection


def test_loopback_connects_and_nothing_else_does(request):
    import subprocess
    import sys

    code = """
import socket
from tenfold_common import no_network
from tenfold_common.testing import NetworkBlockedError
before = socket.socket.connect, socket.getaddrinfo
with no_network(allow_loopback=True), socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    for host in ("127.0.0.1", "localhost", b"localhost"):
        for kind, *_, address in socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM):
            with socket.socket(kind) as client:
                client.connect(address)
    socket.getaddrinfo(None, port)
    for host in ("192.0.2.1", "example.com", "", "0.0.0.0"):
        try:
            socket.create_connection((host, 80), timeout=1)
        except NetworkBlockedError as error:
            assert "allow_loopback" not in str(error), error
        else:
            raise AssertionError(host)
assert before == (socket.socket.connect, socket.getaddrinfo)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unix_sockets_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a Unix socket must be short
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("s")
        server.listen()
        client.connect("s")
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"x")
        assert other.recv(1) == b"x"


# real data ------------------------------------------------------------------------------------


def test_real_data_are_beside_the_repository_or_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.delenv("TENFOLD_DATA", raising=False)
    start = tmp_path / "repository" / "packages" / "rlcr" / "tests" / "conftest.py"
    start.parent.mkdir(parents=True)
    with pytest.raises(pytest.skip.Exception, match="set TENFOLD_DATA"):
        real_data_folder(start)
    beside = tmp_path / "shared" / "data"
    beside.mkdir(parents=True)
    assert real_data_folder(start) == real_data_folder(str(start)) == beside
    with pytest.raises(pytest.skip.Exception):
        real_data_folder(beside / "conftest.py")  # no repository
    monkeypatch.setenv("TENFOLD_DATA", str(start.parent))
    assert real_data_folder(start) == start.parent
    monkeypatch.setenv("TENFOLD_DATA", str(start.parent / "absent"))
    with pytest.raises(UserError, match=r"TENFOLD_DATA names .*absent', which is no folder"):
        real_data_folder(start)


# a server -------------------------------------------------------------------------------------

# In place of vLLM's: first it is busy, then it answers with its arguments. A child holds a lock.
FAKE_SERVER = """
import json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

behaviour = os.environ["FAKE"]
if behaviour == "dies":
    sys.exit("x" * 5000 + "no memory")
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a child inherits
child = "import fcntl, os, time; file = open(os.environ['LOCK'], 'w'); "
child += "fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE).stdout.readline()
busy = [503] * (10**6 if behaviour == "busy" else 1)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(busy.pop() if busy else 200)
        self.end_headers()
        facts = [*sys.argv[1:], os.environ["VLLM_CPU_KVCACHE_SPACE"]]
        self.wfile.write(json.dumps(facts).encode())

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class TestServer:
    @pytest.fixture(autouse=True)
    def _offline(self):
        with no_network(allow_loopback=True):
            yield

    @pytest.fixture
    def lock(self, tmp_path, monkeypatch):
        """The file that the child of the fake server locks while it lives."""
        module = tmp_path / "fake" / "vllm" / "entrypoints" / "openai" / "api_server.py"
        module.parent.mkdir(parents=True)
        module.write_text(FAKE_SERVER)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
        monkeypatch.setenv("LOCK", str(tmp_path / "lock"))
        return tmp_path / "lock"

    @staticmethod
    def is_held(lock):
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def wait_until_free(self, lock):
        """A process that was killed takes a moment to go."""
        end = time.monotonic() + 10
        while self.is_held(lock):
            assert time.monotonic() < end
            time.sleep(0.05)

    def test_it_answers_and_is_gone_afterwards_with_its_children(self, lock, tmp_path, monkeypatch):
        monkeypatch.setenv("FAKE", "obeys")
        arguments = ("--max-model-len", "256")
        with vllm_server("m", log=tmp_path / "log", name="n", arguments=arguments) as address:
            with urllib.request.urlopen(address, timeout=10) as answer:  # noqa: S310 - loopback
                found = json.load(answer)
            assert self.is_held(lock)
        self.wait_until_free(lock)
        port = address.rpartition(":")[2]
        assert found == [
            *("--model", "m", "--dtype", "float32", "--enforce-eager", "--served-model-name", "n"),
            *("--host", "127.0.0.1", "--port", port, "--max-model-len", "256", "1"),
        ]
        assert "GET /health" in (tmp_path / "log").read_text()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), timeout=10)

    def test_who_does_not_end_when_asked_is_killed(self, lock, tmp_path, monkeypatch):
        monkeypatch.setenv("FAKE", "stubborn")
        monkeypatch.setattr("tenfold_common.testing._TO_STOP", 0.5)
        monkeypatch.setattr("tenfold_common.testing._TO_CLEAR_UP", 0.5)
        with vllm_server("m", log=tmp_path / "log") as address:
            pass
        self.wait_until_free(lock)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10)

    def test_one_that_dies_is_an_error_with_the_end_of_its_log(self, lock, tmp_path, monkeypatch):
        monkeypatch.setenv("FAKE", "dies")
        with (
            pytest.raises(AssertionError, match=r"^the server ended: x{2990}no memory\n$"),
            vllm_server("m", log=tmp_path / "log"),
        ):
            pass
        assert not lock.exists()

    def test_one_that_is_not_ready_in_time_is_an_error(self, lock, tmp_path, monkeypatch):
        monkeypatch.setenv("FAKE", "busy")
        with (
            pytest.raises(AssertionError, match=r"^the server did not answer in 1 s: "),
            vllm_server("m", log=tmp_path / "log", seconds=1),
        ):
            pass
        self.wait_until_free(lock)


def test_letters_go_in_and_come_out():
    tokenizer = letter_tokenizer()
    text = "Is 1 + 1 = 2?\nYes!"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "Hi"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == "<bos>user: Hi<eos><bos>assistant: "


# what a package offers ------------------------------------------------------------------------


def test_a_fresh_python_prints_or_fails():
    assert in_fresh_python("print(' a b ')") == "a b"
    with pytest.raises(subprocess.CalledProcessError):
        in_fresh_python("1 / 0")


def test_imported_modules_are_named_in_the_order_asked_for():
    modules = ("torch", "wave", "json")
    assert imported_by("import json", modules) == ["json"]
    assert imported_by("import json, wave", modules) == ["wave", "json"]
    assert imported_by("pass", ("torch",)) == []


def test_the_time_of_an_import_is_that_of_the_module(tmp_path, monkeypatch):
    (tmp_path / "busy_module.py").write_text(
        "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert 0.2 <= import_time("busy_module") < 2
    assert 0 <= import_time("sys") < 0.1


def test_parameters_by_kind_and_default():
    def function(a, b, c=1, *rest, d, e=None, **named):
        pass

    assert positional(function) == ["a", "b", "c"]
    assert defaults(function) == {"c": 1, "e": None}


class Documented:
    """It has a docstring."""

    def method(self):
        """So has this."""

    @classmethod
    def make(cls):
        """And this."""

    @property
    def size(self):
        """And that."""

    def _private(self):
        pass

    number = 1


class Child(Documented):
    """Its method has the docstring of the parent's."""

    def method(self):
        pass


class Bare(Documented):
    pass


def test_what_is_documented_passes():
    assert_documented(Documented)
    assert_documented(Documented.method)
    assert_documented(Child)


@pytest.mark.parametrize("kind", ["function", "classmethod", "property"])
def test_a_member_without_a_docstring_is_named(kind):
    def bare(self):
        pass

    member = {"function": bare, "classmethod": classmethod(bare), "property": property(bare)}[kind]
    with pytest.raises(AssertionError, match=r"^Some\.bare has no docstring$"):
        assert_documented(type("Some", (), {"__doc__": "Some.", "bare": member}))


def test_a_missing_or_generated_docstring_is_an_error():
    with pytest.raises(AssertionError, match=r"has no docstring$"):
        assert_documented(triple)
    with pytest.raises(AssertionError, match=r"has no docstring of its own$"):
        assert_documented(Bare)
    with pytest.raises(AssertionError, match=r"has no docstring of its own$"):
        assert_documented(dataclasses.make_dataclass("Point", ["x"]))


def test_script_output_runs_offline_in_its_folder(tmp_path):
    script = tmp_path / "a b.py"
    script.write_text("import os\nprint(os.environ['HF_HUB_OFFLINE'])\nprint(os.getcwd())\n")
    assert script_output(script, tmp_path) == ["1", str(tmp_path.resolve())]
    script.write_text("raise SystemExit('no such luck')\n")
    with pytest.raises(AssertionError, match="no such luck"):
        script_output(script, tmp_path)


def test_promised_reads_the_comments_behind_prints():
    source = (
        "print(1)  # 1\nx = 2  # two\nprint(x, 'a')  # 2 a: how many there are\n  print(3)  # 3\n"
    )
    assert promised(source) == ["1", "2 a"]
    assert python_blocks("```python\na = 1\n```\n\n```bash\nls\n```\n") == ["a = 1\n"]


def test_stale_tables_are_named(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "report.py").write_text(
        "from pathlib import Path\n"
        "HERE = Path(__file__).parent\n"
        "READMES = {HERE.parent / 'README.md': ('benchmarks/', ('a', 'b'))}\n"
        "def text_of(kind, folder):\n    return f'{kind} in {folder}'\n"
    )
    text = "".join(
        f"<!-- {kind}:begin -->\n{shown}\n<!-- {kind}:end -->\n"
        for kind, shown in (("a", "a in benchmarks/"), ("b", "old"))
    )
    (tmp_path / "README.md").write_text(text)
    assert stale_tables(tmp_path) == ["README.md: b"]
    (tmp_path / "README.md").write_text(text.replace("old", "b in benchmarks/"))
    assert stale_tables(tmp_path) == []
