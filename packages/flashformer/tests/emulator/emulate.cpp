// The kernels of csrc/cuda run on the CPU, and single functions of theirs, for the tests.
#define FF_HOST "machine.hpp"
#include "graph.cuh"
#include "probe.cuh"

extern "C" {

// 0, or 1 if it hangs. `silent` blocks do not take part, to see what the others do.
int ff_emulate_decode(const ff::Model* m, unsigned seed, int silent) {
  return !machine::run(spec::WORKERS - silent, ff::THREADS, ff::SHARED_BYTES, seed, [&] { ff::decode(*m); });
}

int ff_emulate_step(const ff::Model* m, unsigned seed, int head) {
  const auto run = [&](int blocks, auto stage) {
    return machine::run(blocks, ff::THREADS, ff::SHARED_BYTES, seed++, [&] { stage(); });
  };
  bool good = true;
  for (int l = 0; l < spec::LAYERS && good; ++l)
    good = run(spec::WORKERS, [&] { ff::qkv_stage(*m, l); }) && run(spec::WORKERS, [&] { ff::attention_stage(*m, l); }) &&
           run(spec::WORKERS, [&] { ff::output_stage(*m, l); }) && run(spec::WORKERS, [&] { ff::up_stage(*m, l); }) &&
           run(spec::WORKERS, [&] { ff::down_stage(*m, l); });
  if (head) good = good && run(spec::WORKERS, [&] { ff::head_stage(*m); });
  return !(good && run(1, [&] { ff::advance_stage(*m); }));
}

int ff_emulate_stream(const ff::Model* m, unsigned seed) {
  return !machine::run(spec::WORKERS, ff::THREADS, ff::SHARED_BYTES, seed, [&] { ff::probe_stream(*m); });
}

int ff_emulate_waits(const ff::Model* m, unsigned seed, int rounds) {
  return !machine::run(spec::WORKERS, ff::THREADS, ff::SHARED_BYTES, seed, [&] { ff::probe_waits(*m, rounds); });
}

void ff_philox(u64 seed, u64 step, int count, u32* out) {
  for (int i = 0; i < count; ++i) out[i] = ff::philox(seed, step, u32(i / 4), i % 4);
}
void ff_gumbel(u64 seed, u64 step, int count, double* out) {
  for (int i = 0; i < count; ++i) out[i] = ff::gumbel(seed, step, i);
}
void ff_to_bf16(const float* from, int count, u16* out) {
  for (int i = 0; i < count; ++i) out[i] = ff::float_to_bf16(from[i]);
}
void ff_silu(const float* from, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = ff::silu(from[i]);
}
int ff_beats(float a, int i, float b, int j) { return ff::beats({a, i}, {b, j}); }
int ff_shared_bytes() { return ff::SHARED_BYTES; }
}
