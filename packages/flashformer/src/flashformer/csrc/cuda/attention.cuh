// One part of the attention: the query heads of one kv head over one chunk of positions, by the
// consumers of one block. Keys and values lie as on the CPU (csrc/cpu/model.hpp).
#pragma once
#include "gemv.cuh"
#include "sync.cuh"

namespace ff {

// Where the parts of a layer's attention begin and how many there are.
struct Span {
  i64 start, stop;   // positions seen
  int first, count;  // chunks

  FF_DEVICE Span(int window, i64 position) : stop(position + 1) {
    start = window && position + 1 > window ? position + 1 - window : 0;
    first = int(start / spec::CHUNK);
    count = int(position / spec::CHUNK) - first + 1;
  }
};

FF_DEVICE float warp_sum(float value) {
  for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// RMS norm with weights (where there are any) and rotary position of one head, times scale, by a warp.
FF_DEVICE void prepare_head(const float* from, float* to, const Model& m, const float* norm, bool rotates,
                            i64 position, float scale, int lane) {
  constexpr int SIZE = spec::HEAD_DIM, HALF = spec::ROTARY / 2;
  float squares = 0.0f;
  for (int d = lane; d < WIDTH; d += 32) {
    const float value = d < SIZE ? fresh(from + d) : 0.0f;
    squares += value * value;
    to[d] = value * scale;
  }
  if (norm) {
    const float inverse = 1.0f / sqrtf(warp_sum(squares) / float(SIZE) + m.eps);
    for (int d = lane; d < SIZE; d += 32) to[d] *= inverse * norm[d];
  }
  warp_sync();
  if (!rotates) return;
  for (int d = lane; d < HALF; d += 32) {
    const float c = m.cos[position * HALF + d], s = m.sin[position * HALF + d];
    const float a = to[d], b = to[d + HALF];
    to[d] = a * c - b * s;
    to[d + HALF] = b * c + a * s;
  }
  warp_sync();
}

FF_DEVICE void put(float* p, float value) { *p = value; }
FF_DEVICE void put(u16* p, float value) { *p = float_to_bf16(value); }

// 16 bytes of the cache as floats.
FF_DEVICE void widen(const float* p, float (&to)[4]) {
  const uint4 q = *reinterpret_cast<const uint4*>(p);
  to[0] = as_float(q.x), to[1] = as_float(q.y), to[2] = as_float(q.z), to[3] = as_float(q.w);
}
FF_DEVICE void widen(const u16* p, float (&to)[8]) {
  const uint4 q = *reinterpret_cast<const uint4*>(p);
  const u32 pair[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) to[2 * i] = bf16_low(pair[i]), to[2 * i + 1] = bf16_high(pair[i]);
}

// Sums N values over the lanes that differ in the bits of MASK and below, down to those of LAST. Each
// lane keeps half of its values at every step while it has more than one; returns where its own begin.
template <int N, int MASK, int LAST>
FF_DEVICE int scatter_sum(float* values, int lane) {
  if constexpr (MASK < LAST) {
    return 0;
  } else if constexpr (N == 1) {
    values[0] += shuffle_xor(values[0], MASK);
    return scatter_sum<1, MASK / 2, LAST>(values, lane);
  } else {
    const bool high = lane & MASK;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float give = high ? values[i] : values[i + N / 2], keep = high ? values[i + N / 2] : values[i];
      values[i] = keep + shuffle_xor(give, MASK);
    }
    return (high ? N / 2 : 0) + scatter_sum<N / 2, MASK / 2, LAST>(values, lane);
  }
}
// How many of N values a lane is left with after that.
FF_BOTH constexpr int left_of(int n, int mask, int last) { return mask < last ? n : left_of(most(n / 2, 1), mask / 2, last); }

// What a warp knows about MERGED heads after some of the positions.
template <int PER_LANE>
struct Running {
  float top[MERGED], total[MERGED];   // total: of this lane's positions, lane % 16
  float out[MERGED][PER_LANE];        // elements of the head that are this lane's
};

template <class T>
struct Part {
  static constexpr int PER = 16 / int(sizeof(T));       // elements in 16 bytes
  static constexpr int SPLIT = TILE / PER;              // lanes that share an element of 16 keys
  static constexpr int VECTORS = WIDTH / PER;           // of a value
  static constexpr int ROWS = VECTORS <= 4 ? 8 : VECTORS <= 8 ? 4 : VECTORS <= 16 ? 2 : 1;  // values at once
  static constexpr int LANES = 32 / ROWS;
  static constexpr int TURNS = over(VECTORS, LANES);    // vectors of a value that are one lane's
  static constexpr int OWN = PER * TURNS;

  const Model& m;
  const T *keys, *values;  // of one kv head
  float *q, *merged, *scores;
  const int warp, lane;

  // scores[g][t] = q_g . k_t for the 16 positions of a block.
  FF_DEVICE void score(const T* block, const float* heads) {
    float sum[MERGED * PER];
#pragma unroll
    for (int i = 0; i < MERGED * PER; ++i) sum[i] = 0.0f;
#pragma unroll 2
    for (int i = lane; i < WIDTH * SPLIT; i += 32) {
      float key[PER];
      widen(block + i * PER, key);
      const int d = i / SPLIT;
#pragma unroll
      for (int g = 0; g < MERGED; ++g) {
        const float a = heads[g * WIDTH + d];
#pragma unroll
        for (int j = 0; j < PER; ++j) sum[g * PER + j] += a * key[j];
      }
    }
    const int first = scatter_sum<MERGED * PER, 16, SPLIT>(sum, lane);
    constexpr int LEFT = left_of(MERGED * PER, 16, SPLIT);
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      const int g = (first + i) / PER, j = (first + i) % PER;
      scores[g * TILE + lane % SPLIT * PER + j] = sum[i];
    }
    warp_sync();
  }

  // Turns the scores of a block into weights under the highest score so far.
  FF_DEVICE void soften(Running<OWN>& run, i64 block, i64 from, i64 to) {
    const i64 t = block + lane % TILE;
#pragma unroll
    for (int g = 0; g < MERGED; ++g) {
      const float score = t >= from && t < to ? scores[g * TILE + lane % TILE] : as_float(0xff800000u);
      float top = score;
      for (int mask = 8; mask; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
      top = fmaxf(top, run.top[g]);
      const float shrink = expf(run.top[g] - top), weight = expf(score - top);
      run.top[g] = top;
      run.total[g] = run.total[g] * shrink + weight;
#pragma unroll
      for (int i = 0; i < OWN; ++i) run.out[g][i] *= shrink;
      warp_sync();
      if (lane < TILE) scores[g * TILE + lane] = weight;
    }
    warp_sync();
  }

  // out[g] += sum over t of weight[g][t] v_t; positions outside have no weight and are not read.
  FF_DEVICE void mix(Running<OWN>& run, i64 block, i64 from, i64 to) {
    const int mine = lane % LANES;
#pragma unroll 2
    for (int i = lane / LANES; i < TILE; i += ROWS) {
      const i64 t = block + i;
      if (t < from || t >= to) continue;
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) {
        const int vector = mine + turn * LANES;
        if (VECTORS % LANES && vector >= VECTORS) continue;
        float value[PER];
        widen(values + t * WIDTH + vector * PER, value);
#pragma unroll
        for (int g = 0; g < MERGED; ++g) {
          const float weight = scores[g * TILE + i];
#pragma unroll
          for (int j = 0; j < PER; ++j) run.out[g][turn * PER + j] += weight * value[j];
        }
      }
    }
    warp_sync();
  }

  // The heads from q_first on over the positions from..to-1, all consumers together; `merged` then
  // holds for each warp and head: WIDTH sums, the highest score, the sum of weights.
  FF_DEVICE void run(int q_first, i64 from, i64 to) {
    Running<OWN> run;
#pragma unroll
    for (int g = 0; g < MERGED; ++g) {
      run.top[g] = LOWEST, run.total[g] = 0.0f;
#pragma unroll
      for (int i = 0; i < OWN; ++i) run.out[g][i] = 0.0f;
    }
    for (i64 block = from / TILE * TILE + TILE * warp; block < to; block += TILE * spec::WARPS) {
      score(keys + block * WIDTH, q + q_first * WIDTH);
      soften(run, block, from, to);
      mix(run, block, from, to);
    }
#pragma unroll
    for (int g = 0; g < MERGED; ++g) {
      float* to_ = merged + (warp * MERGED + g) * (WIDTH + 2);
      float total = run.total[g];
      for (int mask = 8; mask; mask /= 2) total += shuffle_xor(total, mask);
#pragma unroll
      for (int i = 0; i < OWN; ++i) {
        float sum = run.out[g][i];
        for (int mask = LANES; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        const int vector = lane % LANES + i / PER * LANES;
        if (lane < LANES && vector < VECTORS) to_[vector * PER + i % PER] = sum;
      }
      if (lane == 0) to_[WIDTH] = run.top[g], to_[WIDTH + 1] = total;
    }
  }
};

// Part `number` of a layer's attention, as Plan.parts counts them. Writes key and value of `position`
// into the cache if it lies in this part, then
//   partial[head][chunk][WIDTH]: sum of e^(s_t - top) v_t;  tops[head][chunk]: top, sum of e^(s_t - top).
template <class T>
FF_DEVICE void attend(const Model& m, const Request& r, int l, i64 position, const Span& seen, int number,
                      u8* scratch, int thread) {
  const Layer& layer = m.layers[l];
  const int head = number % spec::KV_HEADS, chunk = number / spec::KV_HEADS;
  const int warp = thread / 32, lane = thread % 32;
  T* keys = static_cast<T*>(r.keys[l]) + head * r.max_len * WIDTH;
  T* values = static_cast<T*>(r.values[l]) + head * r.max_len * WIDTH;
  float* q = reinterpret_cast<float*>(scratch);
  float* merged = q + (GROUP_HEADS + 1) * WIDTH;
  float* scores = merged + spec::WARPS * MERGED * (WIDTH + 2) + warp * MERGED * TILE;

  const i64 begin = i64(seen.first + chunk) * spec::CHUNK;
  const i64 from = most(begin, seen.start), to = least(begin + spec::CHUNK, seen.stop);
  const bool newest = to == seen.stop;
  for (int h = warp; h < GROUP_HEADS + newest; h += spec::WARPS) {
    const bool is_key = h == GROUP_HEADS;
    const int row = is_key ? spec::HEADS + head : head * GROUP_HEADS + h;
    prepare_head(m.qkv + row * spec::HEAD_DIM, q + h * WIDTH, m, is_key ? layer.key_norm : layer.query_norm,
                 layer.rotates, position, is_key ? 1.0f : m.attention_scale, lane);
    if (!is_key) continue;
    const float* v = m.qkv + (spec::HEADS + spec::KV_HEADS + head) * spec::HEAD_DIM;
    for (int d = lane; d < WIDTH; d += 32) {
      put(keys + (position / TILE * WIDTH + d) * TILE + position % TILE, q[h * WIDTH + d]);
      put(values + position * WIDTH + d, d < spec::HEAD_DIM ? fresh(v + d) : 0.0f);
    }
  }
  consumers_sync();
  Part<T> part{m, keys, values, q, merged, scores, warp, lane};
  for (int first = 0; first < GROUP_HEADS; first += MERGED) {
    const int group = least(first, GROUP_HEADS - MERGED);  // the last ones may be done twice
    part.run(group, from, to);
    consumers_sync();
    for (int i = thread; i < MERGED * WIDTH; i += CONSUMERS) {
      const int g = i / WIDTH, d = i % WIDTH;
      float top = LOWEST, total = 0.0f, sum = 0.0f;
      for (int w = 0; w < spec::WARPS; ++w) top = fmaxf(top, merged[(w * MERGED + g) * (WIDTH + 2) + WIDTH]);
      for (int w = 0; w < spec::WARPS; ++w) {
        const float* from_ = merged + (w * MERGED + g) * (WIDTH + 2);
        const float weight = expf(from_[WIDTH] - top);
        total += weight * from_[WIDTH + 1];
        sum += weight * from_[d];
      }
      const i64 place = i64(head * GROUP_HEADS + group + g) * r.chunks + chunk;
      r.partial[place * WIDTH + d] = sum;
      if (d == 0) r.tops[2 * place] = top, r.tops[2 * place + 1] = total;
    }
    consumers_sync();
  }
}

}  // namespace ff
