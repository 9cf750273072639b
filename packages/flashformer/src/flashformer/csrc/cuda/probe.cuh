// What the machine can do at best: the waits of the grid alone, and the stream of weights alone.
#pragma once
#include "decode.cuh"

namespace ff {

FF_DEVICE void probe_waits(const Model& m, int rounds) {
  const int thread = thread_number(), worker = block_number();
  u8* memory = shared_memory();
  start_block(memory, thread);
  if (thread >= CONSUMERS) return;
  Small* small = reinterpret_cast<Small*>(memory + SMALL_AT);
  Grid grid{m.state, worker, thread, &small->abandoned, m.request->patience};
  for (int i = 0; i < rounds; ++i)
    if (!grid.wait(i)) return;
}

// All weights of `steps` tokens through the ring; the consumers give every slot back at once.
FF_DEVICE void probe_stream(const Model& m) {
  const int thread = thread_number(), worker = block_number();
  u8* memory = shared_memory();
  start_block(memory, thread);
  if (thread >= CONSUMERS) return produce(m, memory, worker, thread - CONSUMERS);
  const u32 layer = Shape<QKV>::tiles(worker) * Shape<QKV>::pieces + Shape<OUTPUT>::tiles(worker) * Shape<OUTPUT>::pieces +
                    Shape<UP>::tiles(worker) * Shape<UP>::pieces + Shape<DOWN>::tiles(worker) * Shape<DOWN>::pieces;
  const u32 head = Shape<HEAD>::tiles(worker) * Shape<HEAD>::pieces;
  Ring ring(memory);
  u32 all = 0;
  for (i64 step = 0; step < m.request->steps; ++step)
    all += layer * spec::LAYERS + (logits_of(*m.request, step) ? head : 0);
  for (u32 n = thread / 32; n < all; n += spec::WARPS) {
    ring.take(n);
    ring.give_back(n, thread % 32);
  }
}

}  // namespace ff
