import math
import socket
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
from tenfold_common.testing import NetworkBlockedError

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
