// A tile of 16 rows times a vector, for each format of weights. The weights are one linear stream.
#pragma once
#include <algorithm>
#include <limits>

#include "model.hpp"
#include "simd.hpp"

namespace ff {

constexpr int ACTIVATION_GROUP = 128;  // elements of an int8 activation that share a scale
constexpr int AHEAD = 1024;            // bytes that are asked for ahead of their use

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
    int32_t total = 0;
    for (int i = 0; i < size; i += LANES) {
      store(whole, nearest(load(v + i) * inverse));
      for (int j = 0; j < LANES; ++j) {
        const int32_t q = int32_t(whole[j]);
        x.quantised[start + i + j] = int8_t(q);
        total += q;
      }
    }
    x.scales[g] = top / 127.0f;
    x.sums[g] = total;
  }
}

inline void prefetch_line(const void* p) { prefetch(static_cast<const char*>(p) + AHEAD); }

inline F tile_f32(const uint8_t* stream, const Gemv& g, const Input& x) {
  const float* w = reinterpret_cast<const float*>(stream);
  F a = zero(), b = zero(), c = zero(), d = zero();
  for (int k = 0; k < g.k_padded; k += 4, w += 4 * LANES) {
    prefetch_line(w), prefetch_line(w + LANES), prefetch_line(w + 2 * LANES), prefetch_line(w + 3 * LANES);
    a = fma(load(w), all(x.values[k]), a);
    b = fma(load(w + LANES), all(x.values[k + 1]), b);
    c = fma(load(w + 2 * LANES), all(x.values[k + 2]), c);
    d = fma(load(w + 3 * LANES), all(x.values[k + 3]), d);
  }
  return (a + b) + (c + d);
}

inline F tile_bf16(const uint8_t* stream, const Gemv& g, const Input& x) {
  const uint16_t* w = reinterpret_cast<const uint16_t*>(stream);
  F a = zero(), b = zero(), c = zero(), d = zero();
  for (int k = 0; k < g.k_padded; k += 4, w += 4 * LANES) {
    prefetch_line(w), prefetch_line(w + 2 * LANES);
    fma_pair(w, all(x.values[k]), all(x.values[k + 1]), a, b);
    fma_pair(w + 2 * LANES, all(x.values[k + 2]), all(x.values[k + 3]), c, d);
  }
  return (a + b) + (c + d);
}

inline F tile_int8(const uint8_t* stream, const Gemv& g, const Input& x) {
  const int8_t* w = reinterpret_cast<const int8_t*>(stream);
  F total = zero();
  for (int start = 0, group = 0; start < g.k_padded; start += ACTIVATION_GROUP, ++group) {
    const int stop = std::min(start + ACTIVATION_GROUP, g.k_padded);
    I acc = izero();
    for (int k = start; k < stop; k += 8, w += 8 * LANES) {
      prefetch_line(w), prefetch_line(w + 4 * LANES);
      dot8(w, four(x.quantised + k), acc);
      dot8(w + 4 * LANES, four(x.quantised + k + 4), acc);
    }
    total = fma(to_float(undo8(acc, x.sums[group])), all(x.scales[group]), total);
  }
  return total * load(reinterpret_cast<const float*>(w));
}

inline F tile_int4(const uint8_t* w, const Gemv& g, const Input& x) {
  F total = zero();
  for (int start = 0, group = 0; start < g.k_padded; start += g.group, ++group) {
    I acc = izero();
    for (int k = start; k < start + g.group; k += 32, w += 16 * LANES) {
      prefetch_line(w), prefetch_line(w + 64), prefetch_line(w + 128), prefetch_line(w + 192);
      dot4(w, x.quantised + k, acc);
    }
    const F scale = load_half(reinterpret_cast<const uint16_t*>(w)) * all(x.scales[group]);
    w += 2 * LANES;
    const F sums = all(float(x.sums[group]));
    F offset;
    if (g.zeros) {
      offset = load_bytes(w) * sums;
      w += LANES;
    } else {
      offset = all(8.0f) * sums;
    }
    total = fma(to_float(acc) - offset, scale, total);
  }
  return total;
}

// Calls emit(first row, 16 results) for each tile of a worker.
template <class Emit>
void multiply(const Gemv& g, int worker, const Input& x, Emit emit) {
  const uint8_t* w = g.stream[worker];
  const int stop = g.first[worker + 1];
  const auto run = [&](auto tile) {
    for (int t = g.first[worker]; t < stop; ++t, w += g.tile_bytes) emit(t * LANES, tile(w, g, x));
  };
  switch (g.format) {
    case F32: run(tile_f32); break;
    case BF16: run(tile_bf16); break;
    case INT8: run(tile_int8); break;
    default: run(tile_int4);
  }
}

}  // namespace ff
