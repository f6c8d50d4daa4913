// The inner loop of the matrix products: a few rows times a block of columns, with sums in registers.
//
//     sums[m][n] += sum over w of  a[m][w] · b[w][n]          a, b: words of neighbouring elements (see Dot… in vec.h)
//
// Each sum runs over w in ascending order, whatever its tile, so a row's result does not depend on other rows.
#pragma once

#include "vec.h"

namespace magicdec {

#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;  // per tile with two vectors of columns: 24 of 32 registers hold sums
#elif defined(MAGICDEC_AVX2)
constexpr int MAX_ROWS = 6;  // per tile with one vector of columns: 12 of 16 registers hold sums
#elif defined(__aarch64__)
constexpr int MAX_ROWS = 3;  // a vector takes four of 32 registers
#else
constexpr int MAX_ROWS = 1;  // a vector takes four of 16 registers
#endif

struct Nothing {
  MAGICDEC_INLINE void operator()(int) const {}
};

#if defined(MAGICDEC_AVX2)

template <class Steps, int STEP, int M, int C, bool SPREAD, class Sums>
MAGICDEC_INLINE void step(Sums (&sums)[M][C], const uint32_t* a, size_t a_stride, const uint32_t* b) {
  typename Steps::Factor right[C];
#pragma GCC unroll 2
  for (int c = 0; c < C; c++) right[c] = Steps::template right<STEP>(load<u32x16>(b + c * LANES));
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    typename Steps::Factor left;
    if constexpr (SPREAD)
      left = bits<typename Steps::Factor>(splat_bits(a[m * a_stride + STEP]));
    else
      left = Steps::template left<STEP>(a[m * a_stride]);
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) sums[m][c] = Steps::add(sums[m][c], left, right[c]);
  }
}

template <class Dot, int M, int C, bool SPREAD, class F>
MAGICDEC_INLINE void tile_in_steps(typename Dot::Sums (&sums)[M][C], const uint32_t* a, size_t a_stride, const uint32_t* b,
                                   size_t b_stride, int words, F&& meanwhile) {
  using Steps = typename Dot::Steps;
  if constexpr (M * C > MAX_ROWS) {  // one vector of columns after the other
    for (int c = 0; c < C; c++) {
      typename Dot::Sums column[M][1];
      for (int m = 0; m < M; m++) column[m][0] = sums[m][c];
      const auto once = [&](int w) __attribute__((always_inline)) { if (c == 0) meanwhile(w); };
      tile_in_steps<Dot, M, 1, SPREAD>(column, a, a_stride, b + c * LANES, b_stride, words, once);
      for (int m = 0; m < M; m++) sums[m][c] = column[m][0];
    }
  } else {
    for (int w = 0; w < words; w++, a += SPREAD ? Steps::STEPS : 1, b += b_stride) {
      meanwhile(w);
      step<Steps, 0, M, C, SPREAD>(sums, a, a_stride, b);
      if constexpr (Steps::STEPS == 2) step<Steps, 1, M, C, SPREAD>(sums, a, a_stride, b);
    }
  }
}

#endif

// meanwhile: called with each w, for work that overlaps with the products.
// SPREAD: whether a holds the left factors of the steps (avx2.h), one word each, in place of words of elements.
template <class Dot, int M, int C, bool SPREAD = false, class F = Nothing>
MAGICDEC_INLINE void tile(typename Dot::Sums (&sums)[M][C], const uint32_t* a, size_t a_stride, const uint32_t* b,
                          size_t b_stride, int words, F&& meanwhile = {}) {
#if defined(MAGICDEC_AVX2)
  tile_in_steps<Dot, M, C, SPREAD>(sums, a, a_stride, b, b_stride, words, meanwhile);
#else
  static_assert(!SPREAD);
  for (int w = 0; w < words; w++) {
    meanwhile(w);
    u32x16 right[C];
    for (int c = 0; c < C; c++) right[c] = load<u32x16>(b + w * b_stride + c * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const uint32_t left = a[m * a_stride + w];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sums[m][c] = Dot::add(sums[m][c], left, right[c]);
    }
  }
#endif
}

// Calls f(Count<M>) for M = rows, 1 <= rows <= MAX.
template <int M>
struct Count {
  static constexpr int value = M;
};
template <int MAX, class F>
MAGICDEC_INLINE void with_rows(int rows, F&& f) {
  if constexpr (MAX > 1) {
    if (rows < MAX) return with_rows<MAX - 1>(rows, static_cast<F&&>(f));
  }
  f(Count<MAX>{});
}

// Returns the height of the tile that begins at `row`, if `rows` rows are cut into the fewest tiles of at most `max_height`
// rows and of nearly equal height.
MAGICDEC_INLINE int tile_height(int rows, int row, int max_height) {
  const int tiles = (rows + max_height - 1) / max_height;
  const int height = rows / tiles, taller = rows % tiles;  // the first `taller` tiles have one more
  return row < taller * (height + 1) ? height + 1 : height;
}

}  // namespace magicdec
