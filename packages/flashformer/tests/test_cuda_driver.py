"""What the driver is asked for, with a driver that only takes notes."""

import ctypes

import pytest

from flashformer import cuda_driver
from flashformer.cuda_driver import CudaError, Graph, Module, blocks_per_unit, launch


class Driver:
    """Notes every call; `codes` says which ones fail."""

    def __init__(self):
        self.calls, self.codes = [], {}

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, arguments))
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"something broke"
            if name == "cuOccupancyMaxActiveBlocksPerMultiprocessor":
                arguments[0]._obj.value = 2
            return self.codes.get(name, 0)

        return call

    @property
    def names(self):
        return [name for name, _ in self.calls]


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: found)
    return found


def test_structs_have_the_sizes_of_the_headers():
    attribute, config = cuda_driver._Attribute, cuda_driver._Config
    assert (ctypes.sizeof(attribute), attribute.value.offset) == (72, 8)
    assert (ctypes.sizeof(config), config.stream.offset) == (56, 32)
    assert (config.attributes.offset, config.count.offset) == (40, 48)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, []), ({"cooperative": True}, [(2, 1)]), ({"overlap": True}, [(6, 1)])],
)
def test_launch(driver, options, expected):
    number = ctypes.c_int32(7)
    launch(ctypes.c_void_p(5), 132, 256, 1000, 99, [number], **options)
    name, (config, kernel, arguments, extra) = driver.calls[0]
    config = config._obj
    assert name == "cuLaunchKernelEx"
    assert kernel.value == 5
    assert extra is None
    assert (config.gx, config.gy, config.gz) == (132, 1, 1)
    assert (config.bx, config.by, config.bz, config.shared) == (256, 1, 1, 1000)
    assert config.stream == 99
    found = [(config.attributes[i].id, config.attributes[i].value) for i in range(config.count)]
    assert found == expected
    assert ctypes.c_int32.from_address(arguments[0]).value == 7


def test_errors_name_the_call_and_keep_the_number(driver):
    driver.codes["cuLaunchKernelEx"] = cuda_driver.TOO_LARGE
    with pytest.raises(
        CudaError, match=r"cuLaunchKernelEx failed: something broke \(error 720\)"
    ) as e:
        launch(ctypes.c_void_p(5), 1, 1, 0, None, [])
    assert e.value.code == cuda_driver.TOO_LARGE


def test_a_kernel_is_looked_up_once(driver):
    module = Module(b"cubin")
    assert module.kernel("ff_decode", 1000) is module.kernel("ff_decode", 1000)
    assert driver.names == ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"]
    assert [a.value for a in driver.calls[2][1][1:]] == [8, 1000]
    assert blocks_per_unit(ctypes.c_void_p(5), 256, 1000) == 2


def test_a_graph_is_recorded_and_launched(driver):
    with Graph(99) as graph:
        launch(ctypes.c_void_p(5), 1, 1, 0, 99, [])
    graph.launch()
    assert driver.names == [
        "cuStreamBeginCapture_v2", "cuLaunchKernelEx", "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags", "cuGraphDestroy", "cuGraphLaunch",
    ]  # fmt: skip


def test_an_error_while_recording_ends_the_recording(driver):
    with pytest.raises(ValueError, match="oh"), Graph(99):
        raise ValueError("oh")
    assert driver.names == ["cuStreamBeginCapture_v2", "cuStreamEndCapture"]


def test_without_a_driver_the_message_says_so(monkeypatch):
    def missing(name):
        raise OSError("libcuda.so.1: not found")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    cuda_driver._driver.cache_clear()
    with pytest.raises(CudaError, match="there is no NVIDIA driver"):
        Module(b"cubin")
