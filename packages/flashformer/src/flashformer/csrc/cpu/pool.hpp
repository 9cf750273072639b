// Threads that wait for work, and the barrier between stages. Whoever waits spins first, then lets
// others run, then sleeps: spinning alone starves a machine with more threads than cores.
#pragma once
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "simd.hpp"

namespace ff {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A stage's imbalance is a few microseconds. Who spins much longer than that on a machine with more
// threads than cores keeps the one it waits for from running.
constexpr int SPINS = 300, YIELDS = 300;

// Waits until `value` is no longer `old`; `idle` is called while it spins.
template <class Idle>
void await_change(std::atomic<uint32_t>& value, uint32_t old, std::atomic<int>& sleepers, int spins, Idle idle) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    idle();
    relax();
  }
  for (int i = 0; i < YIELDS; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    std::this_thread::yield();
  }
  sleepers.fetch_add(1);
  while (value.load() == old) value.wait(old);
  sleepers.fetch_sub(1);
}

inline void change(std::atomic<uint32_t>& value, std::atomic<int>& sleepers) {
  value.fetch_add(1);
  if (sleepers.load()) value.notify_all();
}

class Barrier {
 public:
  template <class Idle>
  void wait(int threads, Idle idle) {
    if (threads == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      change(round_, sleepers_);
    } else {
      await_change(round_, round, sleepers_, SPINS, idle);
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> sleepers_{0};
};

class Pool {
 public:
  explicit Pool(int threads) : bells_(threads) {
    for (int i = 1; i < threads; ++i) threads_.emplace_back([this, i] { work(bells_[i], i); });
  }
  ~Pool() {
    stop_ = true;
    for (auto& bell : bells_) change(bell.number, bell.sleepers);
    for (auto& thread : threads_) thread.join();
  }
  int size() const { return int(threads_.size()) + 1; }

  // Calls job(0) here and job(1) to job(threads - 1) in as many others; returns when all are done.
  // The rest sleep on.
  void run(int threads, const std::function<void(int)>& job) {
    job_ = &job;
    running_.store(threads - 1);
    for (int i = 1; i < threads; ++i) change(bells_[i].number, bells_[i].sleepers);
    job(0);
    while (running_.load(std::memory_order_acquire)) {
      for (int i = 0; i < SPINS && running_.load(std::memory_order_acquire); ++i) relax();
      if (running_.load(std::memory_order_acquire)) std::this_thread::yield();
    }
  }
  Barrier barrier;

 private:
  struct alignas(64) Bell {  // one a thread: how many jobs it was called to
    std::atomic<uint32_t> number{0};
    std::atomic<int> sleepers{0};
  };

  void work(Bell& bell, int index) {
    for (uint32_t seen = 0;; ++seen) {
      await_change(bell.number, seen, bell.sleepers, SPINS, [] {});
      if (stop_) return;
      (*job_)(index);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<Bell> bells_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int> running_{0};
};

}  // namespace ff
