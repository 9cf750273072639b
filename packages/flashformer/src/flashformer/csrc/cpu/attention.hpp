// One part of the attention: the query heads of one kv head over one chunk of positions.
#pragma once
#include <algorithm>

#include "model.hpp"
#include "simd.hpp"

namespace ff {

inline F load(const uint16_t* p) { return load_bf16(p); }
inline void put(float* p, float value) { *p = value; }
inline void put(uint16_t* p, float value) { *p = float_to_bf16(value); }

inline int padded(int size) { return (size + LANES - 1) / LANES * LANES; }

// RMS norm with weights (where there are any) and rotary position of one head, times scale.
inline void prepare_head(const float* from, float* to, const Model& m, const float* norm,
                         bool rotates, int64_t position, float scale) {
  const int size = m.head_dim;
  float inverse = 1.0f;
  if (norm) {
    float squares = 0.0f;
    for (int d = 0; d < size; ++d) squares += from[d] * from[d];
    inverse = 1.0f / std::sqrt(squares / float(size) + m.eps);
  }
  for (int d = 0; d < size; ++d) to[d] = norm ? from[d] * inverse * norm[d] : from[d];
  if (rotates) {
    const int half = m.rotary / 2;
    const float *c = m.cos + position * half, *s = m.sin + position * half;
    for (int d = 0; d < half; ++d) {
      const float a = to[d], b = to[d + half];
      to[d] = a * c[d] - b * s[d];
      to[d + half] = b * c[d] + a * s[d];
    }
  }
  for (int d = 0; d < size; ++d) to[d] *= scale;
  for (int d = size; d < padded(size); ++d) to[d] = 0.0f;
}

constexpr int BLOCKS_AHEAD = 4;  // of keys, that are asked for before their use

// scores[g][t - from] = q_g . k_t for whole blocks of positions; heads `stride` floats apart.
// Meanwhile the values of the same positions come into the cache.
template <int N, class T>
void scores_of(const float* q, int q_stride, const T* keys, const T* values, int width, int64_t from,
               int64_t to, float* scores, int stride) {
  constexpr int U = N >= 4 ? 1 : 4 / N;  // independent sums, enough to hide the latency
  for (int64_t t = from; t < to; t += LANES) {
    const T* k = keys + t * width;  // a block of 16 positions has 16 width elements
    const T *later = k + BLOCKS_AHEAD * LANES * width, *v = values + t * width;
    F acc[N][U];
    for (int g = 0; g < N; ++g)
      for (int u = 0; u < U; ++u) acc[g][u] = zero();
    for (int d = 0; d < width; d += U)
      for (int u = 0; u < U; ++u) {
        prefetch(later + (d + u) * LANES), prefetch(v + (d + u) * LANES);
        const F key = load(k + (d + u) * LANES);
        for (int g = 0; g < N; ++g) acc[g][u] = fma(key, all(q[g * q_stride + d + u]), acc[g][u]);
      }
    for (int g = 0; g < N; ++g) {
      for (int u = 1; u < U; ++u) acc[g][0] = acc[g][0] + acc[g][u];
      store(scores + g * stride + (t - from), acc[g][0]);
    }
  }
}

// out[g] = sum over t of p[g][t] v_t
template <int N, class T>
void mix(const float* p, int stride, const T* values, int width, int64_t count, float* out, int out_stride) {
  constexpr int U = N >= 4 ? 1 : 4 / N;
  for (int d = 0; d < width; d += LANES) {
    F acc[N][U];
    for (int g = 0; g < N; ++g)
      for (int u = 0; u < U; ++u) acc[g][u] = zero();
    int64_t t = 0;
    for (; t + U <= count; t += U)
      for (int u = 0; u < U; ++u) {
        const F value = load(values + (t + u) * width + d);
        for (int g = 0; g < N; ++g) acc[g][u] = fma(value, all(p[g * stride + t + u]), acc[g][u]);
      }
    for (; t < count; ++t)
      for (int g = 0; g < N; ++g)
        acc[g][0] = fma(load(values + t * width + d), all(p[g * stride + t]), acc[g][0]);
    for (int g = 0; g < N; ++g) {
      for (int u = 1; u < U; ++u) acc[g][0] = acc[g][0] + acc[g][u];
      store(out + g * out_stride + d, acc[g][0]);
    }
  }
}

// Where the parts of a layer's attention begin and how many there are.
struct Span {
  int64_t start, stop;  // positions seen
  int first, count;     // chunks
};

inline Span span(const Model& m, const Layer& layer, int64_t position) {
  const int64_t start = layer.window ? std::max<int64_t>(0, position + 1 - layer.window) : 0;
  const int first = int(start / m.chunk);
  return {start, position + 1, first, int(position / m.chunk) - first + 1};
}

// The part `chunk` (counted from the first one seen) of kv head `head`. Writes key and value of
// `position` into the cache if it lies in this part, then
//   partial[heads][chunks][width]: sum of e^(s_t - m) v_t;  tops[heads][chunks][2]: m, sum of e^(s_t - m).
template <class T>
void attend(const Model& m, const Layer& layer, T* keys, T* values, int64_t max_len,
            int64_t position, const Span& seen, int head, int chunk, const float* qkv, float* scratch,
            float* partial, float* tops, int chunks) {
  const int width = padded(m.head_dim), group = m.heads / m.kv_heads;
  float* q = scratch;
  float* scores = q + group * width;
  const int stride = m.chunk + LANES;
  keys += head * max_len * width;
  values += head * max_len * width;

  const int64_t begin = int64_t(seen.first + chunk) * m.chunk;
  const int64_t from = std::max(begin, seen.start), to = std::min(begin + m.chunk, seen.stop);
  if (to == seen.stop) {
    const float* k = qkv + int64_t(m.heads + head) * m.head_dim;
    const float* v = k + int64_t(m.kv_heads) * m.head_dim;
    prepare_head(k, q, m, layer.key_norm, layer.rotates, position, 1.0f);
    T* block = keys + (position / LANES * LANES) * width + position % LANES;
    T* row = values + position * width;
    for (int d = 0; d < width; ++d) {
      put(block + d * LANES, q[d]);
      put(row + d, d < m.head_dim ? v[d] : 0.0f);
    }
  }
  for (int g = 0; g < group; ++g)
    prepare_head(qkv + int64_t(head * group + g) * m.head_dim, q + g * width, m, layer.query_norm,
                 layer.rotates, position, m.attention_scale);

  const int64_t aligned = from / LANES * LANES;
  float* p = scores + (from - aligned);
  const int64_t count = to - from;
  for (int g = 0; g < group;) {
    const int n = group - g >= 4 ? 4 : group - g >= 2 ? 2 : 1;
    const auto go = [&](auto scorer) {
      scorer(q + g * width, width, keys, values, width, aligned, to, scores + g * stride, stride);
    };
    if (n == 4) go(scores_of<4, T>);
    else if (n == 2) go(scores_of<2, T>);
    else go(scores_of<1, T>);
    g += n;
  }
  for (int g = 0; g < group; ++g) {
    float* s = p + g * stride;
    for (int64_t t = count; t < count + LANES; ++t) s[t] = -1e30f;  // its exponential is nothing
    F most = load(s);
    for (int64_t t = LANES; t < count; t += LANES) most = vmax(most, load(s + t));
    const float top = largest(most);
    F total = zero();
    for (int64_t t = 0; t < count; t += LANES) {
      const F weight = exp(load(s + t) - all(top));
      store(s + t, weight);
      total = total + weight;
    }
    float* mark = tops + (int64_t(head * group + g) * chunks + chunk) * 2;
    mark[0] = top;
    mark[1] = sum(total);
  }
  for (int g = 0; g < group;) {
    const int n = group - g >= 4 ? 4 : group - g >= 2 ? 2 : 1;
    const auto go = [&](auto mixer) {
      mixer(p + g * stride, stride, values + from * width, width, count,
            partial + (int64_t(head * group + g) * chunks + chunk) * width, chunks * width);
    };
    if (n == 4) go(mix<4, T>);
    else if (n == 2) go(mix<2, T>);
    else go(mix<1, T>);
    g += n;
  }
}

// Puts the parts together: out[heads * head_dim].
inline void combine(const Model& m, int count, int chunks, const float* partial, const float* tops, float* out) {
  const int width = padded(m.head_dim);
  for (int h = 0; h < m.heads; ++h) {
    const float* mark = tops + int64_t(h) * chunks * 2;
    const float* part = partial + int64_t(h) * chunks * width;
    float top = mark[0];
    for (int c = 1; c < count; ++c) top = std::max(top, mark[2 * c]);
    float total = 0.0f;
    float* to = out + h * m.head_dim;
    for (int d = 0; d < m.head_dim; ++d) to[d] = 0.0f;
    for (int c = 0; c < count; ++c) {
      const float weight = std::exp(mark[2 * c] - top);
      total += weight * mark[2 * c + 1];
      for (int d = 0; d < m.head_dim; ++d) to[d] += weight * part[c * width + d];
    }
    const float inverse = 1.0f / total;
    for (int d = 0; d < m.head_dim; ++d) to[d] *= inverse;
  }
}

}  // namespace ff
