// The ring: slots of shared memory through which all weights of a worker flow, in the order they are
// used. One warp, the producer, fills it and never waits for the grid, only for free slots; so the
// weights of the next stages come while this worker waits for others.
//
// Piece n lies in slot n % SLOTS and belongs to consumer warp n % WARPS. Since WARPS divides SLOTS a
// slot is always the same warp's, which therefore sees its phases one after the other.
#pragma once
#include "shape.cuh"

namespace ff {

struct Ring {
  u8* slots;
  u64 *full, *empty;  // [SLOTS] barriers each

  FF_DEVICE explicit Ring(u8* memory)
      : slots(memory), full(reinterpret_cast<u64*>(memory + BARRIERS_AT)), empty(full + spec::SLOTS) {}

  FF_DEVICE void init() {  // by one thread, before all others
    for (int s = 0; s < spec::SLOTS; ++s) {
      mbarrier_init(full + s, FULL_ARRIVALS);
      mbarrier_init(empty + s, 1);
    }
    mbarriers_ready();
  }

  // Waits for piece n and returns it.
  FF_DEVICE const u8* take(u32 n) {
    const u32 slot = n % spec::SLOTS, phase = n / spec::SLOTS;
    while (!mbarrier_done(full + slot, phase & 1)) {}
    return slots + slot * spec::SLOT_BYTES;
  }

  FF_DEVICE void give_back(u32 n, int lane) {
    warp_sync();
    if (lane == 0) mbarrier_arrive(empty + n % spec::SLOTS);
  }
};

// The warp that fills the ring.
struct Producer {
  Ring ring;
  const int worker, lane;
  const u8* from;        // what comes next
  volatile i32* stop;    // the consumers want no more
  u32 n = 0;             // pieces asked for
  bool alive = true;

  FF_DEVICE void push(u32 bytes) {
    const u32 slot = n % spec::SLOTS, phase = n / spec::SLOTS;
    while (!mbarrier_done(ring.empty + slot, (phase & 1) ^ 1)) {  // at first all are empty
      if (*stop) {
        alive = false;
        return;
      }
    }
    fetch(ring.slots + slot * spec::SLOT_BYTES, from, bytes, ring.full + slot, lane);
    from += bytes;
    ++n;
  }

  template <int S>
  FF_DEVICE void stage() {
    const u8* begin = from;
    const int tiles = Shape<S>::tiles(worker);
    for (int t = 0; t < tiles && alive; ++t)
      for (int piece = 0; piece < Shape<S>::pieces && alive; ++piece) push(Shape<S>::bytes_of(piece));
    from = begin + Shape<S>::stream_bytes(worker);
  }

  // A block must not end while copies are on their way into its memory.
  FF_DEVICE void drain() {
    for (u32 i = n > u32(spec::SLOTS) ? n - spec::SLOTS : 0; i < n; ++i) ring.take(i);
  }
};

}  // namespace ff
