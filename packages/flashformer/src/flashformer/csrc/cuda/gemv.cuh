// A piece of a tile times the input, for each format, by one warp. Lane l has the rows 4 (l % 4) to
// 4 (l % 4) + 3 of the tile's 16, and every eighth step along K; `fold` puts the lanes together.
#pragma once
#include "shape.cuh"

namespace ff {

// A vector as the formats want it: floats padded with zeros, or int8 with one scale per group.
struct Input {
  float* values;
  i8* quantised;
  float* scales;

  FF_DEVICE explicit Input(u8* scratch)
      : values(reinterpret_cast<float*>(scratch)),
        quantised(reinterpret_cast<i8*>(scratch + 4 * FLOATS)),
        scales(reinterpret_cast<float*>(scratch + 4 * FLOATS + INT8S)) {}
};

struct Four {
  float row[4] = {0.0f, 0.0f, 0.0f, 0.0f};
};

FF_DEVICE uint4 load16(const u8* p) { return *reinterpret_cast<const uint4*>(p); }
FF_DEVICE uint2 load8(const void* p) { return *reinterpret_cast<const uint2*>(p); }
FF_DEVICE u32 load4(const void* p) { return *reinterpret_cast<const u32*>(p); }

// [8][16] floats a unit.
template <class A>
FF_DEVICE Four piece_f32(const u8* w, const Input& x, int first_k, int units, int lane) {
  Four sum;
  const float* v = x.values + first_k + lane / 4;
  w += 16 * lane;
#pragma unroll 4
  for (int u = 0; u < units; ++u, w += 512, v += 8) {
    const uint4 q = load16(w);
    const float a = *v;
    sum.row[0] += as_float(q.x) * a;
    sum.row[1] += as_float(q.y) * a;
    sum.row[2] += as_float(q.z) * a;
    sum.row[3] += as_float(q.w) * a;
  }
  return sum;
}

// [8][16][2] bfloat16 a unit.
template <class A>
FF_DEVICE Four piece_bf16(const u8* w, const Input& x, int first_k, int units, int lane) {
  Four even, odd;
  const float* v = x.values + first_k + lane / 4 * 2;
  w += 16 * lane;
#pragma unroll 4
  for (int u = 0; u < units; ++u, w += 512, v += 16) {
    const uint4 q = load16(w);
    const float2 a = *reinterpret_cast<const float2*>(v);
    const u32 pair[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      even.row[r] += bf16_low(pair[r]) * a.x;
      odd.row[r] += bf16_high(pair[r]) * a.y;
    }
  }
  for (int r = 0; r < 4; ++r) even.row[r] += odd.row[r];
  return even;
}

// [8][16][4] int8 a unit; four units share a scale of the input, but for the last of a tile.
template <class A>
FF_DEVICE Four piece_int8(const u8* w, const Input& x, int first_k, int units, int lane) {
  Four sum;
  const i8* v = x.quantised + first_k + lane / 4 * 4;
  const float* scale = x.scales + first_k / ACTIVATION_GROUP;
  w += 16 * lane;
  for (int u = 0; u < units; u += A::together, ++scale) {
    i32 total[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < A::together; ++j) {
      if (A::units % A::together && u + j >= units) break;
      const uint4 q = load16(w + 512 * (u + j));
      const u32 a = load4(v + 32 * (u + j)), word[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) total[r] = dot4(word[r], a, total[r]);
    }
    for (int r = 0; r < 4; ++r) sum.row[r] += float(total[r]) * *scale;
  }
  return sum;
}

// [group / 8][16] words of eight nibbles, then 16 scales, then perhaps 16 zero points.
template <class A>
FF_DEVICE Four piece_int4(const u8* w, const Input& x, int first_k, int units, int lane) {
  constexpr int VECTORS = A::group / 2;                   // of 16 bytes in a unit
  constexpr int STEPS = most(VECTORS / 32, 1);            // of the warp for a unit
  constexpr int AT_ONCE = most(32 / VECTORS, 1);          // units in one step
  Four sum;
  const int vector = AT_ONCE > 1 ? lane % VECTORS : lane;
  for (int first = 0; first < units; first += AT_ONCE) {
    const int u = AT_ONCE > 1 ? first + lane / VECTORS : first;
    if (AT_ONCE > 1 && u >= units) break;
    const u8* block = w + u * A::unit_bytes;
    const i8* v = x.quantised + first_k + u * A::group + vector / 4 * 8;
    i32 total[4] = {0, 0, 0, 0}, inputs = 0;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      const uint4 q = load16(block + 16 * (vector + 32 * j));
      const uint2 a = load8(v + 64 * j);
      const u32 word[4] = {q.x, q.y, q.z, q.w};
      inputs = dot4(0x01010101u, a.y, dot4(0x01010101u, a.x, inputs));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        total[r] = dot4(word[r] & 0x0f0f0f0fu, a.x, total[r]);
        total[r] = dot4((word[r] >> 4) & 0x0f0f0f0fu, a.y, total[r]);
      }
    }
    const u8* after = block + 8 * A::group;
    const uint2 halves = load8(after + 8 * (lane % 4));
    const u32 zeros = A::zeros ? load4(after + 32 + 4 * (lane % 4)) : 0x08080808u;
    const float scale = x.scales[first_k / A::group + u];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const u32 half = (r < 2 ? halves.x : halves.y) >> (r % 2 * 16) & 0xffffu;
      const i32 zero = i32(zeros >> (8 * r) & 0xffu);
      sum.row[r] += float(total[r] - zero * inputs) * (half_to_float(u16(half)) * scale);
    }
  }
  return sum;
}

template <class A>
FF_DEVICE Four piece_of(const u8* w, const Input& x, int piece, int lane) {
  const int first_k = piece * A::piece_units * A::unit_k, units = A::units_of(piece);
  if constexpr (A::format == F32) return piece_f32<A>(w, x, first_k, units, lane);
  else if constexpr (A::format == BF16) return piece_bf16<A>(w, x, first_k, units, lane);
  else if constexpr (A::format == INT8) return piece_int8<A>(w, x, first_k, units, lane);
  else return piece_int4<A>(w, x, first_k, units, lane);
}

// Sums over the lanes that have the same rows, and writes the 16 sums. At each step a lane keeps one
// half of what it has and gives the other away.
FF_DEVICE void fold(const Four& mine, int lane, float* to) {
  const bool high = lane & 16, middle = lane & 8;
  const float a = (high ? mine.row[2] : mine.row[0]) + shuffle_xor(high ? mine.row[0] : mine.row[2], 16);
  const float b = (high ? mine.row[3] : mine.row[1]) + shuffle_xor(high ? mine.row[1] : mine.row[3], 16);
  float c = (middle ? b : a) + shuffle_xor(middle ? a : b, 8);
  c += shuffle_xor(c, 4);
  if (!(lane & 4)) to[4 * (lane % 4) + 2 * high + middle] = c;
}

}  // namespace ff
