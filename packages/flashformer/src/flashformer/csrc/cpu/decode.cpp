// The whole model in one call: for every token the stages of the plan, one after the other, with
// a barrier where the plan has one. Read `Decoder::token` from top to bottom.
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>

#include "attention.hpp"
#include "gemv.hpp"
#include "model.hpp"
#include "pool.hpp"

#if !defined(FF_PORTABLE)
#include <xmmintrin.h>
#endif

namespace ff {

template <class T>
struct Aligned {  // memory of its own, aligned to cache lines, zeroed
  explicit Aligned(int64_t count) : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    if (!data) throw std::bad_alloc();
    std::memset(static_cast<void*>(data.get()), 0, count * sizeof(T));
  }
  struct Free { void operator()(T* p) const { std::free(p); } };
  operator T*() { return data.get(); }
  std::unique_ptr<T[], Free> data;
};

struct Best {
  float value;
  int64_t index;
};

inline bool beats(const Best& a, const Best& b) {  // among equals the lower index, as torch.argmax
  return a.index >= 0 && (b.index < 0 || a.value > b.value || (a.value == b.value && a.index < b.index));
}

// Philox 4x32-10 (Salmon et al. 2011): four random words of a counter under a key.
inline void philox(uint64_t key, uint64_t step, uint32_t index, uint32_t out[4]) {
  uint32_t c[4] = {index, 0, uint32_t(step), uint32_t(step >> 32)};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
    std::memcpy(c, next, sizeof c);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  std::memcpy(out, c, sizeof c);
}

constexpr double MOST_NOISE = 22.9;  // -log(-log(1 - 2^-33)) is less

inline double gumbel(uint64_t seed, uint64_t step, int64_t index) {
  uint32_t words[4];
  philox(seed, step, uint32_t(index / 4), words);
  return -std::log(-std::log((double(words[index % 4]) + 0.5) * 0x1p-32));
}

// What the threads share; kept from call to call.
struct Shared {
  Shared(const Model& m, int64_t chunks_, int threads)
      : chunks(int(chunks_)),
        x(padded(m.hidden)),
        qkv(int64_t(m.heads + 2 * m.kv_heads) * m.head_dim + LANES),
        partial(int64_t(m.heads) * chunks_ * padded(m.head_dim)),
        tops(int64_t(m.heads) * chunks_ * 2),
        act(m.intermediate + LANES),
        best(threads * 8),
        stop(16) {}
  int chunks;  // of the cache
  Aligned<float> x, qkv, partial, tops, act;
  Aligned<Best> best;  // every eighth, one cache line each
  Aligned<int32_t> stop;  // after this token
};

// A thread's share of the work.
struct Decoder {
  const Model& m;
  Shared& shared;
  Barrier& barrier;
  const int thread;
  Aligned<float> start, values, scales, scratch;
  Aligned<int8_t> quantised;
  Aligned<int32_t> sums;
  Input input;
  Cache cache{};
  Request* call = nullptr;
  int threads = 1;
  bool nan = false;
  std::chrono::steady_clock::time_point began;

  static int64_t longest(const Model& m) {
    return std::max({m.hidden, m.intermediate, m.heads * m.head_dim}) + 256;
  }
  Decoder(const Model& m, Shared& shared, Barrier& barrier, int thread)
      : m(m), shared(shared), barrier(barrier), thread(thread), start(padded(m.hidden) + LANES), values(longest(m)), scales(longest(m) / 32 + 1),
        scratch(int64_t(m.heads / m.kv_heads) * (padded(m.head_dim) + m.chunk + 2 * LANES) + 2 * LANES),
        quantised(longest(m)), sums(longest(m) / 32 + 1),
        input{values, quantised, scales, sums} {}

  // Worker w of the plan is this thread's if w % threads == thread, so that any number of threads
  // does the work of a plan, with the same results.
  template <class Emit>
  void rows(const Gemv& g, const Gemv& next, Emit emit) {
    for (int w = thread; w < m.workers; w += threads)
      multiply(g, w, w + threads < m.workers ? g.stream[w + threads] : next.stream[thread], input, emit);
  }

  // Meanwhile the first weights of the next stage come into the cache: they depend on nothing.
  void synchronise(const Gemv& next) {
    if (threads == 1) return;
    const uint8_t* p = thread < m.workers ? next.stream[thread] : nullptr;
    const int64_t owned = p ? int64_t(next.first[thread + 1] - next.first[thread]) * next.tile_bytes : 0;
    const uint8_t* end = p + std::min<int64_t>(owned, 128 * 1024);
    barrier.wait(threads, [&] {
      for (int i = 0; i < 4 && p < end; ++i, p += 64) prefetch(p);
    });
  }

  // The input of a product: what stands in `values`, padded, and quantised where the weights are.
  void ready(const Gemv& g) {
    for (int i = g.k; i < g.k_padded; ++i) values[i] = 0.0f;
    if (g.format == INT8) quantise(input, g.k_padded, ACTIVATION_GROUP);
    if (g.format == INT4) quantise(input, g.k_padded, g.group);
  }

  void normalise(const float* x, const float* weight) {
    F squares = zero();
    int i = 0;
    for (; i + LANES <= m.hidden; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < m.hidden; ++i) total += x[i] * x[i];
    const float inverse = 1.0f / std::sqrt(total / float(m.hidden) + m.eps);
    for (i = 0; i + LANES <= m.hidden; i += LANES)
      store(values + i, load(x + i) * all(inverse) * load(weight + i));
    for (; i < m.hidden; ++i) values[i] = x[i] * inverse * weight[i];
  }

  // The residual stream a layer starts from: row `token` of the embedding, or x.
  void embed(int64_t token, float* to) {
    if (m.embedding_format == F32) {
      std::memcpy(to, static_cast<const float*>(m.embedding) + token * m.hidden, m.hidden * sizeof(float));
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(m.embedding) + token * m.hidden;
      for (int i = 0; i < m.hidden; ++i) to[i] = bf16_to_float(from[i]);
    }
  }

  void keep(const Gemv& g, float* to, int row, F result) {  // rows over the end are padding
    alignas(64) float out[LANES];
    if (g.bias && row + LANES <= g.rows) result = result + load(g.bias + row);
    if (row + LANES <= g.rows) return store(to + row, result);
    store(out, result);
    for (int i = 0; row + i < g.rows; ++i) to[row + i] = out[i] + (g.bias ? g.bias[row + i] : 0.0f);
  }

  void add(const Gemv& g, const float* base, float* to, int row, F result) {
    if (row + LANES <= g.rows) {
      if (g.bias) result = result + load(g.bias + row);
      return store(to + row, load(base + row) + result);
    }
    alignas(64) float out[LANES];
    store(out, result);
    for (int i = 0; row + i < g.rows; ++i) to[row + i] = base[row + i] + out[i] + (g.bias ? g.bias[row + i] : 0.0f);
  }

  // The stages of one token; returns the token chosen, or -1 where none was asked for.
  int64_t token(int64_t token, int64_t position, float* logits, bool choose) {
    const int first = call->first, last = call->last;
    const auto asked = [&](int stage) { return first <= stage && stage < last; };
    if (asked(0)) embed(token, start);
    for (int l = 0, stage = 0; l < m.layers; ++l, stage += 5) {
      const Layer& layer = m.layer[l];
      const Gemv& next = l + 1 < m.layers ? m.layer[l + 1].qkv : m.head;
      const float* x = l ? static_cast<float*>(shared.x) : static_cast<float*>(start);
      const Span seen = span(m, layer, position);
      if (asked(stage)) {  // queries, keys and values
        normalise(x, layer.norm1);
        ready(layer.qkv);
        rows(layer.qkv, layer.output, [&](int row, F r) { keep(layer.qkv, shared.qkv, row, r); });
        synchronise(layer.output);
      }
      if (asked(stage + 1)) {  // attention
        for (int w = thread; w < m.workers; w += threads)
          for (int part = w; part < seen.count * m.kv_heads; part += m.workers) attention(l, position, seen, part);
        synchronise(layer.output);
      }
      if (asked(stage + 2)) {  // its output
        combine(m, seen.count, shared.chunks, shared.partial, shared.tops, values);
        ready(layer.output);
        rows(layer.output, layer.up, [&](int row, F r) { add(layer.output, x, shared.x, row, r); });
        synchronise(layer.up);
      }
      if (asked(stage + 3)) {  // gate and up
        normalise(shared.x, layer.norm2);
        ready(layer.up);
        rows(layer.up, layer.down, [&](int row, F r) { gate(layer.up, row, r); });
        synchronise(layer.down);
      }
      if (asked(stage + 4)) {  // down
        std::memcpy(values, shared.act, m.intermediate * sizeof(float));
        ready(layer.down);
        rows(layer.down, next, [&](int row, F r) { add(layer.down, shared.x, shared.x, row, r); });
        synchronise(next);
      }
    }
    if (!logits || !asked(5 * m.layers)) return -1;
    normalise(shared.x, m.norm);
    ready(m.head);
    Best best{0.0f, -1};
    rows(m.head, m.layer[0].qkv, [&](int row, F r) {
      keep(m.head, logits, row, r);
      nan |= any_nan(r);
      if (choose && (call->choice == GUMBEL || best.index < 0 || any_over(r, best.value)))
        consider(row, std::min(LANES, m.vocab - row), logits, position, best);
    });
    shared.best[8 * thread] = best;
    if (thread == 0) *shared.stop = late() || (call->cancel && __atomic_load_n(call->cancel, __ATOMIC_RELAXED));
    synchronise(m.layer[0].qkv);
    for (int t = 0; t < threads; ++t)
      if (beats(shared.best[8 * t], best)) best = shared.best[8 * t];
    return best.index;
  }

  bool late() const {
    using namespace std::chrono;
    return duration<double>(steady_clock::now() - began).count() > call->limit;
  }

  void attention(int l, int64_t position, const Span& seen, int part) {
    const int head = part % m.kv_heads, chunk = part / m.kv_heads;
    const auto go = [&](auto* keys, auto* values) {
      attend(m, m.layer[l], keys, values, cache.max_len, position, seen, head, chunk, shared.qkv, scratch,
             shared.partial, shared.tops, shared.chunks);
    };
    if (m.cache_format == F32) go(static_cast<float*>(cache.keys[l]), static_cast<float*>(cache.values[l]));
    else go(static_cast<uint16_t*>(cache.keys[l]), static_cast<uint16_t*>(cache.values[l]));
  }

  void gate(const Gemv& g, int row, F r) {  // rows row..row+7 of 2 intermediate: gates, then ups
    alignas(64) float out[LANES], sigma[LANES];
    if (g.bias) r = r + load(g.bias + row);
    store(out, r);
    store(sigma, silu(r));
    const int first = row / 2, count = std::min(LANES / 2, m.intermediate - first);
    for (int i = 0; i < count; ++i) shared.act[first + i] = sigma[i] * out[LANES / 2 + i];
  }

  void consider(int row, int count, const float* logits, int64_t position, Best& best) {
    for (int i = row; i < row + count; ++i) {
      float value = logits[i];
      if (call->choice == GUMBEL) {
        const double scaled = double(value) / call->temperature;
        if (best.index >= 0 && scaled + MOST_NOISE < best.value) continue;
        value = float(scaled + gumbel(call->seed, uint64_t(position), i));
      }
      if (beats({value, i}, best)) best = {value, i};
    }
  }

  void run(const Cache& cache_, Request& request, int threads_) {
    cache = cache_, call = &request, threads = threads_, nan = false;
    began = std::chrono::steady_clock::now();
#if !defined(FF_PORTABLE)
    const unsigned state = _mm_getcsr();
    _mm_setcsr(state | 0x8040);  // denormals are zero
#endif
    int64_t next = request.given[0], chosen = 0;
    for (int64_t step = 0; step < request.steps; ++step) {
      if (step < request.given_count) next = request.given[step];
      const bool last = step + 1 >= request.given_count;  // of the given ones: something is chosen
      float* logits = request.all_logits ? request.logits + step * m.vocab : last ? request.logits : nullptr;
      const int64_t found = token(next, request.position + step, logits, last && request.choice != NONE);
      if (!last || request.choice == NONE) continue;
      if (thread == 0) request.chosen[chosen] = found;
      ++chosen;
      next = found;
      bool stop = *shared.stop || found < 0;
      for (int64_t i = 0; i < request.ends_count; ++i) stop |= found == request.ends[i];
      if (stop) break;
    }
    if (thread == 0) request.chosen_count = chosen;
    if (nan) __atomic_store_n(&request.not_a_number, 1, __ATOMIC_RELAXED);
#if !defined(FF_PORTABLE)
    _mm_setcsr(state);
#endif
  }
};

// A model being decoded: the threads' buffers, for caches up to `max_len` positions.
struct Session {
  Session(const Model& m, Pool& pool, int64_t max_len)
      : pool(pool), shared(m, (max_len + m.chunk - 1) / m.chunk, pool.size()) {
    for (int t = 0; t < pool.size(); ++t) decoders.push_back(std::make_unique<Decoder>(m, shared, pool.barrier, t));
  }
  Pool& pool;
  Shared shared;
  std::vector<std::unique_ptr<Decoder>> decoders;
};

}  // namespace ff

extern "C" {

const char* ff_isa() { return FF_ISA; }

// Sizes of the structs, so that Python notices if its own differ.
void ff_sizes(int64_t* out) {
  out[0] = sizeof(ff::Gemv), out[1] = sizeof(ff::Layer), out[2] = sizeof(ff::Model), out[3] = sizeof(ff::Cache);
  out[4] = sizeof(ff::Request);
}

void* ff_pool(int threads) { return new (std::nothrow) ff::Pool(threads); }

void ff_pool_delete(void* pool) { delete static_cast<ff::Pool*>(pool); }

// Null if memory ran out. The model and the pool must outlive it.
void* ff_session(const ff::Model* model, void* pool, int64_t max_len) {
  try {
    return new ff::Session(*model, *static_cast<ff::Pool*>(pool), max_len);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void ff_session_delete(void* session) { delete static_cast<ff::Session*>(session); }

void ff_decode(void* session_, const ff::Cache* cache, ff::Request* request) {
  auto& session = *static_cast<ff::Session*>(session_);
  const int threads = std::min(request->threads, session.pool.size());
  session.pool.run(threads, [&](int t) { session.decoders[t]->run(*cache, *request, threads); });
}

// Bytes read a second from memory by each thread, for the physical limit of benchmarks.
double ff_read(const uint8_t* data, int64_t bytes, void* pool_, int threads) {
  auto& pool = *static_cast<ff::Pool*>(pool_);
  std::vector<double> sums(threads * 8);
  pool.run(threads, [&](int t) {
    const int64_t share = bytes / threads / 256 * 256;
    const float* p = reinterpret_cast<const float*>(data + t * share);
    ff::F a = ff::zero(), b = ff::zero(), c = ff::zero(), d = ff::zero();
    for (int64_t i = 0; i < share / 4; i += 64) {
      a = a + ff::load(p + i), b = b + ff::load(p + i + 16), c = c + ff::load(p + i + 32), d = d + ff::load(p + i + 48);
      ff::prefetch(p + i + 512);
    }
    sums[t * 8] = ff::sum((a + b) + (c + d));
  });
  double total = 0;
  for (double s : sums) total += s;
  return total;
}

}  // extern "C"
