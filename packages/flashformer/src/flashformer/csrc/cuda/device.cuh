// The instructions of the GPU that are more than arithmetic, each under a name. The tests compile
// everything else for the CPU, with another file in the place of this one (FF_HOST).
#pragma once

using i8 = signed char;
using u8 = unsigned char;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

#ifdef FF_HOST
#include FF_HOST
#else

#define FF_DEVICE __device__ __forceinline__
#define FF_BOTH __host__ __device__ __forceinline__  // also while compiling

namespace ff {

// ---- where this thread is ------------------------------------------------------------------------

FF_DEVICE int thread_number() { return threadIdx.x; }
FF_DEVICE int block_number() { return blockIdx.x; }

FF_DEVICE u8* shared_memory() {
  extern __shared__ __align__(128) u8 memory[];
  return memory;
}

// ---- arithmetic that C++ has no word for ---------------------------------------------------------

FF_DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
FF_DEVICE u32 as_bits(float value) { return __float_as_uint(value); }

FF_DEVICE float half_to_float(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// c + the sum of four products of int8.
FF_DEVICE i32 dot4(u32 a, u32 b, i32 c) { return __dp4a(i32(a), i32(b), c); }

// ---- warps ---------------------------------------------------------------------------------------

constexpr u32 EVERY_LANE = 0xffffffffu;

template <class T>
FF_DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(EVERY_LANE, value, mask); }
template <class T>
FF_DEVICE T shuffle_down(T value, int by) { return __shfl_down_sync(EVERY_LANE, value, by); }
FF_DEVICE void warp_sync() { __syncwarp(); }

// ---- the block -----------------------------------------------------------------------------------

// Barrier `id` of the block, for `count` of its threads.
FF_DEVICE void threads_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

FF_DEVICE u32 address_of(const void* shared) { return u32(__cvta_generic_to_shared(shared)); }

FF_DEVICE void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copies that will arrive at them.
FF_DEVICE void mbarriers_ready() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

FF_DEVICE void mbarrier_arrive(u64* barrier) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(address_of(barrier)) : "memory");
}

// Whether the phase of this parity is complete; may take a while to say no.
FF_DEVICE bool mbarrier_done(u64* barrier, u32 parity) {
  u32 done;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done) : "r"(address_of(barrier)), "r"(parity) : "memory");
#else
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done) : "r"(address_of(barrier)), "r"(parity) : "memory");
#endif
  return done != 0;
}

// ---- copies into shared memory -------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900
constexpr int FULL_ARRIVALS = 1;  // one thread announces the bytes that the copy engine will bring
#else
constexpr int FULL_ARRIVALS = 32;  // each lane arrives when its own copies have
#endif

// Called by the whole warp: bytes, a multiple of 16, from `from` to `to`; then `full` completes.
FF_DEVICE void fetch(u8* to, const u8* from, u32 bytes, u64* full, int lane) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(address_of(full)), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address_of(to)),
        "l"(from), "r"(bytes), "r"(address_of(full))
        : "memory");
  }
#else
  for (u32 i = 16 * lane; i < bytes; i += 16 * 32)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address_of(to + i)), "l"(from + i) : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address_of(full)) : "memory");
#endif
}

// ---- the grid ------------------------------------------------------------------------------------

// What other blocks wrote, after a barrier of the grid: past the first-level cache of this SM, which
// may hold something older. Never the read-only path (__ldg) for these.
FF_DEVICE float fresh(const float* p) {
  float value;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(p) : "memory");
  return value;
}
FF_DEVICE float2 fresh(const float2* p) {
  float2 value;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(p) : "memory");
  return value;
}
FF_DEVICE float4 fresh(const float4* p) {
  float4 value;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "l"(p) : "memory");
  return value;
}
FF_DEVICE i32 fresh(const i32* p) {
  i32 value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// From the memory of the host, which may change it at any time.
FF_DEVICE i32 from_host(const i32* p) {
  i32 value;
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// Adds 1, after everything this block wrote before its last `threads_sync`.
FF_DEVICE void release_add(u64* counter) {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(counter), "l"(u64(1)) : "memory");
}
FF_DEVICE u64 load_acquire(const u64* counter) {
  u64 value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
  return value;
}
FF_DEVICE void raise_to(u64* counter, u64 value) {
  asm volatile("red.release.gpu.global.max.u64 [%0], %1;" ::"l"(counter), "l"(value) : "memory");
}
FF_DEVICE bool first_to_set(i32* flag) { return atomicCAS(flag, 0, 1) == 0; }

FF_DEVICE u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
  return now;
}

// ---- kernels that follow one another (graph mode) ------------------------------------------------

// Lets the next kernel begin, up to its `wait_for_previous`.
FF_DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
FF_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace ff
#endif
