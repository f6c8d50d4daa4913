// Matrix products with weights of 4 bits. Inputs are rounded to bytes, in the groups of features that weights have:
//
//     y[n] = sum over groups of  input's scale * scale[n] * (sum of bytes * codes[n] - zero[n] * sum of bytes)
//
// Both inner sums are exact integers. Groups are added in ascending order with fused multiply-adds, whatever the tile, so a
// row's result does not depend on other rows.
#pragma once

#include <algorithm>

#include "int4_rows.h"
#include "int4_tiles.h"

namespace magicdec {

// Rows of a tile, and how many vectors of columns it has at a time, so that their sums stay in registers.
#if defined(__AVX512F__)
constexpr int INT4_ROWS = 12, INT4_VECTORS = 2;
#elif defined(MAGICDEC_AVX2) || defined(__aarch64__)
constexpr int INT4_ROWS = 4, INT4_VECTORS = 1;
#else
constexpr int INT4_ROWS = 1, INT4_VECTORS = 1;
#endif

constexpr int CODES_AHEAD = 2048;  // words: how far ahead codes are prefetched

// Products of codes, bytes from 0 to 15, and signed bytes. MAX_WORDS: number of words whose products `add` can sum before
// `widen` makes 32-bit sums of them; 0: they are such sums.
struct DotI4 {
#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
  static constexpr int MAX_WORDS = 8;  // 8 * 2 * 15 * 127 < 2^15
  static MAGICDEC_INLINE i32x16 add(i32x16 sums, u32x16 codes, uint32_t x) {
    return (i32x16)_mm512_add_epi16((__m512i)sums, _mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(x)));
  }
  static MAGICDEC_INLINE i32x16 widen(i32x16 sums) { return (i32x16)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1)); }
#elif defined(MAGICDEC_AVX2) && !defined(__AVXVNNI__)
  static constexpr int MAX_WORDS = 8;
  static MAGICDEC_INLINE i32x16 add(i32x16 sums, u32x16 codes, uint32_t x) {
    const __m256i left = _mm256_set1_epi32(x);
    return i32x16::of([&](int i) __attribute__((always_inline)) {
      return (i32x16::Part)_mm256_add_epi16((__m256i)sums.part[i], _mm256_maddubs_epi16((__m256i)codes.part[i], left));
    });
  }
  static MAGICDEC_INLINE i32x16 widen(i32x16 sums) {
    return i32x16::of([&](int i) __attribute__((always_inline)) {
      return (i32x16::Part)_mm256_madd_epi16((__m256i)sums.part[i], _mm256_set1_epi16(1));
    });
  }
#else
  static constexpr int MAX_WORDS = 0;
  static MAGICDEC_INLINE i32x16 add(i32x16 sums, u32x16 codes, uint32_t x) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(MAGICDEC_AVX2)
    return avx2::I8::add(sums, codes, splat_bits(x));
#elif defined(__aarch64__)
    return neon::dot_i8(sums, x, codes);
#else
    for (int byte = 0; byte < 4; byte++)
      sums += bits<i32x16>(codes >> (8 * byte) & 0xff) * int32_t(int8_t(x >> (8 * byte)));
    return sums;
#endif
  }
  static MAGICDEC_INLINE i32x16 widen(i32x16 sums) { return sums; }
#endif
};

// Adds the dot products of M rows and C vectors of columns over some words. Words of codes have a code of an input's word in
// the low half of each byte, and one of the next word's in the high half.
template <int M, int C>
MAGICDEC_INLINE void dot_words(i32x16 (&sums)[M * C], const uint32_t* x, size_t stride, const uint32_t* codes, int first, int end) {
  for (int w = first; w < end; w++) {
    unrolled<2>([&](auto half) __attribute__((always_inline)) {  // one after the other: registers are few
      u32x16 right[C];
      unrolled<C>([&](auto c) __attribute__((always_inline)) {
        const uint32_t* from = codes + w * BLOCK + c.value * LANES;
        if constexpr (half.value == 0) __builtin_prefetch(from + CODES_AHEAD, 0, 3);
        right[c.value] = load<u32x16>(from) >> 4 * half.value & 0x0f0f0f0f;
      });
      unrolled<M>([&](auto m) __attribute__((always_inline)) {
        const uint32_t left = x[m.value * stride + 2 * w + half.value];
        unrolled<C>([&](auto c) __attribute__((always_inline)) {
          sums[m.value * C + c.value] = DotI4::add(sums[m.value * C + c.value], right[c.value], left);
        });
      });
    });
  }
}

// Computes the dot products of one group, of `words` words of codes.
template <int M, int C>
MAGICDEC_INLINE void dot_group(i32x16 (&dots)[M * C], const uint32_t* x, size_t stride, const uint32_t* codes, int words) {
  unrolled<M * C>([&](auto i) __attribute__((always_inline)) { dots[i.value] = i32x16{}; });
  if constexpr (DotI4::MAX_WORDS == 0) {
    dot_words<M, C>(dots, x, stride, codes, 0, words);
  } else {
    constexpr int MAX_WORDS = DotI4::MAX_WORDS / 2;  // of codes
    for (int w = 0; w < words; w += MAX_WORDS) {
      i32x16 sums[M * C];
      unrolled<M * C>([&](auto i) __attribute__((always_inline)) { sums[i.value] = i32x16{}; });
      dot_words<M, C>(sums, x, stride, codes, w, std::min(words, w + MAX_WORDS));
      unrolled<M * C>([&](auto i) __attribute__((always_inline)) { dots[i.value] += DotI4::widen(sums[i.value]); });
    }
  }
}

// Computes the sums of M rows and one block of columns. x: the first row.
template <int M>
__attribute__((noinline)) void int4_tile(const Int4Args& args, const uint32_t* x, size_t stride, int block, f32x16 (*result)[2]) {
  constexpr int C = INT4_VECTORS;
  const int words = args.words / args.groups;
  const uint32_t* codes = args.packed + size_t(block) * args.words * BLOCK;
  f32x16 sums[M * 2];
  unrolled<M * 2>([&](auto i) __attribute__((always_inline)) { sums[i.value] = f32x16{}; });
  for (int g = 0; g < args.groups; g++, codes += words * BLOCK) {
    const uint32_t* about = x + 2 * args.words + 2 * g;
    unrolled<2 / C>([&](auto turn) __attribute__((always_inline)) {
      constexpr int FIRST = decltype(turn)::value * C;
      i32x16 dots[M * C];
      dot_group<M, C>(dots, x + 2 * g * words, stride, codes + FIRST * LANES, words);
      unrolled<C>([&](auto c) __attribute__((always_inline)) {
        const size_t at = (size_t(block) * args.groups + g) * BLOCK + (FIRST + c.value) * LANES;
        add_group<M>(
            args, at, about, stride, [&](auto m) __attribute__((always_inline)) { return dots[m.value * C + c.value]; },
            [&](auto m) __attribute__((always_inline)) -> f32x16& { return sums[m.value * 2 + FIRST + c.value]; });
      });
    });
  }
  unrolled<M * 2>([&](auto i) __attribute__((always_inline)) { result[i.value / 2][i.value % 2] = sums[i.value]; });
}

// Computes rows [row, end) times one block of columns.
template <class Out>
void int4_block(const Int4Args& args, Int4Rows x, int row, int end, int block) {
  const int rows = end - row;
#if defined(MAGICDEC_TILES)
  if (takes_tiles(args)) return int4_tile_block<Out>(args, x, row, end, block);
#endif
  for (int done = 0; done < rows;) {
    const int height = tile_height(rows, done, INT4_ROWS);
    f32x16 sums[INT4_ROWS][2];
    with_rows<INT4_ROWS>(height, [&](auto count) {
      int4_tile<decltype(count)::value>(args, x.data + (row + done) * x.stride, x.stride, block, sums);
    });
    finish_rows<Out>(args, sums, row + done, height, block);
    done += height;
  }
}

// Outputs have the input's type, or float32.
inline void linear_int4(const Int4Args& args) {
  constexpr size_t CACHED = 1 << 19;  // bytes of rows that stay in the L2 cache while all weights are read
  const Int4Rows x = int4_rows_of(args);
  with_type(args.in, [&](auto zero) { quantise_rows<decltype(zero)>(args, x); });
  const int columns = packed_columns(args);
  const int blocks = (columns + BLOCK - 1) / BLOCK;
  const int height = int(std::clamp<size_t>(CACHED / (x.stride * sizeof(uint32_t)), 2 * INT4_ROWS, 96));
  const int64_t chunks = (args.rows + height - 1) / height;
  with_type(args.out, [&](auto zero) {
    for_pieces(args.team, chunks * blocks, [&](int64_t piece, int) {
      const int64_t chunk = piece / blocks;
      int4_block<decltype(zero)>(args, x, int(args.rows * chunk / chunks), int(args.rows * (chunk + 1) / chunks), int(piece % blocks));
    });
  });
}

}  // namespace magicdec
