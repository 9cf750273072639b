// How the weights of a stage lie in a worker's stream, and how they are cut into pieces that fit a
// slot of the ring. All of it is known at compile time, but for the share of a worker.
//
// A tile is 16 rows (flashformer/pack.py says how each format lays them out). Its units are what a
// warp takes in one step: 512 bytes, of int4 the block of a group with its scales.
#pragma once
#include "model.cuh"

namespace ff {

constexpr int TILE = 16;
constexpr int ACTIVATION_GROUP = 128;  // of int8: elements of the input that share a scale
constexpr int CONSUMERS = 32 * spec::WARPS;
constexpr int THREADS = CONSUMERS + 32;  // and the warp of the producer
constexpr int WIDTH = padded(spec::HEAD_DIM, 16);
constexpr int GROUP_HEADS = spec::HEADS / spec::KV_HEADS;
static_assert(spec::SLOTS % spec::WARPS == 0, "a slot must always be the same warp's");

template <int S>
struct Shape {
  static constexpr int format = spec::FORMAT[S], group = spec::GROUP[S], zeros = spec::ZEROS[S];
  static constexpr int rows = spec::ROWS[S], k = spec::K[S], k_padded = padded(k, 32);

  static constexpr int unit_k = format == F32 ? 8 : format == BF16 ? 16 : format == INT8 ? 32 : group;
  static constexpr int unit_bytes = format == INT4 ? 8 * group + (zeros ? 48 : 32) : 512;
  static constexpr int units = k_padded / unit_k;
  static constexpr int tail = format == INT8 ? 64 : 0;  // scales of the rows
  static constexpr int tile_bytes = units * unit_bytes + tail;

  static constexpr int together = format == INT8 ? ACTIVATION_GROUP / unit_k : 1;  // share a scale
  static constexpr int fit = (spec::SLOT_BYTES - tail) / (unit_bytes * together) * together;
  static constexpr int even = over(units, over(units, fit));
  static constexpr int piece_units = padded(even, together);
  static constexpr int pieces = over(units, piece_units);
  static_assert(fit > 0 && piece_units <= fit, "a piece must fit a slot");

  // Partial sums of a tile until all its pieces are done; one more row for the scales of int8.
  static constexpr int entries = pieces + (format == INT8);
  static constexpr int round_tiles = spec::ROUND / entries;
  static_assert(round_tiles > 0, "a round must hold a tile");

  static FF_DEVICE int units_of(int piece) {
    return piece + 1 < pieces ? piece_units : units - (pieces - 1) * piece_units;
  }
  static FF_DEVICE u32 bytes_of(int piece) {
    return u32(units_of(piece) * unit_bytes + (piece + 1 < pieces ? 0 : tail));
  }

  // The plan's partition: runs of tiles that differ by one at most.
  static constexpr int all_tiles = S == UP ? over(rows / 2, TILE / 2) : over(rows, TILE);
  static FF_DEVICE int first_tile(int worker) {
    return worker * (all_tiles / spec::WORKERS) + least(worker, all_tiles % spec::WORKERS);
  }
  static FF_DEVICE int tiles(int worker) { return first_tile(worker + 1) - first_tile(worker); }
  static FF_DEVICE i64 stream_bytes(int worker) {  // each stage begins at a multiple of 64
    return (i64(tiles(worker)) * tile_bytes + 63) / 64 * 64;
  }
};

FF_DEVICE i64 layer_bytes(int worker) {
  return Shape<QKV>::stream_bytes(worker) + Shape<OUTPUT>::stream_bytes(worker) +
         Shape<UP>::stream_bytes(worker) + Shape<DOWN>::stream_bytes(worker);
}

// ---- shared memory -------------------------------------------------------------------------------

FF_BOTH constexpr int most_floats(int s) {  // of Input::values, from stage s on
  return s > HEAD ? padded(most(spec::HIDDEN, spec::HEADS * spec::HEAD_DIM), 32)
                  : most(spec::FORMAT[s] >= INT8 ? 0 : padded(spec::K[s], 32), most_floats(s + 1));
}
FF_BOTH constexpr int most_int8s(int s) {  // of Input::quantised
  return s > HEAD ? 0 : most(spec::FORMAT[s] >= INT8 ? padded(spec::K[s], 32) : 0, most_int8s(s + 1));
}
constexpr int FLOATS = most_floats(QKV), INT8S = most_int8s(QKV);
constexpr int MERGED = GROUP_HEADS >= 4 ? 4 : GROUP_HEADS >= 2 ? 2 : 1;  // heads at a time in the attention
constexpr int ATTENTION_FLOATS =
    (GROUP_HEADS + 1) * WIDTH + spec::WARPS * MERGED * (WIDTH + 2) + spec::WARPS * MERGED * TILE;
constexpr int SCRATCH_BYTES = padded(most(4 * FLOATS + INT8S + INT8S / 8, 4 * ATTENTION_FLOATS), 128);
constexpr int PARTIAL_FLOATS = spec::ROUND * TILE;  // twice

// One after the other: ring, scratch, partial sums, barriers, small things.
constexpr int SCRATCH_AT = spec::SLOTS * spec::SLOT_BYTES;
constexpr int PARTIAL_AT = SCRATCH_AT + SCRATCH_BYTES;
constexpr int BARRIERS_AT = PARTIAL_AT + 2 * 4 * PARTIAL_FLOATS;
constexpr int SMALL_AT = BARRIERS_AT + 16 * spec::SLOTS;
constexpr int SHARED_BYTES = SMALL_AT + 512;
static_assert(SHARED_BYTES <= spec::SHARED_LIMIT, "backends/cuda_build.py chose too many slots");

}  // namespace ff
