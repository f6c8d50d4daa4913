// Intrinsics of Arm processors (aarch64). Each has NEON; bf16 and dotprod are extensions.
#pragma once

#include <arm_neon.h>

#include "lanes.h"

namespace magicdec::neon {

MAGICDEC_INLINE float sum(f32x16 x) {
  const float32x4_t s = (x.part[0] + x.part[2]) + (x.part[1] + x.part[3]);
  const float32x2_t t = vget_low_f32(s) + vget_high_f32(s);
  return t[0] + t[1];
}

MAGICDEC_INLINE float largest(f32x16 x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.part[0], x.part[1]), vmaxq_f32(x.part[2], x.part[3])));
}

MAGICDEC_INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) {
  return f32x16::of([&](int i) __attribute__((always_inline)) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}

// Rounds to nearest even.
MAGICDEC_INLINE i32x16 nearest(f32x16 x) {
  return i32x16::of([&](int i) __attribute__((always_inline)) { return vcvtnq_s32_f32(x.part[i]); });
}

MAGICDEC_INLINE f32x16 float_of_half(u16x16 x) {
  return f32x16::of([&](int i) __attribute__((always_inline)) { return vcvt_f32_f16((float16x4_t)x.part[i]); });
}

MAGICDEC_INLINE u16x16 half_of_float(f32x16 x) {
  return u16x16::of([&](int i) __attribute__((always_inline)) { return (uint16x4_t)vcvt_f16_f32(x.part[i]); });
}

// The low bytes of sixteen words.
MAGICDEC_INLINE void store_bytes(uint8_t* to, u32x16 x) {
  const uint8x16_t low = vuzp1q_u8((uint8x16_t)x.part[0], (uint8x16_t)x.part[1]);  // bytes 0 and 2 of each word
  const uint8x16_t high = vuzp1q_u8((uint8x16_t)x.part[2], (uint8x16_t)x.part[3]);
  vst1q_u8(to, vuzp1q_u8(low, high));
}

// Words of a 16-bit element of each array, the first one in the low half.
MAGICDEC_INLINE u32x16 load_pairs(const void* first, const void* second) {
  const auto *a = static_cast<const uint16_t*>(first), *b = static_cast<const uint16_t*>(second);
  const uint16x8_t a0 = vld1q_u16(a), a1 = vld1q_u16(a + 8), b0 = vld1q_u16(b), b1 = vld1q_u16(b + 8);
  return {{(uint32x4_t)vzip1q_u16(a0, b0), (uint32x4_t)vzip2q_u16(a0, b0), (uint32x4_t)vzip1q_u16(a1, b1),
           (uint32x4_t)vzip2q_u16(a1, b1)}};
}

// Transposes 16 × 16 words, in blocks of 4 × 4.
MAGICDEC_INLINE void transpose(u32x16 (&x)[LANES]) {
  u32x16 turned[LANES];
#pragma GCC unroll 4
  for (int row = 0; row < 4; row++) {
#pragma GCC unroll 4
    for (int column = 0; column < 4; column++) {
      const auto from = [&](int i) __attribute__((always_inline)) { return x[row * 4 + i].part[column]; };
      const auto low = (uint64x2_t)vtrn1q_u32(from(0), from(1)), low2 = (uint64x2_t)vtrn1q_u32(from(2), from(3));
      const auto high = (uint64x2_t)vtrn2q_u32(from(0), from(1)), high2 = (uint64x2_t)vtrn2q_u32(from(2), from(3));
      turned[column * 4].part[row] = (uint32x4_t)vtrn1q_u64(low, low2);
      turned[column * 4 + 1].part[row] = (uint32x4_t)vtrn1q_u64(high, high2);
      turned[column * 4 + 2].part[row] = (uint32x4_t)vtrn2q_u64(low, low2);
      turned[column * 4 + 3].part[row] = (uint32x4_t)vtrn2q_u64(high, high2);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) x[i] = turned[i];
}

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

MAGICDEC_INLINE u16x16 bf16_of_float(f32x16 x) {
  return u16x16::of([&](int i) __attribute__((always_inline)) { return (uint16x4_t)vcvt_bf16_f32(x.part[i]); });
}

// BFDOT, and not BFMMLA, which sums four products at a time: it takes two rows, so half of its work would be lost on a
// single row, whose results must be those of a row among others.
MAGICDEC_INLINE f32x16 dot_bf16(f32x16 sums, uint32_t a, u32x16 b) {
  const auto left = (bfloat16x8_t)vdupq_n_u32(a);
  return f32x16::of([&](int i) __attribute__((always_inline)) {
    return vbfdotq_f32(sums.part[i], left, (bfloat16x8_t)b.part[i]);
  });
}

#endif

// Bytes of both sides are signed, and one of them is never -128.
MAGICDEC_INLINE i32x16 dot_i8(i32x16 sums, uint32_t a, u32x16 b) {
  const auto left = (int8x16_t)vdupq_n_u32(a);
  return i32x16::of([&](int i) __attribute__((always_inline)) {
    const auto right = (int8x16_t)b.part[i];
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sums.part[i], right, left);
#else
    // Sums of two products fit 16 bits: 2 * 127 * 128 < 2^15.
    const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(right), vget_low_s8(left)), vmull_high_s8(right, left));
    return vpadalq_s16(sums.part[i], pairs);
#endif
  });
}

}  // namespace magicdec::neon
