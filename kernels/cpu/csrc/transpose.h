// Transposition of words in vectors.
#pragma once

#include "vec.h"

namespace magicdec {

// Transposes 16 × 16 words.
MAGICDEC_INLINE void transpose(u32x16 (&x)[LANES]) {
#if defined(__AVX512F__)
  __m512i a[LANES], b[LANES];
  for (int i = 0; i < LANES; i++) a[i] = (__m512i)x[i];
  for (int i = 0; i < 8; i++) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  // a[4 i + j]: column j of each 128-bit lane, of rows 4 i … 4 i + 3.
  for (int j = 0; j < 4; j++) {
    const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    x[j] = (u32x16)_mm512_shuffle_i32x4(low, low2, 0x88);
    x[8 + j] = (u32x16)_mm512_shuffle_i32x4(low, low2, 0xdd);
    x[4 + j] = (u32x16)_mm512_shuffle_i32x4(high, high2, 0x88);
    x[12 + j] = (u32x16)_mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#elif defined(__aarch64__)
  neon::transpose(x);
#elif defined(MAGICDEC_AVX2)
  avx2::transpose(x);
#else
  uint32_t words[LANES][LANES], turned[LANES][LANES];
  for (int i = 0; i < LANES; i++) store(words[i], x[i]);
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) turned[i][j] = words[j][i];
  for (int i = 0; i < LANES; i++) x[i] = load<u32x16>(turned[i]);
#endif
}

}  // namespace magicdec
