// What Python hands over, field by field as in backends/cpu.py; nothing here is owned.
#pragma once
#include <cstdint>

namespace ff {

enum Format : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

// A matrix [rows, k] times a vector. The rows lie in tiles of 16; worker w owns the tiles
// first[w] to first[w + 1], which lie one after the other from stream[w].
struct Gemv {
  int32_t format, group, zeros, rows;  // group and zeros: of INT4
  int32_t k, k_padded;
  int64_t tile_bytes;
  const int32_t* first;
  const uint8_t* const* stream;
  const float* bias;  // [rows] or null
};

struct Layer {
  Gemv qkv, output, up, down;           // up: tiles of 8 gate rows and their 8 up rows
  const float *norm1, *norm2;           // [hidden]
  const float *query_norm, *key_norm;   // [head_dim] or null
  int32_t window, rotates;              // window 0: none
};

struct Model {
  int32_t hidden, intermediate, heads, kv_heads, head_dim, vocab, layers, workers;
  int32_t rotary;                       // leading elements of a head that turn
  int32_t chunk;                        // positions of one part of the attention
  int32_t embedding_format, cache_format;  // F32 or BF16
  float eps, attention_scale;
  const Layer* layer;
  Gemv head;
  const float* norm;
  const void* embedding;                // [vocab, hidden]
  const float *cos, *sin;               // [positions, rotary / 2]
};

// Keys lie in blocks of 16 positions, [kv_head][position / 16][head_dim][16]; values as
// [kv_head][position][head_dim]; head_dim padded to a multiple of 16.
struct Cache {
  void* const* keys;                    // one per layer
  void* const* values;
  int64_t max_len;                      // a multiple of 16
};

enum Choice : int32_t { NONE = 0, GREEDY = 1, GUMBEL = 2 };

struct Request {
  int64_t position;                     // of the first token
  int64_t steps;
  const int64_t* given;                 // [given_count >= 1], read before anything is chosen
  int64_t given_count;
  int64_t* chosen;                      // [steps - given_count + 1]; what was chosen
  int64_t chosen_count;                 // out
  const int64_t* ends;                  // tokens after which to stop
  int64_t ends_count;
  int32_t choice;
  int32_t all_logits;                   // 1: logits [steps, vocab]; 0: [vocab], the last step's
  float* logits;
  double temperature;
  double limit;                         // seconds from the start after which the token then chosen is the last
  uint64_t seed;
  const int32_t* cancel;                // stop where it is not 0
  int32_t not_a_number;                 // out: a logit was NaN
  int32_t threads;
  int32_t first, last;                  // stages of the plan to run: all, or a part of one token
};

}  // namespace ff
