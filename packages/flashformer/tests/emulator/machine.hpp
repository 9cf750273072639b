// A GPU for tests: every thread is a coroutine of one CPU thread, run in an order drawn at random, so
// that the very sources of csrc/cuda are executed, in the place of csrc/cuda/device.cuh. Copies into
// shared memory happen late and in any order. Memory caches are not imitated.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define FF_DEVICE inline
#define FF_BOTH inline

struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };

namespace machine {

struct Barrier { int arrived = 0; u64 generation = 0; };
struct Warp { Barrier barrier; u64 slots[2][32]; };
struct Block {
  std::vector<u8> memory;
  Barrier barriers[16];
  std::vector<Warp> warps;
};
struct Copy { u8* to; const u8* from; u32 bytes; u64* full; };
struct Thread {
  ucontext_t context;              // to begin with; from then on `place`, which costs no system call
  jmp_buf place;
  bool begun = false;
  int block, number;
  u64 turn = 0;                    // shuffles so far
  const u64* waits_on = nullptr;   // not to be run until this is no longer `seen`
  u64 seen = 0;
  bool done = false;
};

struct Grid {
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Copy> copies;
  jmp_buf scheduler;
  Thread* current = nullptr;
  std::function<void()> kernel;
  std::mt19937 random;
};
inline Grid* grid;

inline Block& block() { return grid->blocks[grid->current->block]; }
inline Warp& warp() { return block().warps[grid->current->number / 32]; }
inline void pause() {
  if (!_setjmp(grid->current->place)) _longjmp(grid->scheduler, 1);
}
inline void go_on(Thread& thread) {
  grid->current = &thread;
  if (_setjmp(grid->scheduler)) return;
  if (std::exchange(thread.begun, true)) _longjmp(thread.place, 1);
  setcontext(&thread.context);
}

inline void meet(Barrier& barrier, int count) {
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  grid->current->waits_on = &barrier.generation;
  grid->current->seen = barrier.generation;
  pause();
  grid->current->waits_on = nullptr;
}

template <class T>
T exchange(T value, int from) {
  Thread& me = *grid->current;
  Warp& w = warp();
  const int half = me.turn++ % 2;
  w.slots[half][me.number % 32] = 0;
  std::memcpy(&w.slots[half][me.number % 32], &value, sizeof value);
  meet(w.barrier, 32);
  std::memcpy(&value, &w.slots[half][from], sizeof value);
  return value;
}

// An mbarrier in its 64 bits: arrivals expected and pending, bytes outstanding, and the phase.
struct Mbarrier { u8 count, pending, phase, unused; i32 bytes; };
inline Mbarrier& of(u64* p) { return *reinterpret_cast<Mbarrier*>(p); }
inline void settle(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.count;
}

inline void copy_one() {
  const size_t which = grid->random() % grid->copies.size();
  const Copy copy = grid->copies[which];
  grid->copies.erase(grid->copies.begin() + which);
  std::memcpy(copy.to, copy.from, copy.bytes);
  of(copy.full).bytes -= copy.bytes;
  settle(of(copy.full));
}

inline void enter() {
  grid->kernel();
  grid->current->done = true;
  pause();
}

// Runs a kernel on so many blocks; false if it hangs.
inline bool run(int blocks, int threads, int shared, unsigned seed, std::function<void()> kernel) {
  static std::vector<std::unique_ptr<char[]>> stacks;  // not given back: there are many kernels
  constexpr size_t STACK = 32 * 1024;
  while (stacks.size() < size_t(blocks) * threads) stacks.emplace_back(new char[STACK]);
  Grid all;
  grid = &all;
  all.kernel = std::move(kernel);
  all.random.seed(seed);
  all.blocks.resize(blocks);
  for (Block& b : all.blocks) {
    b.memory.assign(shared + 128, 0xff);  // floats of it are NaN
    b.warps.resize(threads / 32);
  }
  for (int b = 0; b < blocks; ++b)
    for (int t = 0; t < threads; ++t) {
      auto thread = std::make_unique<Thread>();
      thread->block = b, thread->number = t;
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = stacks[b * threads + t].get();
      thread->context.uc_stack.ss_size = STACK;
      thread->context.uc_link = nullptr;
      makecontext(&thread->context, enter, 0);
      all.threads.push_back(std::move(thread));
    }
  std::vector<int> order(blocks);
  for (int b = 0; b < blocks; ++b) order[b] = b;
  for (size_t left = all.threads.size(), idle = 0; left;) {
    std::shuffle(order.begin(), order.end(), all.random);
    bool ran = false;
    for (int b : order) {
      if (blocks > 1 && all.random() % 4 == 0) continue;  // blocks fall behind
      for (int t = 0; t < threads; ++t) {
        Thread& thread = *all.threads[b * threads + t];
        if (thread.done || (thread.waits_on && *thread.waits_on == thread.seen)) continue;
        go_on(thread);
        ran = true;
        left -= thread.done;
      }
    }
    for (int i = 0; i < 4 && !all.copies.empty(); ++i)
      if (all.random() % 2) copy_one(), ran = true;
    idle = ran ? 0 : idle + 1;
    if (idle > 1000) return false;  // everyone waits for somebody
  }
  return all.copies.empty();  // else a block ended before its copies came
}

}  // namespace machine

namespace ff {

FF_DEVICE int thread_number() { return machine::grid->current->number; }
FF_DEVICE int block_number() { return machine::grid->current->block; }
FF_DEVICE u8* shared_memory() {
  u8* memory = machine::block().memory.data();
  return memory + (128 - reinterpret_cast<uintptr_t>(memory) % 128) % 128;
}

FF_DEVICE float as_float(u32 bits) { float v; std::memcpy(&v, &bits, 4); return v; }
FF_DEVICE u32 as_bits(float value) { u32 v; std::memcpy(&v, &value, 4); return v; }
FF_DEVICE float half_to_float(u16 bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24));
}
FF_DEVICE i32 dot4(u32 a, u32 b, i32 c) {
  for (int i = 0; i < 4; ++i) c += i8(a >> 8 * i) * i8(b >> 8 * i);
  return c;
}

template <class T>
FF_DEVICE T shuffle_xor(T value, int mask) { return machine::exchange(value, thread_number() % 32 ^ mask); }
template <class T>
FF_DEVICE T shuffle_down(T value, int by) {
  const int lane = thread_number() % 32;
  return machine::exchange(value, lane + by < 32 ? lane + by : lane);
}
FF_DEVICE void warp_sync() { machine::meet(machine::warp().barrier, 32); }
FF_DEVICE void threads_sync(int id, int count) { machine::meet(machine::block().barriers[id], count); }

FF_DEVICE void mbarrier_init(u64* barrier, u32 arrivals) { machine::of(barrier) = {u8(arrivals), u8(arrivals), 0, 0, 0}; }
FF_DEVICE void mbarriers_ready() {}
FF_DEVICE void mbarrier_arrive(u64* barrier) {
  --machine::of(barrier).pending;
  machine::settle(machine::of(barrier));
}
FF_DEVICE bool mbarrier_done(u64* barrier, u32 parity) {
  if (machine::of(barrier).phase != parity) return true;
  machine::pause();
  return false;
}
constexpr int FULL_ARRIVALS = 1;
FF_DEVICE void fetch(u8* to, const u8* from, u32 bytes, u64* full, int lane) {
  if (lane) return;
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    std::fprintf(stderr, "a copy of %u bytes is not aligned\n", bytes);
    std::abort();
  }
  machine::of(full).bytes += bytes;
  --machine::of(full).pending;
  machine::grid->copies.push_back({to, from, bytes, full});
}

template <class T>
FF_DEVICE T fresh(const T* p) { return *p; }
FF_DEVICE i32 from_host(const i32* p) { return *p; }
FF_DEVICE void release_add(u64* counter) { ++*counter; }
FF_DEVICE u64 load_acquire(const u64* counter) {
  machine::pause();
  return *counter;
}
FF_DEVICE void raise_to(u64* counter, u64 value) { *counter = std::max(*counter, value); }
FF_DEVICE bool first_to_set(i32* flag) { return !std::exchange(*flag, 1); }
FF_DEVICE u64 nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
FF_DEVICE void let_next_begin() {}
FF_DEVICE void wait_for_previous() {}

}  // namespace ff
