"""Rounding to bfloat16 in the C++ of the CPU back-end, against torch, bit by bit."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch

from flashformer.jit import SOURCES, compiler

SOURCE = """
#include "simd.hpp"
extern "C" uint16_t to_bf16(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return ff::float_to_bf16(value);
}
"""
SPECIAL = [
    0x00000000, 0x80000000, 0x00000001, 0x7F800000, 0xFF800000,  # zeros, the smallest, infinities
    0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F7F8000,  # the largest go to infinity
    0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7F80FFFF,  # NaN of any payload
    0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001,  # ties and beside them
]  # fmt: skip


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)
def test_rounding_is_torchs(tmp_path):
    source, library = tmp_path / "rounding.cpp", tmp_path / "rounding.so"
    source.write_text(SOURCE)
    command = [compiler(), "-std=c++20", "-O2", "-shared", "-fPIC", "-w", f"-I{SOURCES}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    rounded = ctypes.CDLL(str(library)).to_bf16
    rounded.argtypes, rounded.restype = [ctypes.c_uint32], ctypes.c_uint16
    some = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    bits = np.concatenate([np.array(SPECIAL, np.uint32), some])
    wanted = torch.from_numpy(bits.view(np.float32)).bfloat16()
    found = np.array([rounded(int(b)) for b in bits], np.uint16)
    found = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), wanted.isnan())
    numbers = ~wanted.isnan()
    assert torch.equal(found[numbers].view(torch.int16), wanted[numbers].view(torch.int16))
