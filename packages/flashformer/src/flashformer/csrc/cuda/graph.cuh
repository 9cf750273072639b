// One kernel per stage, for a CUDA graph: where the grid cannot be launched whole, to find faults,
// and to measure what the one kernel is worth. Kernels take the place of the waits for all workers.
// From sm_90 on a kernel begins while the one before is still running (programmatic dependent launch):
// its producer fills the ring, its consumers wait. Two blocks then share an SM, so the ring is half.
#pragma once
#include "decode.cuh"

namespace ff {

// Where the sequence is, from the state instead of from registers.
FF_DEVICE Token token_of(const Model& m) {
  const Request& r = *m.request;
  const i64 step = m.state->step;
  return {m.state->token, r.position + step, logits_of(r, step), step + 1 >= r.given_count && r.choice != NONE};
}

// Runs a stage whose weights begin at `offset` of each worker's stream.
template <int S, class Run>
FF_DEVICE void one_product(const Model& m, i64 offset, Run run) {
  u8* memory = shared_memory();
  const int thread = thread_number(), worker = block_number();
  start_block(memory, thread);
  let_next_begin();
  Small* small = reinterpret_cast<Small*>(memory + SMALL_AT);
  if (thread >= CONSUMERS) {
    Producer producer{Ring(memory), worker, thread - CONSUMERS, m.weights + m.starts[worker] + offset, &small->stop};
    producer.stage<S>();
    producer.drain();
    return;
  }
  wait_for_previous();
  if (m.state->stopped) {
    if (thread == 0) *const_cast<volatile i32*>(&small->stop) = 1;
    return;
  }
  Consumer c(m, memory, worker, thread);
  run(c, token_of(m));
}

FF_DEVICE void qkv_stage(const Model& m, int l) {
  one_product<QKV>(m, l * layer_bytes(block_number()), [&](Consumer& c, const Token& token) {
    c.qkv(l, Stream{m, l ? -1 : token.id});
  });
}

FF_DEVICE void attention_stage(const Model& m, int l) {
  const int thread = thread_number();
  let_next_begin();
  if (thread >= CONSUMERS) return;
  wait_for_previous();
  if (m.state->stopped) return;
  Consumer c(m, shared_memory(), block_number(), thread);
  c.attention(l, token_of(m).position);
}

FF_DEVICE void output_stage(const Model& m, int l) {
  const int worker = block_number();
  one_product<OUTPUT>(m, l * layer_bytes(worker) + Shape<QKV>::stream_bytes(worker),
                      [&](Consumer& c, const Token& token) {
                        c.output(l, Stream{m, l ? -1 : token.id}, token.position);
                      });
}

FF_DEVICE void up_stage(const Model& m, int l) {
  const int worker = block_number();
  one_product<UP>(m, (l + 1) * layer_bytes(worker) - Shape<UP>::stream_bytes(worker) - Shape<DOWN>::stream_bytes(worker),
                  [&](Consumer& c, const Token&) { c.up(l); });
}

FF_DEVICE void down_stage(const Model& m, int l) {
  const int worker = block_number();
  one_product<DOWN>(m, (l + 1) * layer_bytes(worker) - Shape<DOWN>::stream_bytes(worker),
                    [&](Consumer& c, const Token&) { c.down(l); });
}

FF_DEVICE void head_stage(const Model& m) {
  one_product<HEAD>(m, spec::LAYERS * layer_bytes(block_number()),
                    [&](Consumer& c, const Token& token) { c.head(token); });
}

// Ends a token, with one block: chooses, notes whether to stop, and goes on to the next.
FF_DEVICE void advance_stage(const Model& m) {
  const int thread = thread_number();
  let_next_begin();
  if (thread >= CONSUMERS) return;
  wait_for_previous();
  State& state = *m.state;
  if (state.stopped) return;
  Consumer c(m, shared_memory(), 0, thread);
  const Request& r = c.r;
  const Token token = token_of(m);
  const i64 step = state.step, next = token.choose ? c.choose() : -1;
  consumers_sync();  // all have read the state
  if (thread) return;
  if (token.choose) {
    r.chosen[state.chosen_count++] = next;
    state.stopped = next < 0 || state.cancelled || ends(r, next);
  }
  state.step = step + 1;
  state.token = step + 1 < r.given_count ? r.given[step + 1] : next;
}

}  // namespace ff
