// What Python hands over, field by field as in backends/cuda_build.py, and the numbers of spec.h.
#pragma once
#include "maths.cuh"
#include "spec.h"

namespace ff {

enum Format { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
enum Product { QKV = 0, OUTPUT = 1, UP = 2, DOWN = 3, HEAD = 4 };  // stages that stream weights
enum Choice { NONE = 0, GREEDY = 1, GUMBEL = 2 };

struct Layer {
  const float *norm1, *norm2;                                   // [HIDDEN]
  const float *query_norm, *key_norm;                           // [HEAD_DIM] or null
  const float *qkv_bias, *output_bias, *up_bias, *down_bias;    // [rows] or null; up: in tile order
  i32 window, rotates;                                          // window 0: none
};

// Constant while a call runs; the host writes it before.
struct Request {
  i64 position;       // of the first token
  i64 steps;
  const i64* given;   // [given_count >= 1], read before anything is chosen
  i64 given_count;
  i64* chosen;        // [steps - given_count + 1]; what was chosen
  const i64* ends;    // tokens after which to stop
  i64 ends_count;
  i32 choice, all_logits;  // all_logits 1: logits [steps, VOCAB]; 0: [VOCAB], the last step's
  float* logits;
  double temperature;
  u64 seed;
  const i32* cancel;  // in the memory of the host; stop where it is not 0
  void* const* keys;    // one per layer, [KV_HEADS][max_len / 16][WIDTH][16]: the layout of the CPU
  void* const* values;  // one per layer, [KV_HEADS][max_len][WIDTH]
  i64 max_len;          // a multiple of 16
  i64 chunks;           // of the cache
  float* partial;       // [HEADS][chunks][WIDTH]
  float* tops;          // [HEADS][chunks][2]
  u64 patience;         // nanoseconds until a wait is taken for a hang
};

// Zeroed by the host before a call.
struct State {
  u64 arrived;        // workers that have finished a stage, over all stages so far
  u64 line[15];       // the counter has a cache line of its own
  i64 chosen_count;
  i32 cancelled, not_a_number;
  i32 hung, hung_stage, hung_worker, hung_padding;  // of the first wait that took too long
  u64 hung_arrived, hung_wanted;
  i64 step, token;    // graph mode: where the sequence is
  i32 stopped, stopped_padding;
};

struct Model {
  const u8* weights;      // the streams of all workers
  const i64* starts;      // [WORKERS] bytes: where each begins
  const Layer* layers;    // [LAYERS]
  const float* norm;      // [HIDDEN]
  const void* embedding;  // [VOCAB, HIDDEN]
  const float *cos, *sin; // [positions, ROTARY / 2]
  float eps, attention_scale;
  float* x;               // [HIDDEN]
  float* qkv;             // [(HEADS + 2 KV_HEADS) HEAD_DIM]
  float* act;             // [INTERMEDIATE]
  Best* best;             // [WORKERS]
  const Request* request;
  State* state;
};

static_assert(sizeof(Layer) == spec::LAYER_SIZE && sizeof(Request) == spec::REQUEST_SIZE &&
                  sizeof(State) == spec::STATE_SIZE && sizeof(Model) == spec::MODEL_SIZE,
              "model.cuh and backends/cuda_build.py differ");

}  // namespace ff
