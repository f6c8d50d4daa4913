// Attention over one block of keys and values (attention_pages.h): pack it, multiply it with queries, with a softmax between.
// attention_pieces.h divides rows and combines their results.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_pages.h"
#include "dispatch.h"
#include "tile.h"

namespace magicdec {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Running softmax of some queries. o: sum of the values weighted by 2^(score - peak). total: sum of the weights.
struct Running {
  float* peak;   // [rows]
  float* total;  // [rows, LANES]: sixteen partial sums
  float* o;      // [rows, head_dim]

  // Memory that begins at a cache line; so do total and o in it.
  static size_t floats(int rows, int head_dim) { return peaks(rows) + size_t(rows) * (LANES + head_dim); }
  static Running at(float* memory, int rows) {
    float* total = memory + peaks(rows);
    return {memory, total, total + size_t(rows) * LANES};
  }
  void clear(int rows, int head_dim) const {
    std::fill(peak, peak + rows, NOTHING);
    std::fill(total, total + size_t(rows) * LANES, 0.0f);
    std::fill(o, o + size_t(rows) * head_dim, 0.0f);
  }

 private:
  static size_t peaks(int rows) { return size_t(rows + LANES - 1) / LANES * LANES; }
};

MAGICDEC_INLINE float exp2_of(float x) { return exp2_falling(splat(x))[0]; }

inline void merge(Running into, int to, Running from, int row, int head_dim) {
  if (from.peak[row] == NOTHING) return;
  const float peak = std::max(into.peak[to], from.peak[row]);
  const float mine = exp2_of(into.peak[to] - peak), its = exp2_of(from.peak[row] - peak);
  into.peak[to] = peak;
  float *total = into.total + to * LANES, *other_total = from.total + row * LANES;
  store(total, load<f32x16>(total) * mine + load<f32x16>(other_total) * its);
  float* o = into.o + size_t(to) * head_dim;
  const float* other = from.o + size_t(row) * head_dim;
  for (int d = 0; d < head_dim; d += LANES) store(o + d, load<f32x16>(o + d) * mine + load<f32x16>(other + d) * its);
}

// Transposes words w … w + 15 of sixteen keys, from [slot][word] to [word][slot].
template <class T>
MAGICDEC_INLINE void turn_keys(const T* keys, int head_dim, int w, int count, u32x16 (&x)[LANES]) {
  constexpr int ELEMENTS = DotOf<T>::type::ELEMENTS;
  for (int i = 0; i < LANES; i++) {
    const T* from = keys + i * head_dim + w * ELEMENTS;
    if (count == LANES) {
      x[i] = load<u32x16>(from);
    } else {
      uint32_t padded[LANES] = {};
      std::memcpy(padded, from, count * sizeof(uint32_t));
      x[i] = load<u32x16>(padded);
    }
  }
  transpose(x);
}

// Packs a block's keys to [head_dim / ELEMENTS words][SLOTS]. meanwhile: called before each group.
template <class T, class F>
MAGICDEC_INLINE void pack_keys(const Block<T>& block, int head_dim, uint32_t* packed, F&& meanwhile) {
  const int words = head_dim / DotOf<T>::type::ELEMENTS;
  for (int group = 0; group < block.GROUPS; group++) {
    meanwhile();
    for (int w = 0; w < words; w += LANES) {
      const int n = std::min(LANES, words - w);
      u32x16 x[LANES];
      turn_keys(block.keys(group), head_dim, w, n, x);
      for (int i = 0; i < n; i++) store(packed + (w + i) * SLOTS + group * LANES, x[i]);
    }
  }
}

// Loads the values of two slots in 16 columns, paired in words; for float32 those of one slot.
template <class T>
MAGICDEC_INLINE u32x16 pair_values(const T* values, int head_dim) {
  if constexpr (sizeof(T) == 4) return load<u32x16>(values);
#if defined(__aarch64__)
  return neon::load_pairs(values, values + head_dim);
#elif defined(MAGICDEC_AVX2)
  return avx2::load_pairs(values, values + head_dim);
#else
  return widen(load<u16x16>(values)) | (widen(load<u16x16>(values + head_dim)) << 16);
#endif
}

// The same for 32 columns.
template <class T>
MAGICDEC_INLINE void pair_values(const T* values, int head_dim, u32x16& first, u32x16& second) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) {
    alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    alignas(64) static constexpr uint16_t HIGH[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i a = _mm512_loadu_si512(values), b = _mm512_loadu_si512(values + head_dim);
    first = (u32x16)_mm512_permutex2var_epi16(a, _mm512_load_si512(LOW), b);
    second = (u32x16)_mm512_permutex2var_epi16(a, _mm512_load_si512(HIGH), b);
    return;
  }
#endif
  first = pair_values(values, head_dim), second = pair_values(values + LANES, head_dim);
}

constexpr int PACK_POINTS = LANES;  // times that pack_values calls `meanwhile`

// Packs a block's values to [SLOTS / ELEMENTS words][head_dim].
template <class T, class F>
MAGICDEC_INLINE void pack_values(const Block<T>& block, int head_dim, uint32_t* packed, F&& meanwhile) {
  constexpr int ELEMENTS = DotOf<T>::type::ELEMENTS;
  for (int group = 0; group < block.GROUPS; group++) {
    const T* values = block.values(group);
    for (int slot = 0; slot < LANES; slot += ELEMENTS, values += ELEMENTS * head_dim, packed += head_dim) {
      if (slot % 4 == 0) meanwhile();
      int d = 0;
      for (; d + 2 * LANES <= head_dim; d += 2 * LANES) {
        u32x16 first, second;
        pair_values(values + d, head_dim, first, second);
        store(packed + d, first);
        store(packed + d + LANES, second);
      }
      if (d < head_dim) store(packed + d, pair_values(values + d, head_dim));
    }
  }
}

// -- products of a block and queries ----------------------------------------------------------------------------------

// For few rows of queries: each word of a key is used in the register in which it was transposed.
template <class T, int M>
MAGICDEC_INLINE void score_few(const Block<T>& block, const Block<T>& next, int head_dim, const uint32_t* q, float* scores) {
  using Dot = typename DotOf<T>::type;
  const int words = head_dim / Dot::ELEMENTS, chunks = (words + LANES - 1) / LANES;
  for (int group = 0; group < block.GROUPS; group++) {
    f32x16 sums[M] = {};
    for (int w = 0; w < words; w += LANES) {
      const int n = std::min(LANES, words - w);
      u32x16 x[LANES];
      next.fetch(group, w / LANES * LANES / chunks, LANES / chunks, head_dim);
      turn_keys(block.keys(group), head_dim, w, n, x);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        if (i >= n) break;
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) sums[m] = Dot::add(sums[m], q[m * words + w + i], x[i]);
      }
    }
    for (int m = 0; m < M; m++) store(scores + m * SLOTS + group * LANES, sums[m]);
  }
}

// For few rows of weights [M][SLOTS]: o[M][head_dim] += weights · values.
template <class T, int M>
MAGICDEC_INLINE void mix_few(const Block<T>& block, const Block<T>& next, int head_dim, const T* weights, float* o) {
  using Dot = typename DotOf<T>::type;
#if defined(MAGICDEC_AVX2)
  constexpr int C = M == 1 ? 4 : M <= 3 ? 2 : 1;  // at most 12 of 16 registers hold sums
#else
  constexpr int C = M <= 6 ? 4 : 2;  // 24 of 32 registers hold sums
#endif
  const auto* words = reinterpret_cast<const uint32_t*>(weights);
  const auto columns = [&](int d, auto width) {
    constexpr int N = decltype(width)::value;
    f32x16 sums[M][N];
    for (int m = 0; m < M; m++)
      for (int c = 0; c < N; c++) sums[m][c] = load<f32x16>(o + m * head_dim + d + c * LANES);
    for (int slot = 0; slot < SLOTS; slot += Dot::ELEMENTS) {
      const T* values = block.values(slot / LANES) + (slot % LANES) * head_dim + d;
      if (d == 0) next.fetch(block.GROUPS + slot / LANES, slot % LANES, Dot::ELEMENTS, head_dim);
      u32x16 right[N];
      if constexpr (N == 1)
        right[0] = pair_values(values, head_dim);
      else
        for (int c = 0; c < N; c += 2) pair_values(values + c * LANES, head_dim, right[c], right[c + 1]);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const uint32_t left = words[(m * SLOTS + slot) / Dot::ELEMENTS];
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sums[m][c] = Dot::add(sums[m][c], left, right[c]);
      }
    }
    for (int m = 0; m < M; m++)
      for (int c = 0; c < N; c++) store(o + m * head_dim + d + c * LANES, sums[m][c]);
  };
  int d = 0;
  for (; d + C * LANES <= head_dim; d += C * LANES) columns(d, Count<C>{});
  for (; d < head_dim; d += LANES) columns(d, Count<1>{});
}

// Rows of queries that a packed block is multiplied with at a time.
#if defined(__AVX512F__)
constexpr int TILE_HEIGHT = 6;  // with four vectors of columns: 24 of 32 registers hold sums
#else
constexpr int TILE_HEIGHT = MAX_ROWS;
#endif

// out[M][columns] = (KEEP ? out : 0) + a · b. columns: a multiple of 16, and b's stride; out_stride: out's.
template <class Dot, int M, bool KEEP>
MAGICDEC_INLINE void product(const uint32_t* a, size_t a_stride, const uint32_t* b, int words, float* out, size_t out_stride, int columns) {
  const auto columns_of = [&](auto width, int column) __attribute__((always_inline)) {
    constexpr int C = decltype(width)::value;
    typename Dot::Sums sums[M][C];
    float* o = out + column;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sums[m][c] = KEEP ? load<f32x16>(o + m * out_stride + c * LANES) : f32x16{};
    tile<Dot, M, C>(sums, a, a_stride, b + column, columns, words);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) store(o + m * out_stride + c * LANES, sums[m][c]);
  };
  int column = 0;
#if defined(__AVX512F__)
  for (; column + 4 * LANES <= columns; column += 4 * LANES) columns_of(Count<4>{}, column);
#endif
  for (; column + 2 * LANES <= columns; column += 2 * LANES) columns_of(Count<2>{}, column);
  if (column < columns) columns_of(Count<1>{}, column);
}

// -- weights ----------------------------------------------------------------------------------------------------------

// A peak is raised when it is exceeded by more than this, which is seldom: weights are at most 2^HEADROOM.
constexpr float HEADROOM = 8;

#if defined(__AVX512F__)

// 2^(x - floor(x)) within 2^-18 of it, for weights that are rounded to 16 bits: the polynomial of degree 4 with the least
// relative error in [0, 1].
MAGICDEC_INLINE __m512 exp2_of_fraction(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  __m512 y = _mm512_fmadd_ps(rest, _mm512_set1_ps(0.0135341679f), _mm512_set1_ps(0.0520114606f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.241442757f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.693003834f));
  return _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.00000259f));
}

#endif

// 2^x as precise as weights of type T are.
template <class T>
MAGICDEC_INLINE f32x16 exp2_of_score(f32x16 x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) return (f32x16)_mm512_scalef_ps(exp2_of_fraction((__m512)x), (__m512)x);
#endif
  return exp2_falling(x);
}

// Stores the weights of a block's slots, and returns total plus their sum, as rounded.
template <class T>
MAGICDEC_INLINE f32x16 store_weights(const f32x16 (&x)[SLOTS / LANES], T* weights, f32x16 total) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    const auto ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (int i = 0; i < SLOTS / LANES; i += 2) {
      const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)x[i + 1], (__m512)x[i]);
      store(weights + i * LANES, pair);
      total = (f32x16)_mm512_dpbf16_ps((__m512)total, pair, ones);
    }
    return total;
  }
#endif
  for (int i = 0; i < SLOTS / LANES; i++) {
    store_floats(weights + i * LANES, x[i]);
    total += load_floats(weights + i * LANES);
  }
  return total;
}

// Converts the scores of one query against a block to weights, and updates its running softmax. The query sees the block's
// slots [hidden, seen), at least one.
template <class T>
MAGICDEC_INLINE void weigh(const float* scores, int hidden, int seen, float scale, Running state, int row, int head_dim, T* weights) {
  f32x16 s[SLOTS / LANES], highest = splat(NOTHING);
  for (int i = 0; i < SLOTS / LANES; i++) {
    s[i] = load<f32x16>(scores + i * LANES) * scale;
    if (seen < (i + 1) * LANES) s[i] = select(lane_numbers() < seen - i * LANES, s[i], splat(NOTHING));
    if (hidden > i * LANES) s[i] = select(lane_numbers() < hidden - i * LANES, splat(NOTHING), s[i]);
    highest = maximum(highest, s[i]);
  }
  float peak = state.peak[row];
  float* totals = state.total + row * LANES;
  if (may_exceed(highest, peak + HEADROOM)) {
    const float before = peak, high = largest(highest);
    if (high > before + HEADROOM) {
      state.peak[row] = peak = high;
      const float shrink = exp2_of(before - peak);
      store(totals, load<f32x16>(totals) * shrink);
      float* o = state.o + size_t(row) * head_dim;
      for (int d = 0; d < head_dim; d += LANES) store(o + d, load<f32x16>(o + d) * shrink);
    }
  }
  const float less = std::max(peak, std::numeric_limits<float>::lowest());
  for (f32x16& each : s) each = exp2_of_score<T>(each - less);
  store(totals, store_weights(s, weights, load<f32x16>(totals)));
}

}  // namespace magicdec
