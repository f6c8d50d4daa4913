// The inner loop of the matrix products: a few rows times a block of columns, with sums in registers.
//
//     sums[m][n] += sum over w of  a[m][w] · b[w][n]          a, b: words of neighbouring elements (see Dot… in vec.h)
//
// Each sum runs over w in ascending order, whatever its tile, so a row's result does not depend on other rows.
#pragma once

#include <utility>

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

template <int M>
struct Count {
  static constexpr int value = M;
};

struct Nothing {
  MAGICDEC_INLINE void operator()(int) const {}
};

// Calls f(Count<0>), f(Count<1>) … N times. To elements with constant numbers the compiler gives registers; loops it may unroll
// too late for that.
template <class F, size_t... I>
MAGICDEC_INLINE void unrolled(F&& f, std::index_sequence<I...>) {
  (f(Count<I>{}), ...);
}
template <int N, class F>
MAGICDEC_INLINE void unrolled(F&& f) {
  unrolled(f, std::make_index_sequence<N>{});
}

#if defined(MAGICDEC_AVX2)

constexpr int TURN = 32;  // words

// Columns first … first + C - 1 of a tile.
template <class Dot, int M, int C, bool SPREAD, int ALL, class F>
MAGICDEC_INLINE void tile_columns(typename Dot::Sums (&all)[M][ALL], int first, const uint32_t* a, size_t a_stride, const uint32_t* b,
                                  size_t b_stride, int words, F&& meanwhile) {
  using Steps = typename Dot::Steps;
  using Factor = typename Steps::Factor;
  typename Dot::Sums sums[M * C];
  unrolled<M * C>([&](auto i) __attribute__((always_inline)) { sums[i.value] = all[i.value / C][first + i.value % C]; });
  b += first * LANES;
  for (int w = 0; w < words; w++, a += SPREAD ? Steps::STEPS : 1, b += b_stride) {
    meanwhile(w);
    unrolled<Steps::STEPS>([&](auto step) __attribute__((always_inline)) {
      constexpr int STEP = decltype(step)::value;
      Factor right[C];
      unrolled<C>([&](auto c) __attribute__((always_inline)) {
        right[c.value] = Steps::template right<STEP>(load<u32x16>(b + c.value * LANES));
      });
      unrolled<M>([&](auto m) __attribute__((always_inline)) {
        Factor left;
        if constexpr (SPREAD)
          left = bits<Factor>(splat_bits(a[m.value * a_stride + STEP]));
        else
          left = Steps::template left<STEP>(a[m.value * a_stride]);
        unrolled<C>([&](auto c) __attribute__((always_inline)) {
          sums[m.value * C + c.value] = Steps::add(sums[m.value * C + c.value], left, right[c.value]);
        });
      });
    });
  }
  unrolled<M * C>([&](auto i) __attribute__((always_inline)) { all[i.value / C][first + i.value % C] = sums[i.value]; });
}

// Sums of more than two rows need all registers for one vector of columns, so the vectors take turns.
template <class Dot, int M, int C, bool SPREAD, class F>
MAGICDEC_INLINE void tile_in_steps(typename Dot::Sums (&sums)[M][C], const uint32_t* a, size_t a_stride, const uint32_t* b,
                                   size_t b_stride, int words, F&& meanwhile) {
  if constexpr (M * C <= 4)
    return tile_columns<Dot, M, C, SPREAD>(sums, 0, a, a_stride, b, b_stride, words, meanwhile);
  for (int w = 0; w < words; w += TURN) {
    const int n = words - w < TURN ? words - w : TURN;
    for (int c = 0; c < C; c++)
      tile_columns<Dot, M, 1, SPREAD>(sums, c, a + w * (SPREAD ? Dot::Steps::STEPS : 1), a_stride, b + w * b_stride, b_stride, n,
                                      [&](int i) __attribute__((always_inline)) {
                                        if (c == 0) meanwhile(w + i);
                                      });
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
