// What a product is multiplied by, made by every block for itself: the normalised residual stream,
// the parts of the attention put together, or the MLP's activations; rounded to int8 where the
// weights are int8 or int4.
#pragma once
#include "attention.cuh"

namespace ff {

// The residual stream a layer starts from: row `token` of the embedding, or x.
struct Stream {
  const Model& m;
  i64 token;  // -1: x

  FF_DEVICE float operator[](int i) const {
    if (token < 0) return fresh(m.x + i);
    const i64 at = token * spec::HIDDEN + i;
    if constexpr (spec::EMBEDDING_FORMAT == F32) return static_cast<const float*>(m.embedding)[at];
    else return as_float(u32(static_cast<const u16*>(m.embedding)[at]) << 16);
  }
};

// Sum over all consumers, the same for each of them; `room` holds WARPS floats of shared memory.
FF_DEVICE float consumers_sum(float value, float* room, int thread) {
  value = warp_sum(value);
  if (thread % 32 == 0) room[thread / 32] = value;
  consumers_sync();
  float total = 0.0f;
  for (int w = 0; w < spec::WARPS; ++w) total += room[w];
  return total;
}

FF_DEVICE void normalise(const Stream& x, const float* weight, float eps, float* to, float* room, int thread) {
  float squares = 0.0f;
#pragma unroll 4
  for (int i = thread; i < spec::HIDDEN; i += CONSUMERS) {
    const float value = x[i];
    squares += value * value;
    to[i] = value * weight[i];
  }
  const float inverse = 1.0f / sqrtf(consumers_sum(squares, room, thread) / float(spec::HIDDEN) + eps);
  for (int i = thread; i < spec::HIDDEN; i += CONSUMERS) to[i] *= inverse;
}

// Puts the parts of the attention together: to[HEADS * HEAD_DIM]. A thread has four elements of up to
// FOUR heads at a time, so that enough loads are under way.
FF_DEVICE void combine(const Request& r, int count, float* to, int thread) {
  constexpr int QUADS = WIDTH / 4, ALL = spec::HEADS * QUADS, AT_ONCE = 4;
  for (int first = thread; first < ALL; first += AT_ONCE * CONSUMERS) {
    float top[AT_ONCE], total[AT_ONCE];
    float4 sum[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) top[j] = LOWEST, total[j] = 0.0f, sum[j] = float4{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
    for (int c = 0; c < count; ++c) {
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const int i = least(first + j * CONSUMERS, ALL - 1);
        const i64 place = i64(i / QUADS) * r.chunks + c;
        const float2 mark = fresh(reinterpret_cast<const float2*>(r.tops) + place);
        const float4 part = fresh(reinterpret_cast<const float4*>(r.partial) + place * QUADS + i % QUADS);
        const float next = fmaxf(top[j], mark.x);
        const float shrink = expf(top[j] - next), weight = expf(mark.x - next);
        top[j] = next;
        total[j] = total[j] * shrink + weight * mark.y;
        sum[j].x = sum[j].x * shrink + weight * part.x;
        sum[j].y = sum[j].y * shrink + weight * part.y;
        sum[j].z = sum[j].z * shrink + weight * part.z;
        sum[j].w = sum[j].w * shrink + weight * part.w;
      }
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int i = first + j * CONSUMERS;
      if (i >= ALL) break;
      const int d = i % QUADS * 4;
      const float inverse = 1.0f / total[j];
      const float out[4] = {sum[j].x, sum[j].y, sum[j].z, sum[j].w};
      for (int e = 0; e < 4; ++e)
        if (d + e < spec::HEAD_DIM) to[i / QUADS * spec::HEAD_DIM + d + e] = out[e] * inverse;
    }
  }
}

// x = scale * q with q in -127..127, a warp for each group; what is over K is zero. `at(i)` is
// element i of the vector.
template <class A, class At>
FF_DEVICE void quantise(const Input& x, At at, int thread) {
  constexpr int SIZE = A::format == INT8 ? ACTIVATION_GROUP : A::group, EACH = SIZE / 32;
  const int lane = thread % 32;
  for (int g = thread / 32; g * SIZE < A::k_padded; g += spec::WARPS) {
    float mine[EACH], top = 0.0f, odd = 0.0f;  // odd becomes NaN where x is: fmaxf passes it over
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int i = g * SIZE + 32 * j + lane;
      mine[j] = i < A::k ? at(i) : 0.0f;
      top = fmaxf(top, fabsf(mine[j]));
      odd += mine[j] * 0.0f;
    }
    for (int mask = 16; mask; mask /= 2) {
      top = fmaxf(top, shuffle_xor(top, mask));
      odd += shuffle_xor(odd, mask);
    }
    const bool finite = odd == 0.0f;
    const float inverse = top > 0.0f && finite ? 127.0f / top : 0.0f;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int i = g * SIZE + 32 * j + lane;
      if (i < A::k_padded) x.quantised[i] = finite ? i8(int(rintf(mine[j] * inverse))) : i8(0);
    }
    if (lane == 0) x.scales[g] = top / 127.0f + odd;
  }
}

// Makes the input ready once its floats stand in `values`; those of DOWN still stand in `act`.
template <int S>
FF_DEVICE void ready(const Input& x, const float* act, int thread) {
  using A = Shape<S>;
  if constexpr (A::format < INT8) {
    if constexpr (S == DOWN)
      for (int i = thread; i < A::k; i += CONSUMERS) x.values[i] = fresh(act + i);
    for (int i = A::k + thread; i < A::k_padded; i += CONSUMERS) x.values[i] = 0.0f;
  } else if constexpr (S == DOWN) {
    quantise<A>(x, [&](int i) { return fresh(act + i); }, thread);
  } else {
    consumers_sync();
    quantise<A>(x, [&](int i) { return x.values[i]; }, thread);
  }
  consumers_sync();
}

}  // namespace ff
