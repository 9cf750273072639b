// A tile of 16 rows times a vector, for each format of weights. The weights are one linear stream.
#pragma once
#include <algorithm>
#include <cstddef>
#include <limits>

#include "model.hpp"
#include "simd.hpp"

namespace ff {

constexpr int ACTIVATION_GROUP = 128;  // elements of an int8 activation that share a scale

// A vector as the formats want it: floats padded with zeros, and for INT8 and INT4 as int8 with
// one scale and one sum per group.
struct Input {
  float* values;
  int8_t* quantised;
  float* scales;
  int32_t* sums;
};

// x = scale * q with q in -127..127, group by group; what is over k is zero. A group that is not
// finite gets the scale NaN, so that the logits say so.
inline void quantise(const Input& x, int k_padded, int group) {
  for (int start = 0, g = 0; start < k_padded; start += group, ++g) {
    const int size = std::min(group, k_padded - start);  // a multiple of 32
    const float* v = x.values + start;
    F most = zero(), odd = zero();  // odd becomes NaN where x is NaN or infinite: maxima pass it over
    for (int i = 0; i < size; i += LANES) {
      most = vmax(most, vmax(load(v + i), zero() - load(v + i)));
      odd = fma(load(v + i), zero(), odd);
    }
    alignas(64) float whole[LANES];
    store(whole, odd);
    if (!std::all_of(whole, whole + LANES, [](float f) { return f == 0.0f; })) {
      std::fill_n(x.quantised + start, size, int8_t(0));
      x.scales[g] = std::numeric_limits<float>::quiet_NaN();
      x.sums[g] = 0;
      continue;
    }
    const float top = largest(most);
    const F inverse = all(top > 0 ? 127.0f / top : 0.0f);
    I total = izero();
    for (int i = 0; i < size; i += LANES) {
      const I q = to_int(load(v + i) * inverse);
      store_int8(x.quantised + start + i, q);
      total = total + q;
    }
    x.scales[g] = top / 127.0f;
    x.sums[g] = sum(total);
  }
}

// A tile's functions ask for what lies `far` bytes ahead, line by line.
inline void prefetch_line(const void* p, ptrdiff_t far) { prefetch(static_cast<const char*>(p) + far); }

inline F tile_f32(const uint8_t* stream, ptrdiff_t far, const Gemv& g, const Input& x) {
  const float* w = reinterpret_cast<const float*>(stream);
  F a = zero(), b = zero(), c = zero(), d = zero();
  for (int k = 0; k < g.k_padded; k += 4, w += 4 * LANES) {
    for (int i = 0; i < 4; ++i) prefetch_line(w + i * LANES, far);
    a = fma(load(w), all(x.values[k]), a);
    b = fma(load(w + LANES), all(x.values[k + 1]), b);
    c = fma(load(w + 2 * LANES), all(x.values[k + 2]), c);
    d = fma(load(w + 3 * LANES), all(x.values[k + 3]), d);
  }
  return (a + b) + (c + d);
}

inline F tile_bf16(const uint8_t* stream, ptrdiff_t far, const Gemv& g, const Input& x) {
  const uint16_t* w = reinterpret_cast<const uint16_t*>(stream);
  F a = zero(), b = zero(), c = zero(), d = zero();
  for (int k = 0; k < g.k_padded; k += 4, w += 4 * LANES) {
    prefetch_line(w, far), prefetch_line(w + 2 * LANES, far);
    fma_pair(w, all(x.values[k]), all(x.values[k + 1]), a, b);
    fma_pair(w + 2 * LANES, all(x.values[k + 2]), all(x.values[k + 3]), c, d);
  }
  return (a + b) + (c + d);
}

inline F tile_int8(const uint8_t* stream, ptrdiff_t far, const Gemv& g, const Input& x) {
  const int8_t* w = reinterpret_cast<const int8_t*>(stream);
  F total = zero();
  for (int start = 0, group = 0; start < g.k_padded; start += ACTIVATION_GROUP, ++group) {
    const int stop = std::min(start + ACTIVATION_GROUP, g.k_padded);
    I acc[4] = {izero(), izero(), izero(), izero()};  // a product waits for the sum before it
    for (int k = start; k < stop; k += 16, w += 16 * LANES)
      for (int i = 0; i < 4; ++i) {
        prefetch_line(w + 4 * i * LANES, far);
        dot8(w + 4 * i * LANES, four(x.quantised + k + 4 * i), acc[i]);
      }
    const I dot = undo8((acc[0] + acc[1]) + (acc[2] + acc[3]), x.sums[group]);
    total = fma(to_float(dot), all(x.scales[group]), total);
  }
  prefetch_line(w, far);  // the scales
  return total * load(reinterpret_cast<const float*>(w));
}

inline F tile_int4(const uint8_t* w, ptrdiff_t far, const Gemv& g, const Input& x) {
  F total = zero();
  for (int start = 0, group = 0; start < g.k_padded; start += g.group, ++group) {
    // Whole numbers below 2^24 all along, so that it does not matter when they become floats.
    I acc = iall(g.zeros ? 0 : -8 * x.sums[group]);
    for (int k = start; k < start + g.group; k += 32, w += 16 * LANES) {
      for (int i = 0; i < 4; ++i) prefetch_line(w + 64 * i, far);
      acc = dot4(w, x.quantised + k, acc);
    }
    prefetch_line(w, far);  // the scales
    const F scale = load_half(reinterpret_cast<const uint16_t*>(w)) * all(x.scales[group]);
    w += 2 * LANES;
    F dot = to_float(acc);
    if (g.zeros) {
      dot = dot - load_bytes(w) * all(float(x.sums[group]));
      w += LANES;
    }
    total = fma(dot, scale, total);
  }
  return total;
}

constexpr int64_t FARTHEST = 64 * 1024;  // bytes ahead: they must fit into a core's own cache

// Calls emit(first row, 16 results) for each tile of a worker. While a tile is multiplied the one
// after it comes into the cache, and while the last is, what begins at `next`: the weights of the
// next portion or stage, which depend on nothing.
template <class Emit>
void multiply(const Gemv& g, int worker, const uint8_t* next, const Input& x, Emit emit) {
  const uint8_t* w = g.stream[worker];
  const int stop = g.first[worker + 1];
  const auto run = [&](auto tile) {
    for (int t = g.first[worker]; t < stop; ++t, w += g.tile_bytes)
      emit(t * LANES, tile(w, t + 1 < stop ? std::min(g.tile_bytes, FARTHEST) : next - w, g, x));
  };
  switch (g.format) {
    case F32: run(tile_f32); break;
    case BF16: run(tile_bf16); break;
    case INT8: run(tile_int8); break;
    default: run(tile_int4);
  }
}

}  // namespace ff
