// Waiting for all workers. One counter that only grows: the plan's wait "all have finished stage n"
// is "WORKERS (n + 1) have arrived".
#pragma once
#include "shape.cuh"

namespace ff {

constexpr int CONSUMER_BARRIER = 1;  // of the block; 0 is all of its threads'
constexpr u64 ABANDONED = u64(1) << 62;

FF_DEVICE void consumers_sync() { threads_sync(CONSUMER_BARRIER, CONSUMERS); }

struct Grid {
  State* state;
  const int worker, thread;
  volatile i32* abandoned;  // in shared memory
  u64 patience;
  u64 wanted = 0;

  // Called by all consumers: everything written before by any worker can be read after. False if
  // somebody did not come: then all workers leave, each at its next wait, and the state says where.
  FF_DEVICE bool wait(int stage) {
    wanted += spec::WORKERS;
    consumers_sync();
    if (thread == 0) {
      release_add(&state->arrived);
      u64 seen = load_acquire(&state->arrived), begin = 0;
      for (u32 polls = 1; seen < wanted; ++polls) {
        seen = load_acquire(&state->arrived);
        if (polls % 256) continue;
        const u64 now = nanoseconds();
        if (!begin) begin = now;
        if (now - begin > patience && seen < wanted) {
          report(stage, seen);
          raise_to(&state->arrived, ABANDONED);
          seen = ABANDONED;
        }
      }
      *abandoned = seen >= ABANDONED;
    }
    consumers_sync();
    return !*abandoned;
  }

  FF_DEVICE void report(int stage, u64 seen) {
    if (!first_to_set(&state->hung)) return;
    state->hung_stage = stage;
    state->hung_worker = worker;
    state->hung_arrived = seen;
    state->hung_wanted = wanted;
  }
};

}  // namespace ff
