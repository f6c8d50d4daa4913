// Bounds of the keys of pages, and of the products of queries with them (Quest, arXiv 2406.10774, section 3.3).
#pragma once

#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "team.h"

namespace magicdec {

// The smaller and the larger numbers of two; NaN where either is.
MAGICDEC_INLINE f32x16 lower(f32x16 a, f32x16 b) { return select((b < a) | (b != b), b, a); }
MAGICDEC_INLINE f32x16 upper(f32x16 a, f32x16 b) { return select((b > a) | (b != b), b, a); }

// Stores numbers that the type represents. To round them to bf16 would take denormal ones for zeros on some processors.
MAGICDEC_INLINE void store_exact(float* to, f32x16 x) { store(to, x); }
MAGICDEC_INLINE void store_exact(f16* to, f32x16 x) { store(to, half_of_float(x)); }
MAGICDEC_INLINE void store_exact(bf16* to, f32x16 x) { store(to, narrow(bits<u32x16>(x) >> 16)); }

template <class T>
void summarise(const SummariseArgs& args) {
  const int head_dim = args.head_dim;
  const int64_t size = int64_t(args.page_size) * head_dim;  // of one KV head's keys
  for_rows(args.team, args.count * args.kv_heads, size, [&](int64_t i) {
    const int64_t page = args.pages[i / args.kv_heads], head = i % args.kv_heads;
    const T* keys = static_cast<const T*>(args.k) + page * args.page_stride + head * size;
    const int64_t to = page * args.bounds_stride + head * head_dim;
    for (int d = 0; d < head_dim; d += LANES) {
      f32x16 low = load_floats(keys + d), high = low;
      for (int64_t at = head_dim; at < size; at += head_dim) {
        const f32x16 key = load_floats(keys + at + d);
        low = lower(low, key), high = upper(high, key);
      }
      store_exact(static_cast<T*>(args.low) + to + d, low);
      store_exact(static_cast<T*>(args.high) + to + d, high);
    }
  });
}

// Returns x, or the closest number that is finite; 0 for NaN.
inline float to_finite(float x) {
  constexpr float MOST = std::numeric_limits<float>::max();
  return x != x ? 0.0f : std::min(std::max(x, -MOST), MOST);
}

// Sums the negative and the positive elements of the queries of each KV head. q: [kv_heads][group][head_dim]. negative,
// positive: [kv_heads][head_dim].
template <class T>
void sum_signs(const BoundsArgs& args, const T* q, float* negative, float* positive) {
  const int group = args.heads / args.kv_heads, head_dim = args.head_dim;
  for (int head = 0; head < args.kv_heads; head++, q += size_t(group) * head_dim) {
    for (int d = 0; d < head_dim; d += LANES, negative += LANES, positive += LANES) {
      f32x16 below{}, above{};
      for (int g = 0; g < group; g++) {
        const f32x16 x = load_floats(q + size_t(g) * head_dim + d);
        below += lower(f32x16{}, x), above += upper(f32x16{}, x);
      }
      store(negative, below), store(positive, above);
    }
  }
}

constexpr int FETCH_PAGES = 4;  // how many pages ahead bounds are prefetched: pages may be anywhere in the pool

template <class T>
MAGICDEC_INLINE void fetch(const T* low, const T* high, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(low + i), __builtin_prefetch(high + i);
}

// Number of floats of the sums of a row's queries.
inline int64_t sums_size(const BoundsArgs& args) { return 2 * int64_t(args.kv_heads) * args.head_dim; }

inline size_t bounds_scratch(const BoundsArgs& args) { return args.team.threads * sums_size(args) * sizeof(float); }

template <class T>
void bounds(const BoundsArgs& args) {
  const int head_dim = args.head_dim;
  const int64_t size = int64_t(args.kv_heads) * head_dim, width = args.width;
  const int64_t height = std::max<int64_t>(1, SERIAL / (2 * size)), pieces = (width + height - 1) / height;
  for_pieces(args.team, args.rows * pieces, [&](int64_t piece, int thread) {
    const int64_t row = piece / pieces, start = piece % pieces * height, stop = std::min(width, start + height);
    const int64_t first = std::clamp(args.first, start, stop), end = std::clamp(args.ends[row], first, stop);
    float* scores = args.scores + row * args.kv_heads * width;
    for (int head = 0; head < args.kv_heads; head++) {
      std::fill(scores + head * width + start, scores + head * width + first, -std::numeric_limits<float>::infinity());
      std::fill(scores + head * width + end, scores + head * width + stop, -std::numeric_limits<float>::infinity());
    }
    if (first == end) return;
    float* negative = static_cast<float*>(args.scratch) + thread * sums_size(args);
    float* positive = negative + size;
    sum_signs(args, static_cast<const T*>(args.q) + row * args.q_stride, negative, positive);
    const int64_t* pages = args.pages + row * args.row_stride;
    const auto low_of = [&](int64_t i) { return static_cast<const T*>(args.low) + pages[i] * args.bounds_stride; };
    const auto high_of = [&](int64_t i) { return static_cast<const T*>(args.high) + pages[i] * args.bounds_stride; };
    for (int64_t i = first; i < std::min(end, first + FETCH_PAGES); i++) fetch(low_of(i), high_of(i), size);
    for (int64_t i = first; i < end; i++) {
      if (i + FETCH_PAGES < end) fetch(low_of(i + FETCH_PAGES), high_of(i + FETCH_PAGES), size);
      const T *low = low_of(i), *high = high_of(i);
      for (int head = 0; head < args.kv_heads; head++) {
        f32x16 below{}, above{};
        for (int64_t at = int64_t(head) * head_dim; at < int64_t(head + 1) * head_dim; at += LANES) {
          below += load_floats(low + at) * load<f32x16>(negative + at);
          above += load_floats(high + at) * load<f32x16>(positive + at);
        }
        scores[head * width + i] = to_finite(sum(below + above));
      }
    }
  });
}

}  // namespace magicdec
