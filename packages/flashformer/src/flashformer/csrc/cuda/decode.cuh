// The whole model in one kernel: for every token the stages of the plan, one after the other, with a
// wait for all workers where the plan has one. Read `Consumer::layer` and `Consumer::head`, then
// `decode`. A worker is a block; one of its warps streams the weights (ring.cuh), the others compute.
//
// Not yet run or measured on a GPU: the tests run it on the CPU (tests/emulator) and check that it
// compiles without spills. What is said about time in these files is what was designed for.
#pragma once
#include "input.cuh"
#include "ring.cuh"

namespace ff {

// Small things in shared memory.
struct Small {
  i32 stop;       // the producer is to stop
  i32 abandoned;  // somebody did not come to a wait
  Best best[spec::WARPS];
  float room[spec::WARPS];
};
static_assert(sizeof(Small) <= 512, "SMALL_AT leaves no room");

// One token's way through the model.
struct Token {
  i64 id, position;
  float* logits;  // null: none are wanted
  bool choose;
};

// Whether step `step` of a call has logits, and where.
FF_DEVICE float* logits_of(const Request& r, i64 step) {
  if (r.all_logits) return r.logits + step * spec::VOCAB;
  return step + 1 >= r.given_count ? r.logits : nullptr;
}

struct Consumer {
  const Model& m;
  const Request& r;
  u8* memory;
  Small* small;
  const int worker, thread, warp, lane;
  Ring ring;
  Input input;
  u32 n = 0;  // pieces that came before this stage's

  FF_DEVICE Consumer(const Model& m, u8* memory, int worker, int thread)
      : m(m), r(*m.request), memory(memory), small(reinterpret_cast<Small*>(memory + SMALL_AT)), worker(worker),
        thread(thread), warp(thread / 32), lane(thread % 32), ring(memory), input(memory + SCRATCH_AT) {}

  // ---- the stages --------------------------------------------------------------------------------

  FF_DEVICE void qkv(int l, const Stream& x) {
    normalise(x, m.layers[l].norm1, m.eps, input.values, small->room, thread);
    ready<QKV>(input, m.act, thread);
    const float* bias = m.layers[l].qkv_bias;
    multiply<QKV>([&](int row, float sum) {
      if (row < Shape<QKV>::rows) m.qkv[row] = sum + (bias ? bias[row] : 0.0f);
    });
  }

  FF_DEVICE void attention(int l, i64 position) {
    const Span seen(m.layers[l].window, position);
    for (int part = worker; part < seen.count * spec::KV_HEADS; part += spec::WORKERS) {
      if constexpr (spec::CACHE_FORMAT == F32) attend<float>(m, r, l, position, seen, part, memory + SCRATCH_AT, thread);
      else attend<u16>(m, r, l, position, seen, part, memory + SCRATCH_AT, thread);
    }
  }

  FF_DEVICE void output(int l, const Stream& x, i64 position) {
    combine(r, Span(m.layers[l].window, position).count, input.values, thread);
    ready<OUTPUT>(input, m.act, thread);
    const float* bias = m.layers[l].output_bias;
    multiply<OUTPUT>([&](int row, float sum) {
      if (row < spec::HIDDEN) m.x[row] = x[row] + sum + (bias ? bias[row] : 0.0f);
    });
  }

  FF_DEVICE void up(int l) {
    normalise(Stream{m, -1}, m.layers[l].norm2, m.eps, input.values, small->room, thread);
    ready<UP>(input, m.act, thread);
    const float* bias = m.layers[l].up_bias;
    multiply<UP>([&](int row, float sum) {  // rows 0..7 of a tile: gate; 8..15: up
      if (bias && row < Shape<UP>::all_tiles * TILE) sum += bias[row];
      const float other = shuffle_down(sum, TILE / 2);
      const int i = row / TILE * (TILE / 2) + row % TILE;
      if (row % TILE < TILE / 2 && i < spec::INTERMEDIATE) m.act[i] = silu(sum) * other;
    });
  }

  FF_DEVICE void down(int l) {
    ready<DOWN>(input, m.act, thread);
    const float* bias = m.layers[l].down_bias;
    multiply<DOWN>([&](int row, float sum) {
      if (row < spec::HIDDEN) m.x[row] = fresh(m.x + row) + sum + (bias ? bias[row] : 0.0f);
    });
  }

  FF_DEVICE void head(const Token& token) {
    const i32 cancelled = worker == 0 && thread == 0 && r.cancel ? from_host(r.cancel) : 0;
    normalise(Stream{m, -1}, m.norm, m.eps, input.values, small->room, thread);
    ready<HEAD>(input, m.act, thread);
    Best best{0.0f, -1};
    bool nan = false;
    multiply<HEAD>([&](int row, float sum) {
      if (row >= spec::VOCAB) return;
      token.logits[row] = sum;
      nan |= sum != sum;
      if (token.choose) consider(row, sum, token.position, best);
    });
    if (nan) m.state->not_a_number = 1;
    best = best_of_consumers(best);
    if (thread == 0) m.best[worker] = best;
    if (cancelled) m.state->cancelled = 1;
  }

  FF_DEVICE void consider(i32 row, float value, i64 position, Best& best) {
    if (r.choice == GUMBEL) {
      const double scaled = double(value) / r.temperature;
      if (best.index >= 0 && scaled + MOST_NOISE < best.value) return;
      value = float(scaled + gumbel(r.seed, u64(position), row));
    }
    if (beats({value, row}, best)) best = {value, row};
  }

  // The best of all workers: the token chosen, or -1 if every logit is NaN.
  FF_DEVICE i32 choose() {
    Best best{0.0f, -1};
    for (int w = thread; w < spec::WORKERS; w += CONSUMERS) {
      const Best other{fresh(&m.best[w].value), fresh(&m.best[w].index)};
      if (beats(other, best)) best = other;
    }
    return best_of_consumers(best).index;
  }

  FF_DEVICE Best best_of_consumers(Best best) {
    for (int mask = 16; mask; mask /= 2) {
      const Best other{shuffle_xor(best.value, mask), shuffle_xor(best.index, mask)};
      if (beats(other, best)) best = other;
    }
    if (lane == 0) small->best[warp] = best;
    consumers_sync();
    for (int w = 0; w < spec::WARPS; ++w)
      if (beats(small->best[w], best)) best = small->best[w];
    consumers_sync();
    return best;
  }

  // ---- a product ---------------------------------------------------------------------------------

  // Calls emit(row, sum) for all rows of this worker's tiles, each by one thread, whole warps at a
  // time; rows over the end are padding. Warps take the pieces as they come; after a round of tiles
  // the pieces of each row are added up, in their order, so that results never vary.
  template <int S, class Emit>
  FF_DEVICE void multiply(Emit emit) {
    using A = Shape<S>;
    const int first = A::first_tile(worker), tiles = A::tiles(worker);
    int piece = (warp + spec::WARPS - int(n % spec::WARPS)) % spec::WARPS;
    for (int round = 0, done = 0; done < tiles; ++round, done += A::round_tiles) {
      const int count = least(A::round_tiles, tiles - done);
      float* partial = reinterpret_cast<float*>(memory + PARTIAL_AT) + round % 2 * PARTIAL_FLOATS;
      for (; piece < (done + count) * A::pieces; piece += spec::WARPS) {
        const int tile = piece / A::pieces, part = piece % A::pieces;
        float* to = partial + ((tile - done) * A::entries + part) * TILE;
        const u8* slot = ring.take(n + piece);
        fold(piece_of<A>(slot, input, part, lane), lane, to);
        if (A::format == INT8 && part + 1 == A::pieces && lane < TILE)  // the rows' scales
          to[TILE + lane] = reinterpret_cast<const float*>(slot + A::units_of(part) * A::unit_bytes)[lane];
        ring.give_back(n + piece, lane);
      }
      consumers_sync();
      for (int i = thread; i < padded(count * TILE, 32); i += CONSUMERS) {
        const int tile = least(i / TILE, count - 1);
        const float* from = partial + tile * A::entries * TILE + i % TILE;
        float sum = 0.0f;
        for (int p = 0; p < A::pieces; ++p) sum += from[p * TILE];
        if (A::format == INT8) sum *= from[A::pieces * TILE];
        emit(i < count * TILE ? (first + done) * TILE + i : A::all_tiles * TILE + i % TILE, sum);
      }
    }
    n += tiles * A::pieces;
  }
};

// ---- the kernel ------------------------------------------------------------------------------------

FF_DEVICE void start_block(u8* memory, int thread) {
  Small* small = reinterpret_cast<Small*>(memory + SMALL_AT);
  if (thread == 0) {
    Ring(memory).init();
    small->stop = small->abandoned = 0;
  }
  threads_sync(0, THREADS);
}

// Streams the weights of all tokens.
FF_DEVICE void produce(const Model& m, u8* memory, int worker, int lane) {
  Small* small = reinterpret_cast<Small*>(memory + SMALL_AT);
  const Request& r = *m.request;
  const u8* begin = m.weights + m.starts[worker];
  Producer producer{Ring(memory), worker, lane, begin, &small->stop};
  for (i64 step = 0; step < r.steps && producer.alive; ++step) {
    producer.from = begin;
    for (int l = 0; l < spec::LAYERS && producer.alive; ++l) {
      producer.stage<QKV>();
      producer.stage<OUTPUT>();
      producer.stage<UP>();
      producer.stage<DOWN>();
    }
    if (logits_of(r, step)) producer.stage<HEAD>();
  }
  producer.drain();
}

// All layers and the head, with the waits of the plan. False if a wait was given up.
FF_DEVICE bool forward(Consumer& c, Grid& grid, const Token& token) {
  for (int l = 0; l < spec::LAYERS; ++l) {
    const Stream x{c.m, l ? -1 : token.id};
    c.qkv(l, x);
    if (!grid.wait(5 * l)) return false;
    c.attention(l, token.position);
    if (!grid.wait(5 * l + 1)) return false;
    c.output(l, x, token.position);
    if (!grid.wait(5 * l + 2)) return false;
    c.up(l);
    if (!grid.wait(5 * l + 3)) return false;
    c.down(l);
    if (!grid.wait(5 * l + 4)) return false;
  }
  if (!token.logits) return true;
  c.head(token);
  return grid.wait(5 * spec::LAYERS);
}

FF_DEVICE bool ends(const Request& r, i64 token) {
  for (i64 i = 0; i < r.ends_count; ++i)
    if (r.ends[i] == token) return true;
  return false;
}

FF_DEVICE void consume(const Model& m, u8* memory, int worker, int thread) {
  Consumer c(m, memory, worker, thread);
  const Request& r = c.r;
  Grid grid{m.state, worker, thread, &c.small->abandoned, r.patience};
  i64 next = r.given[0], chosen = 0;
  bool go_on = true;
  for (i64 step = 0; step < r.steps && go_on; ++step) {
    if (step < r.given_count) next = r.given[step];
    const bool choose = step + 1 >= r.given_count && r.choice != NONE;
    go_on = forward(c, grid, Token{next, r.position + step, logits_of(r, step), choose});
    if (!go_on || !choose) continue;
    next = c.choose();
    if (worker == 0 && thread == 0) r.chosen[chosen] = next;
    ++chosen;
    go_on = next >= 0 && !fresh(&m.state->cancelled) && !ends(r, next);
  }
  if (worker == 0 && thread == 0) m.state->chosen_count = chosen;
  if (thread == 0) *const_cast<volatile i32*>(&c.small->stop) = 1;
}

FF_DEVICE void decode(const Model& m) {
  u8* memory = shared_memory();
  const int thread = thread_number(), worker = block_number();
  start_block(memory, thread);
  if (thread >= CONSUMERS) produce(m, memory, worker, thread - CONSUMERS);
  else consume(m, memory, worker, thread);
}

}  // namespace ff
