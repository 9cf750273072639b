// Arithmetic of single numbers; the same as in csrc/cpu, so that both back-ends agree.
#pragma once
#include "device.cuh"

namespace ff {

template <class T>
FF_BOTH constexpr T least(T a, T b) { return b < a ? b : a; }
template <class T>
FF_BOTH constexpr T most(T a, T b) { return a < b ? b : a; }
FF_BOTH constexpr int over(int a, int b) { return (a + b - 1) / b; }        // a / b, rounded up
FF_BOTH constexpr int padded(int a, int to) { return over(a, to) * to; }

FF_DEVICE float bf16_low(u32 pair) { return as_float(pair << 16); }
FF_DEVICE float bf16_high(u32 pair) { return as_float(pair & 0xffff0000u); }

FF_DEVICE u16 float_to_bf16(float value) {  // to nearest even; a NaN stays one
  const u32 bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return u16(bits >> 16) | 0x40;
  return u16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

FF_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

constexpr float LOWEST = -3.0e38f;  // under every score, and finite: e^(LOWEST - LOWEST) is 1

struct Best {
  float value;
  i32 index;
};

FF_DEVICE bool beats(const Best& a, const Best& b) {  // among equals the lower index, as torch.argmax
  return a.index >= 0 && (b.index < 0 || a.value > b.value || (a.value == b.value && a.index < b.index));
}

// Philox 4x32-10 (Salmon et al. 2011): word `which` of four random ones of a counter under a key.
FF_DEVICE u32 philox(u64 key, u64 step, u32 index, int which) {
  u32 c0 = index, c1 = 0, c2 = u32(step), c3 = u32(step >> 32);
  u32 k0 = u32(key), k1 = u32(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const u64 a = u64(0xD2511F53u) * c0, b = u64(0xCD9E8D57u) * c2;
    c0 = u32(b >> 32) ^ c1 ^ k0;
    c1 = u32(b);
    c2 = u32(a >> 32) ^ c3 ^ k1;
    c3 = u32(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return which == 0 ? c0 : which == 1 ? c1 : which == 2 ? c2 : c3;
}

constexpr double MOST_NOISE = 22.9;  // -log(-log(1 - 2^-33)) is less

FF_DEVICE double gumbel(u64 seed, u64 step, i32 index) {
  const u32 word = philox(seed, step, u32(index / 4), index % 4);
  return -log(-log((double(word) + 0.5) * 0x1p-32));
}

}  // namespace ff
