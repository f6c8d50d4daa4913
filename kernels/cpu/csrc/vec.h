// Arithmetic on vectors of sixteen lanes, written once for all instruction sets. Intrinsics are used where a target
// offers better (dot products of 16-bit pairs, of bytes).
#pragma once

#include <cmath>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__AVX2__) && !defined(__AVX512F__)
#define MAGICDEC_AVX2 1
#include "avx2.h"
#endif
#elif defined(__aarch64__)
#include "neon.h"
#endif

#include "lanes.h"

namespace magicdec {

MAGICDEC_INLINE i32x16 lane_numbers() {
  static constexpr int32_t NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<i32x16>(NUMBERS);
}

MAGICDEC_INLINE f32x16 maximum(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(MAGICDEC_AVX2)
  return avx2::maximum(a, b);
#else
  return select(a > b, a, b);
#endif
}
MAGICDEC_INLINE f32x16 minimum(f32x16 a, f32x16 b) {
#if defined(MAGICDEC_AVX2)
  return avx2::minimum(a, b);
#else
  return select(a < b, a, b);
#endif
}

// Adds lanes i and i + 8, then i and i + 4, and so on.
MAGICDEC_INLINE float sum(f32x16 x) {
#if defined(__AVX512F__)
  x += __builtin_shuffle(x, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  x += __builtin_shuffle(x, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  x += __builtin_shuffle(x, i32x16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
  return x[0] + x[1];
#elif defined(__aarch64__)
  return neon::sum(x);
#elif defined(MAGICDEC_AVX2)
  return avx2::sum(x);
#else
  float lane[LANES];
  store(lane, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
#endif
}

// Whether any lane of x is larger than y; false positives are possible.
MAGICDEC_INLINE bool may_exceed(f32x16 x, float y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(y), _CMP_GT_OQ) != 0;
#elif defined(MAGICDEC_AVX2)
  return avx2::any_exceeds(x, y);
#else
  return true;
#endif
}

MAGICDEC_INLINE float largest(f32x16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__aarch64__)
  return neon::largest(x);
#elif defined(MAGICDEC_AVX2)
  return avx2::largest(x);
#else
  float lane[LANES];
  store(lane, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
#endif
}

#if defined(__AVX512F__)
MAGICDEC_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) { return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

// Denormal numbers count as zeros for the lifetime of this object, on this thread.
struct FlushDenormals {
  const unsigned before = _mm_getcsr();
  FlushDenormals() {
    _mm_setcsr(before | 0x8040);  // FTZ and DAZ
    asm volatile("" ::: "memory");  // operands are loaded after, results stored before the mode changes
  }
  ~FlushDenormals() {
    asm volatile("" ::: "memory");
    _mm_setcsr(before);
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};
#endif

MAGICDEC_INLINE i32x16 load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return (i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(MAGICDEC_AVX2)
  return avx2::load_bytes(from);
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES / PARTS)));
  return i32x16::of([&](int i) __attribute__((always_inline)) {
    Bytes bytes;
    std::memcpy(&bytes, from + i * sizeof bytes, sizeof bytes);
    return __builtin_convertvector(bytes, i32x16::Part);
  });
#endif
}

// -- 16-bit floats ----------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t raw;
};
struct f16 {
  uint16_t raw;
};

MAGICDEC_INLINE u32x16 widen(u16x16 x) { return convert<u32x16>(x); }
MAGICDEC_INLINE u16x16 narrow(u32x16 x) { return convert<u16x16>(x); }

MAGICDEC_INLINE f32x16 float_of_half(u16x16 half) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps((__m256i)half);
#elif defined(__aarch64__)
  return neon::float_of_half(half);
#elif defined(MAGICDEC_AVX2)
  return avx2::float_of_half(half);
#else
  const u32x16 x = widen(half);
  // A product rebases the exponent, which also converts denormals correctly.
  const u32x16 magnitude = (x & 0x7fff) << 13;
  const f32x16 scaled = bits<f32x16>(magnitude) * 0x1p112f;
  const i32x16 special = bits<i32x16>(magnitude) >= (0x7c00 << 13);
  const u32x16 value = (bits<u32x16>(special) & (magnitude | 0x7f800000)) | (~bits<u32x16>(special) & bits<u32x16>(scaled));
  return bits<f32x16>(value | ((x & 0x8000) << 16));
#endif
}

MAGICDEC_INLINE u16x16 half_of_float(f32x16 x) {
#if defined(__AVX512F__)
  return (u16x16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return neon::half_of_float(x);
#elif defined(MAGICDEC_AVX2)
  return avx2::half_of_float(x);
#else
  uint16_t out[LANES];
  for (int i = 0; i < LANES; i++) {
    uint32_t word = bits<uint32_t>(x[i]);
    const uint32_t sign = (word >> 16) & 0x8000;
    word &= 0x7fffffff;
    uint32_t half;
    if (word >= 0x47800000)
      half = word > 0x7f800000 ? 0x7e00 : 0x7c00;
    else if (word < 0x38800000)
      // Adding 1/2 leaves the denormal's rounded bits in the low bits of the sum.
      half = bits<uint32_t>(bits<float>(word) + 0.5f) - 0x3f000000;
    else
      half = (word + 0xc8000fff + ((word >> 13) & 1)) >> 13;
    out[i] = uint16_t(sign | half);
  }
  return load<u16x16>(out);
#endif
}

MAGICDEC_INLINE u32x16 bf16_of_float(f32x16 x) {  // in the low halves; rounds to nearest even, keeps NaN
  const u32x16 word = bits<u32x16>(x);
  const u32x16 rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  const u32x16 nan = bits<u32x16>(x != x);
  return (nan & 0x7fc0) | (~nan & rounded);
}

template <class T>
MAGICDEC_INLINE f32x16 load_floats(const T* from);
template <>
MAGICDEC_INLINE f32x16 load_floats(const float* from) {
  return load<f32x16>(from);
}
template <>
MAGICDEC_INLINE f32x16 load_floats(const bf16* from) {
  return bits<f32x16>(widen(load<u16x16>(from)) << 16);
}
template <>
MAGICDEC_INLINE f32x16 load_floats(const f16* from) {
  return float_of_half(load<u16x16>(from));
}

MAGICDEC_INLINE void store_floats(float* to, f32x16 x) { store(to, x); }
MAGICDEC_INLINE void store_floats(bf16* to, f32x16 x) {
#if defined(__AVX512BF16__)
  store(to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  store(to, neon::bf16_of_float(x));
#elif defined(MAGICDEC_AVX2)
  store(to, avx2::narrow(bf16_of_float(x)));
#else
  store(to, narrow(bf16_of_float(x)));
#endif
}
MAGICDEC_INLINE void store_floats(f16* to, f32x16 x) { store(to, half_of_float(x)); }

// The same for `n` < 16 elements.
template <class T>
MAGICDEC_INLINE f32x16 load_some(const T* from, int n) {
  T padded[LANES] = {};
  std::memcpy(padded, from, n * sizeof(T));
  return load_floats(padded);
}
template <class T>
MAGICDEC_INLINE void store_some(T* to, f32x16 x, int n) {
  T padded[LANES];
  store_floats(padded, x);
  std::memcpy(to, padded, n * sizeof(T));
}

// -- exponentials and logarithms --------------------------------------------------------------------------------------

// 2^r for r in [-1/2, 1/2]: its Taylor series up to r^6; the term of r^7 is below 2^-23.
MAGICDEC_INLINE f32x16 exp2_series(f32x16 r) {
  f32x16 y = r * 1.5403530e-4f + 1.3333558e-3f;
  y = y * r + 9.6181291e-3f;
  y = y * r + 5.5504109e-2f;
  y = y * r + 2.4022651e-1f;
  y = y * r + 6.9314718e-1f;
  return y * r + 1.0f;
}

// 2^x for x < 100 (-inf included), within 2 units in the last place; 0 below -126.
MAGICDEC_INLINE f32x16 exp2_falling(f32x16 x) {
#if defined(__AVX512F__)
  x = maximum(x, splat(-1000.0f));
  const f32x16 whole = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (f32x16)_mm512_scalef_ps((__m512)exp2_series(x - whole), (__m512)whole);
#else
  const i32x16 gone = x < splat(-126.0f);
  x = select(gone, splat(-126.0f), x);
#if defined(__aarch64__)
  const i32x16 whole = neon::nearest(x);
#elif defined(MAGICDEC_AVX2)
  const i32x16 whole = avx2::nearest(x);
#else
  const f32x16 half = select(x < f32x16{}, splat(-0.5f), splat(0.5f));
  const i32x16 whole = convert<i32x16>(x + half);  // truncates towards zero: rounds to nearest
#endif
  const f32x16 rest = x - convert<f32x16>(whole);  // in [-1/2, 1/2]
  const f32x16 scaled = bits<f32x16>(bits<i32x16>(exp2_series(rest)) + (whole << 23));
  return select(gone, f32x16{}, scaled);
#endif
}

// e^x for any x, within 2 units in the last place; saturates beyond ±87.
MAGICDEC_INLINE f32x16 exponential(f32x16 x) {
  x = minimum(maximum(x, splat(-87.0f)), splat(87.0f));
  const f32x16 turns = x * 1.44269504f;
  const f32x16 half = select(turns < f32x16{}, splat(-0.5f), splat(0.5f));
  const i32x16 whole = convert<i32x16>(turns + half);
  const f32x16 n = convert<f32x16>(whole);
  const f32x16 rest = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  f32x16 y = rest * 1.9841270e-4f + 1.3888889e-3f;
  y = y * rest + 8.3333333e-3f;
  y = y * rest + 4.1666667e-2f;
  y = y * rest + 1.6666667e-1f;
  y = y * rest + 0.5f;
  y = y * rest * rest + rest + 1.0f;
  return bits<f32x16>(bits<i32x16>(y) + (whole << 23));
}

// ln x for normal x > 0, within 2 units in the last place.
MAGICDEC_INLINE f32x16 logarithm(f32x16 x) {
  const i32x16 word = bits<i32x16>(x);
  const i32x16 exponent = (word - 0x3f3504f3) >> 23;  // so that the mantissa is in [sqrt(1/2), sqrt(2))
  const f32x16 m = bits<f32x16>(word - (exponent << 23)) - 1.0f;
  const f32x16 e = convert<f32x16>(exponent);
  // ln(1 + m) = 2 atanh(m / (2 + m))
  const f32x16 s = m / (m + 2.0f), z = s * s;
  f32x16 tail = z * 0.2222222f + 0.2857143f;
  tail = tail * z + 0.4000000f;
  tail = tail * z + 0.6666667f;
  // 2 s = m - s m, which keeps the leading part exact.
  return e * 0.693359375f + (m - (s * (m - z * tail) - e * -2.12194440e-4f));
}

// -- dot products -----------------------------------------------------------------------------------------------------

// A word holds neighbouring elements along the dimension that is summed over: one float, two 16-bit floats, four bytes.
// `add` adds the products of a word of the left matrix with words of sixteen columns of the right one.

struct DotF32 {
  static constexpr int ELEMENTS = 1;
#if defined(MAGICDEC_AVX2)
  using Steps = avx2::F32;
#endif
  using Sums = f32x16;
  static MAGICDEC_INLINE Sums add(Sums sums, uint32_t a, u32x16 b) {
#if defined(MAGICDEC_AVX2)
    return avx2::add<avx2::F32>(sums, a, b);
#else
    return sums + bits<f32x16>(splat_bits(a)) * bits<f32x16>(b);
#endif
  }
};

struct DotBF16 {
  static constexpr int ELEMENTS = 2;
#if defined(MAGICDEC_AVX2)
  using Steps = avx2::BF16;
#endif
  using Sums = f32x16;
  static MAGICDEC_INLINE Sums add(Sums sums, uint32_t a, u32x16 b) {
#if defined(__AVX512BF16__)
    // In this operand order the instruction can take its last operand from memory.
    return (f32x16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)b, (__m512bh)_mm512_set1_epi32(a));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return neon::dot_bf16(sums, a, b);
#elif defined(MAGICDEC_AVX2)
    return avx2::add<avx2::BF16>(sums, a, b);
#else
    sums = sums + splat(bits<float>(a << 16)) * bits<f32x16>(b << 16);
    return sums + splat(bits<float>(a & 0xffff0000)) * bits<f32x16>(b & 0xffff0000);
#endif
  }
};

struct DotF16 {
  static constexpr int ELEMENTS = 2;
#if defined(MAGICDEC_AVX2)
  using Steps = avx2::F16;
#endif
  using Sums = f32x16;
  static MAGICDEC_INLINE Sums add(Sums sums, uint32_t a, u32x16 b) {
#if defined(MAGICDEC_AVX2)
    return avx2::add<avx2::F16>(sums, a, b);
#else
    const u32x16 pair = splat_bits(a);
    sums = sums + float_of_half(narrow(pair)) * float_of_half(narrow(b));
    return sums + float_of_half(narrow(pair >> 16)) * float_of_half(narrow(b >> 16));
#endif
  }
};

struct DotI8 {  // the right matrix is signed
  static constexpr int ELEMENTS = 4;
  // The byte of the left matrix that stands for zero: Arm multiplies signed bytes with signed ones, x86 unsigned ones.
#if defined(__aarch64__)
  static constexpr int ZERO = 0;
#else
  static constexpr int ZERO = 128;
#endif
#if defined(MAGICDEC_AVX2)
  using Steps = avx2::I8;
#endif
  using Sums = i32x16;
  static MAGICDEC_INLINE Sums add(Sums sums, uint32_t a, u32x16 b) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(a), (__m512i)b);
#elif defined(__aarch64__)
    return neon::dot_i8(sums, a, b);
#elif defined(MAGICDEC_AVX2)
    return avx2::add<avx2::I8>(sums, a, b);
#else
    for (int byte = 0; byte < 4; byte++) {
      const i32x16 signed_byte = bits<i32x16>(b << (24 - 8 * byte)) >> 24;
      sums += signed_byte * int32_t((a >> (8 * byte)) & 0xff);
    }
    return sums;
#endif
  }
};

template <class T>
struct DotOf;
template <>
struct DotOf<float> {
  using type = DotF32;
};
template <>
struct DotOf<bf16> {
  using type = DotBF16;
};
template <>
struct DotOf<f16> {
  using type = DotF16;
};

}  // namespace magicdec
