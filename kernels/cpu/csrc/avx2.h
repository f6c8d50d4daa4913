// Intrinsics of x86 processors whose registers hold eight lanes: AVX2, FMA and F16C, with AVX-VNNI where there is.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace magicdec::avx2 {

MAGICDEC_INLINE f32x16 maximum(f32x16 a, f32x16 b) {
  return f32x16::of([&](int i) __attribute__((always_inline)) { return _mm256_max_ps(a.part[i], b.part[i]); });
}
MAGICDEC_INLINE f32x16 minimum(f32x16 a, f32x16 b) {
  return f32x16::of([&](int i) __attribute__((always_inline)) { return _mm256_min_ps(a.part[i], b.part[i]); });
}

// Adds lanes i and i + 8, then i and i + 4, and so on.
MAGICDEC_INLINE float sum(f32x16 x) {
  const __m256 eight = x.part[0] + x.part[1];
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
}

MAGICDEC_INLINE float largest(f32x16 x) {
  const __m256 eight = _mm256_max_ps(x.part[0], x.part[1]);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_max_ss(two, _mm_movehdup_ps(two))[0];
}

MAGICDEC_INLINE bool any_exceeds(f32x16 x, float y) {
  const __m256 limit = _mm256_set1_ps(y);
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.part[0], limit, _CMP_GT_OQ), _mm256_cmp_ps(x.part[1], limit, _CMP_GT_OQ)));
}

// Rounds to nearest even.
MAGICDEC_INLINE i32x16 nearest(f32x16 x) {
  return i32x16::of([&](int i) __attribute__((always_inline)) { return (i32x16::Part)_mm256_cvtps_epi32(x.part[i]); });
}

MAGICDEC_INLINE f32x16 float_of_half(u16x16 x) {
  return f32x16::of([&](int i) __attribute__((always_inline)) { return _mm256_cvtph_ps((__m128i)x.part[i]); });
}

MAGICDEC_INLINE u16x16 half_of_float(f32x16 x) {
  return u16x16::of([&](int i) __attribute__((always_inline)) {
    return (u16x16::Part)_mm256_cvtps_ph(x.part[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  });
}

// Words below 2^16 in 16 bits.
MAGICDEC_INLINE u16x16 narrow(u32x16 x) {
  const __m256i mixed = _mm256_packus_epi32((__m256i)x.part[0], (__m256i)x.part[1]);  // in each half, four words of each part
  const __m256i all = _mm256_permute4x64_epi64(mixed, 0xd8);
  return {{(u16x16::Part)_mm256_castsi256_si128(all), (u16x16::Part)_mm256_extracti128_si256(all, 1)}};
}

// Stores the low bytes of the words.
MAGICDEC_INLINE void store_bytes(uint8_t* to, u32x16 x) {
  x = x & 0xff;
  const __m256i mixed = _mm256_packus_epi32((__m256i)x.part[0], (__m256i)x.part[1]);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(mixed, mixed), _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
}

MAGICDEC_INLINE i32x16 load_bytes(const uint8_t* from) {
  return i32x16::of([&](int i) __attribute__((always_inline)) {
    return (i32x16::Part)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i)));
  });
}

// Words of a 16-bit element of each array, the first one in the low half.
MAGICDEC_INLINE u32x16 load_pairs(const void* first, const void* second) {
  const auto load = [](const void* from) __attribute__((always_inline)) {
    return _mm256_permute4x64_epi64(_mm256_loadu_si256(static_cast<const __m256i*>(from)), 0xd8);
  };
  const __m256i a = load(first), b = load(second);
  return {{(u32x16::Part)_mm256_unpacklo_epi16(a, b), (u32x16::Part)_mm256_unpackhi_epi16(a, b)}};
}

// Transposes 16 × 16 words, in blocks of 8 × 8.
MAGICDEC_INLINE void transpose(u32x16 (&x)[LANES]) {
  u32x16 turned[LANES];
#pragma GCC unroll 2
  for (int row = 0; row < 2; row++) {
#pragma GCC unroll 2
    for (int column = 0; column < 2; column++) {
      __m256i a[8], b[8];
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {
        const auto even = (__m256i)x[row * 8 + i].part[column], odd = (__m256i)x[row * 8 + i + 1].part[column];
        a[i] = _mm256_unpacklo_epi32(even, odd), a[i + 1] = _mm256_unpackhi_epi32(even, odd);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
      }
      // b[i], b[4 + i]: columns i and 4 + i, in the halves, of rows 0 … 3 and 4 … 7.
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        turned[column * 8 + i].part[row] = (u32x16::Part)_mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
        turned[column * 8 + 4 + i].part[row] = (u32x16::Part)_mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) x[i] = turned[i];
}

// -- dot products -----------------------------------------------------------------------------------------------------

// A dot product of words is the sum of one or two steps. In each, a factor of the left word, in all lanes, is multiplied with
// one of the right words. left, right: make them. For a step the compiler needs few registers, so more sums fit.

MAGICDEC_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) {
  return f32x16::of([&](int i) __attribute__((always_inline)) { return _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]); });
}

// The word in all lanes, read from memory by each step. The compiler would read it once and compute the factors of both steps
// outside of vectors, or hold them in registers that sums need.
template <int STEP>
MAGICDEC_INLINE u32x16 spread(const uint32_t& word) {
  u32x16::Part eight;
  asm("vpbroadcastd %1, %0" : "=x"(eight) : "m"(word), "i"(STEP));
  return {{eight, eight}};
}

struct F32 {
  static constexpr int STEPS = 1;
  using Factor = f32x16;
  template <int STEP>
  static MAGICDEC_INLINE Factor left(const uint32_t& a) {
    return bits<f32x16>(splat_bits(a));
  }
  template <int STEP>
  static MAGICDEC_INLINE Factor right(u32x16 b) {
    return bits<f32x16>(b);
  }
  static MAGICDEC_INLINE f32x16 add(f32x16 sums, Factor a, Factor b) { return multiply_add(a, b, sums); }
};

struct BF16 : F32 {
  static constexpr int STEPS = 2;
  template <int STEP>
  static MAGICDEC_INLINE Factor left(const uint32_t& a) {
    return right<STEP>(spread<STEP>(a));
  }
  template <int STEP>
  static MAGICDEC_INLINE Factor right(u32x16 b) {
    return bits<f32x16>(STEP == 0 ? b << 16 : b & 0xffff0000);
  }
};

struct F16 : F32 {
  static constexpr int STEPS = 2;
  template <int STEP>
  static MAGICDEC_INLINE Factor left(const uint32_t& a) {
    const __m256 eight = _mm256_cvtph_ps(_mm_set1_epi16(short(a >> 16 * STEP)));
    return {{eight, eight}};
  }
  template <int STEP>
  static MAGICDEC_INLINE Factor right(u32x16 b) {
    return float_of_half(narrow(STEP == 0 ? b & 0xffff : b >> 16));
  }
};

#if defined(__AVXVNNI__)

struct I8 {  // the left bytes unsigned, the right ones signed
  static constexpr int STEPS = 1;
  using Factor = u32x16;
  template <int STEP>
  static MAGICDEC_INLINE Factor left(const uint32_t& a) {
    return splat_bits(a);
  }
  template <int STEP>
  static MAGICDEC_INLINE Factor right(u32x16 b) {
    return b;
  }
  static MAGICDEC_INLINE i32x16 add(i32x16 sums, Factor a, Factor b) {
    return i32x16::of([&](int i) __attribute__((always_inline)) {
      return (i32x16::Part)_mm256_dpbusd_avx_epi32((__m256i)sums.part[i], (__m256i)a.part[i], (__m256i)b.part[i]);
    });
  }
};

#else

// Bytes are extended to 16 bits: the instruction that multiplies bytes saturates sums of two products.
struct I8 {
  static constexpr int STEPS = 2;
  using Factor = u32x16;
  template <int STEP>
  static MAGICDEC_INLINE Factor left(const uint32_t& a) {
    return spread<STEP>(a) >> 8 * STEP & 0x00ff00ff;
  }
  template <int STEP>
  static MAGICDEC_INLINE Factor right(u32x16 b) {
    return u32x16::of([&](int i) __attribute__((always_inline)) {
      const auto part = (__m256i)b.part[i];
      return (u32x16::Part)_mm256_srai_epi16(STEP == 0 ? _mm256_slli_epi16(part, 8) : part, 8);
    });
  }
  static MAGICDEC_INLINE i32x16 add(i32x16 sums, Factor a, Factor b) {
    return i32x16::of([&](int i) __attribute__((always_inline)) {
      return sums.part[i] + (i32x16::Part)_mm256_madd_epi16((__m256i)a.part[i], (__m256i)b.part[i]);
    });
  }
};

#endif

// Adds the dot products of a word with sixteen words.
template <class Steps, class Sums>
MAGICDEC_INLINE Sums add(Sums sums, uint32_t a, u32x16 b) {
  sums = Steps::add(sums, Steps::template left<0>(a), Steps::template right<0>(b));
  if constexpr (Steps::STEPS == 2) sums = Steps::add(sums, Steps::template left<1>(a), Steps::template right<1>(b));
  return sums;
}

}  // namespace magicdec::avx2
