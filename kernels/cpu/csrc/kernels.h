// Interface of the kernels, which are compiled once per instruction set and do not depend on torch. All pointers are to
// contiguous memory unless strides say otherwise; strides count elements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace magicdec {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Weights : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };
enum class Codes : int { i8 = 0, e4m3 = 1 };
enum class Gate : int { none = 0, silu = 1, gelu_tanh = 2, clamped_silu = 3 };

// Threads that share the work of one kernel. run: calls work(context, piece, thread) once for each piece in [0, pieces), with
// thread < threads, and returns when all are done (pool.h).
struct Team {
  int threads;
  void (*run)(int threads, int64_t pieces, void (*work)(void* context, int64_t piece, int thread), void* context);
};

constexpr int BLOCK = 32;  // columns (output features) that are packed together
constexpr float E4M3_SCALE = 256;  // what kernels decode codes of e4m3 to is so much smaller, which takes fewer instructions

// A product of rows with packed weights: y = x w^T + bias, or its two halves joined.
struct ProductArgs {
  Team team;
  const float* bias;  // [blocks * BLOCK], or null
  int columns;        // output features; with a gate, half of the packed ones
  Gate gate;          // but for none, each block: 16 columns of the gate, then the same 16 of up
  Type in, out;
  const void* x;      // [rows, features]
  int features;
  int64_t x_stride;
  void* y;            // [rows, columns]
  int64_t y_stride;
  int rows;
  void* scratch;      // as many bytes as the product's function for them returns, 64-byte aligned
};

struct LinearArgs : ProductArgs {
  Weights format;
  const uint32_t* packed;  // [blocks][words][BLOCK]: words of neighbouring input features
  const float* scales;     // i8: [blocks * BLOCK], one per column
  const int32_t* offsets;  // i8: [blocks * BLOCK], product of an input of all -128, before scaling
  int words;               // per row, a multiple of 16, padded with zeros
  int tiles_from;          // number of rows from which on AMX tiles multiply, where there are any; results do not depend on it
};

// Weights of 8-bit codes, which are multiplied with inputs as they are.
struct CodedArgs : ProductArgs {
  Codes format;
  const uint8_t* packed;   // [blocks][groups * group_size / 2][BLOCK][2]: pairs of neighbouring input features
  const float* scales;     // [blocks][groups][BLOCK]; e4m3: times E4M3_SCALE
  int groups, group_size;  // features of a group, an even number; x has at most as many in all
};

enum class Zeros : int { eight = 0, points = 1, halves = 2, floats = 3 };

// The same with weights of 4 bits, in groups of features: scale * (code - zero), or scale * code + minimum. The input is rounded
// to bytes in these groups. packed: [blocks][words][BLOCK] words of codes of eight neighbouring input features (int4.h).
struct Int4Args : LinearArgs {
  int groups;                // they divide `words` evenly
  const void* group_scales;  // [blocks][groups][BLOCK], float16 or float32
  bool half_scales;
  const void* group_zeros;   // likewise: bytes of zeros, or minima of float16 or float32; none where zeros are all 8
  Zeros zeros;
};

// How records of sealed pages are coded (sealed.h); drafts read the upper codes of int4x2 alone.
enum class Sealed : int { int8 = 0, int4x2 = 1, int4x2_drafts = 2 };

constexpr int SEALED_SLOTS = 64;  // of a sealed page

// Sealed pages: records [count, kv_heads, bytes]. k_stride, v_stride: bytes from page to page; those of its heads follow each
// other.
struct SealedPages {
  Sealed kind;
  int64_t count;
  const uint8_t *k, *v;
  int64_t k_stride, v_stride;
};

struct AttentionArgs {
  Team team;
  Type type;  // of q, k, v and out
  const void *q, *k, *v;
  void* out;   // [tokens, heads, head_dim]
  float* lse;  // [tokens, heads]
  int rows, heads, kv_heads, head_dim, page_size;
  int64_t q_stride;         // from token to token; heads are contiguous
  int64_t page_stride;      // of k and v, from page to page; one head's page is contiguous
  const int64_t* queries;   // [rows]
  const int64_t* lengths;   // [rows]
  const int64_t* pages;     // [rows, width] or [rows, kv_heads, width]; from sealed.count on, those of k and v
  int64_t window;           // a query sees the last ones of its slots, this many at most; 0: all. Then no votes
  SealedPages sealed;       // count 0: there are none; else page_size is SEALED_SLOTS
  int64_t row_stride, head_stride;  // of pages; head_stride 0: one list for all KV heads
  float scale;
  const float* sinks;  // [heads]: score of one more slot, whose value is zero, that all queries of the head see; null: none
  int fetch_blocks;  // how many blocks of 64 slots ahead keys and values are prefetched; results do not depend on it
  bool fetch_to_l2;  // prefetch into the L2 cache, past the L1 cache
  const int64_t* voters;  // [rows, 2]: queries that vote, counted back from the row's last one, -1: none; null: no votes
  int vote_unit;          // consecutive slots that share a vote
  float* votes;           // [rows, kv_heads, units]
  int64_t votes_row_stride, votes_head_stride;
  void* scratch;
};

struct NormArgs {
  Team team;
  Type type;
  void* x;            // [rows, size]: the residual stream; delta is added to it
  const void* delta;  // [rows, size], or null
  const void* weight; // [size]
  void* out;          // [rows, size]
  int rows, size;
  float eps;
};

// Rotates queries and keys, stores keys and values in the pool.
struct RotaryArgs {
  Team team;
  Type type;
  void* qkv;  // [tokens, heads + 2 kv_heads, head_dim]; queries are rotated in place
  const float *cos, *sin;  // [positions, head_dim / 2]
  const int64_t* positions;  // [tokens]
  const int64_t* slots;      // [tokens]
  const void *q_norm, *k_norm;  // [head_dim], or null
  float eps;
  void *k, *v;  // [pages, kv_heads, page_size, head_dim]
  int64_t page_stride;
  int tokens, heads, kv_heads, head_dim, page_size;
};

struct SampleArgs {
  Team team;
  const float* logits;  // [rows, size]
  int64_t stride;
  int rows;
  int64_t size, first;          // this rank's slice of the vocabulary: tokens first … first + size - 1
  const float* temperature;     // [rows]; 0: the largest logit, without noise
  const int64_t *seeds, *positions;  // [rows]
  float* values;                // [rows], in: -inf; out: the largest logit / temperature + noise
  int64_t* tokens;              // [rows], in: `first`; out: the token of that value, the lowest among equals
  void* scratch;                // sample_scratch bytes
};

struct BestArgs {
  Team team;
  const float* x;  // [rows, size]
  int64_t rows, size, count;  // 1 <= count <= size
  int64_t* indices;  // [rows, count]
  void* scratch;     // best_scratch bytes
};

// Writes the element-wise minimum and maximum of the keys of each of some pages.
struct SummariseArgs {
  Team team;
  Type type;
  const void* k;         // [pages, kv_heads, page_size, head_dim]
  int64_t page_stride;   // of k
  const int64_t* pages;  // [count]
  int64_t count;
  int kv_heads, page_size, head_dim;  // head_dim: a multiple of 16
  void *low, *high;      // [pages, kv_heads, head_dim]
  int64_t bounds_stride; // of both, from page to page
};

// Bounds the products of queries with the keys of pages, summed over the heads of a KV head.
struct BoundsArgs {
  Team team;
  Type type;      // of q, low and high
  const void* q;  // [rows, heads, head_dim]
  int64_t q_stride;
  const void *low, *high;  // see SummariseArgs
  int64_t bounds_stride;
  const int64_t* pages;    // [rows, width]
  int64_t row_stride;      // of pages
  int64_t rows, width;
  int64_t first;         // pages before it get -inf, and so do
  const int64_t* ends;   // [rows]: those from here on
  int heads, kv_heads, head_dim;  // head_dim: a multiple of 16
  float* scores;         // [rows, kv_heads, width]
  void* scratch;         // bounds_scratch bytes, 64-byte aligned
};

struct Kernels {
  bool (*permitted)();  // asks the system, once per process, for what this instruction set needs
  size_t (*linear_scratch)(const LinearArgs&);
  void (*linear)(const LinearArgs&);
  size_t (*linear_int4_scratch)(const Int4Args&);
  void (*linear_int4)(const Int4Args&);
  size_t (*coded_scratch)(const CodedArgs&);
  void (*coded)(const CodedArgs&);
  size_t (*attention_scratch)(const AttentionArgs&);
  void (*attention)(const AttentionArgs&);
  void (*norm)(const NormArgs&);
  void (*rotary)(const RotaryArgs&);
  size_t (*sample_scratch)(const SampleArgs&);
  void (*sample)(const SampleArgs&);
  size_t (*best_scratch)(const BestArgs&);
  void (*best)(const BestArgs&);
  void (*summarise)(const SummariseArgs&);
  size_t (*bounds_scratch)(const BoundsArgs&);
  void (*bounds)(const BoundsArgs&);
};

}  // namespace magicdec

// The symbol that a library of kernels exports.
extern "C" const magicdec::Kernels* magicdec_kernels();
