// Decoding of sealed pages: keys and values of few bits (kernels/kv/grouped_codes.py).
//
// A record holds SEALED_SLOTS slots of one KV head: codes, then float16 scales, then float16 minima. Keys have those of each
// channel, values of each slot.
//   int8    codes [slots][head_dim]
//   int4x2  upper codes [slots / 2][head_dim], two slots per byte, the earlier one in the low half; then lower ones, plus 8
// A number is minimum + scale * steps, with as many steps as the code says; sixteenths of them with lower codes. A product
// takes at most 19 bits, so it is exact, and a fused multiply-add rounds as a sum of it does.
#pragma once

#include "dispatch.h"
#include "tile.h"
#include "transpose.h"

namespace magicdec {

inline size_t key_record_bytes(int head_dim) { return size_t(SEALED_SLOTS) * head_dim + size_t(head_dim) * 2 * sizeof(f16); }
inline size_t value_record_bytes(int head_dim) { return size_t(SEALED_SLOTS) * head_dim + size_t(SEALED_SLOTS) * 2 * sizeof(f16); }

typedef uint8_t u8x16 __attribute__((vector_size(16)));

MAGICDEC_INLINE u8x16 load_codes(const uint8_t* from) {
  u8x16 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

MAGICDEC_INLINE f32x16 floats_of(u8x16 x) {
#if defined(__AVX512F__)
  return convert<f32x16>((i32x16)_mm512_cvtepu8_epi32((__m128i)x));
#elif defined(MAGICDEC_AVX2)
  const auto all = (__m128i)x;
  return {{_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(all)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)))}};
#else
  uint8_t bytes[LANES];
  std::memcpy(bytes, &x, sizeof bytes);
  return convert<f32x16>(load_bytes(bytes));
#endif
}

// Stores numbers, none of which is NaN.
MAGICDEC_INLINE void store_numbers(float* to, f32x16 x) { store_floats(to, x); }
MAGICDEC_INLINE void store_numbers(f16* to, f32x16 x) { store_floats(to, x); }
MAGICDEC_INLINE void store_numbers(bf16* to, f32x16 x) {
#if defined(MAGICDEC_AVX2)
  const u32x16 word = bits<u32x16>(x);
  store(to, avx2::narrow((word + (((word >> 16) & 1) + 0x7fff)) >> 16));
#else
  store_floats(to, x);
#endif
}

// Two slots of sixteen channels, in steps from the minimum.
template <Sealed KIND>
struct SealedSteps {
  static constexpr float SCALE = KIND == Sealed::int4x2 ? 1.0f / 16 : 1.0f;  // of the steps that are returned

  // codes: of the earlier slot and of the first channel.
  static MAGICDEC_INLINE void load(const uint8_t* codes, int head_dim, f32x16& first, f32x16& second) {
    if constexpr (KIND == Sealed::int8) {
      first = floats_of(load_codes(codes)), second = floats_of(load_codes(codes + head_dim));
    } else {
      const u8x16 upper = load_codes(codes);
      if constexpr (KIND == Sealed::int4x2_drafts) {
        first = floats_of(upper & 15), second = floats_of(upper >> 4);
      } else {
        const u8x16 lower = load_codes(codes + SEALED_SLOTS / 2 * head_dim);
        first = floats_of((upper << 4) | (lower & 15)) - 8.0f;
        second = floats_of((upper & 0xf0) | (lower >> 4)) - 8.0f;
      }
    }
  }
  // Bytes of the codes of two slots.
  static MAGICDEC_INLINE int pair_bytes(int head_dim) { return KIND == Sealed::int8 ? 2 * head_dim : head_dim; }
};

template <class T, Sealed KIND>
__attribute__((noinline)) void decode_keys(const uint8_t* record, int head_dim, T* to) {
  using Steps = SealedSteps<KIND>;
  const auto* scales = reinterpret_cast<const f16*>(record + SEALED_SLOTS * head_dim);
  const int stride = Steps::pair_bytes(head_dim);
  for (int d = 0; d < head_dim; d += LANES) {
    const f32x16 scale = load_floats(scales + d) * Steps::SCALE, minimum = load_floats(scales + head_dim + d);
    const uint8_t* codes = record + d;
    T* out = to + d;
#pragma GCC unroll 2
    for (int slot = 0; slot < SEALED_SLOTS; slot += 2, codes += stride, out += 2 * head_dim) {
      f32x16 first, second;
      Steps::load(codes, head_dim, first, second);
      store_numbers(out, first * scale + minimum);
      store_numbers(out + head_dim, second * scale + minimum);
    }
  }
}

template <class T, Sealed KIND>
__attribute__((noinline)) void decode_values(const uint8_t* record, int head_dim, T* to) {
  using Steps = SealedSteps<KIND>;
  const auto* halves = reinterpret_cast<const f16*>(record + SEALED_SLOTS * head_dim);
  alignas(64) float scales[SEALED_SLOTS], minima[SEALED_SLOTS];
  for (int slot = 0; slot < SEALED_SLOTS; slot += LANES) {
    store(scales + slot, load_floats(halves + slot) * Steps::SCALE);
    store(minima + slot, load_floats(halves + SEALED_SLOTS + slot));
  }
  const int stride = Steps::pair_bytes(head_dim);
  for (int slot = 0; slot < SEALED_SLOTS; slot += 2, record += stride, to += 2 * head_dim) {
    const f32x16 scale = splat(scales[slot]), minimum = splat(minima[slot]);
    const f32x16 next_scale = splat(scales[slot + 1]), next_minimum = splat(minima[slot + 1]);
    for (int d = 0; d < head_dim; d += LANES) {
      f32x16 first, second;
      Steps::load(record + d, head_dim, first, second);
      store_numbers(to + d, first * scale + minimum);
      store_numbers(to + head_dim + d, second * next_scale + next_minimum);
    }
  }
}

// Calls f with the kind as a compile-time constant.
template <class F>
MAGICDEC_INLINE void with_kind(Sealed kind, F&& f) {
  switch (kind) {
    case Sealed::int8:
      return f(std::integral_constant<Sealed, Sealed::int8>{});
    case Sealed::int4x2:
      return f(std::integral_constant<Sealed, Sealed::int4x2>{});
    case Sealed::int4x2_drafts:
      return f(std::integral_constant<Sealed, Sealed::int4x2_drafts>{});
  }
}

// Decodes the keys and the values of a page and KV head to [2][SEALED_SLOTS][head_dim].
template <class T>
void decode_page(Sealed kind, const uint8_t* keys, const uint8_t* values, int head_dim, T* to) {
  with_kind(kind, [&](auto each) {
    decode_keys<T, each.value>(keys, head_dim, to);
    decode_values<T, each.value>(values, head_dim, to + size_t(SEALED_SLOTS) * head_dim);
  });
}

// -- products with codes ----------------------------------------------------------------------------------------------
//
// Products with decoded numbers are those with the steps alone, if the other factors are multiplied by the scales, plus what
// these factors have of the minima:  sum q (minimum + scale * steps) = sum q * minimum + sum (q * scale) * steps.

// Whether blocks are multiplied so, as floats; else they are decoded to T, for which there are faster products.
template <class T>
constexpr bool multiplies_codes() {
#if defined(__AVX512BF16__)
  return !std::is_same_v<T, bf16>;
#elif defined(__AVX512F__) || defined(MAGICDEC_AVX2)
  return true;
#else
  return false;
#endif
}

// Loads scales, of steps as SealedSteps::load returns them, and minima of `count` groups, a multiple of 16.
MAGICDEC_INLINE void load_parameters(Sealed kind, const uint8_t* from, int count, float* scales, float* minima) {
  const auto* halves = reinterpret_cast<const f16*>(from);
  const float unit = kind == Sealed::int4x2 ? SealedSteps<Sealed::int4x2>::SCALE : 1.0f;
  for (int i = 0; i < count; i += LANES) {
    store(scales + i, load_floats(halves + i) * unit);
    store(minima + i, load_floats(halves + count + i));
  }
}

// Writes `count` factors times scales, and returns the sum of factors times minima.
MAGICDEC_INLINE float scale_factors(const float* factors, const float* scales, const float* minima, int count, float* scaled) {
  f32x16 sums{};
  for (int i = 0; i < count; i += LANES) {
    const f32x16 x = load<f32x16>(factors + i);
    store(scaled + i, x * load<f32x16>(scales + i));
    sums += x * load<f32x16>(minima + i);
  }
  return sum(sums);
}

// Loads codes of 64 channels of two slots, four of them per word.
template <Sealed KIND>
MAGICDEC_INLINE void load_code_words(const uint8_t* codes, int head_dim, u32x16& first, u32x16& second) {
  if constexpr (KIND == Sealed::int8) {
    first = load<u32x16>(codes), second = load<u32x16>(codes + head_dim);
  } else {
    const u32x16 upper = load<u32x16>(codes);
    if constexpr (KIND == Sealed::int4x2_drafts) {
      first = upper & 0x0f0f0f0f, second = (upper >> 4) & 0x0f0f0f0f;
    } else {
      const u32x16 lower = load<u32x16>(codes + SEALED_SLOTS / 2 * head_dim);
      first = ((upper & 0x0f0f0f0f) << 4) | (lower & 0x0f0f0f0f);
      second = (upper & 0xf0f0f0f0) | ((lower >> 4) & 0x0f0f0f0f);
    }
  }
}

// Steps from the minimum, of codes below 256.
template <Sealed KIND>
MAGICDEC_INLINE f32x16 steps_of(u32x16 codes) {
  if constexpr (KIND == Sealed::int4x2) return bits<f32x16>(codes | 0x4b000000) - (0x1p23f + 8);  // 2^23 + code, minus that and 8
  return convert<f32x16>(bits<i32x16>(codes));
}

// Writes the steps of keys, [head_dim][SEALED_SLOTS]. meanwhile: called head_dim times.
template <Sealed KIND, class F>
__attribute__((noinline)) void turn_key_codes(const uint8_t* record, int head_dim, float* to, F meanwhile) {
  const int stride = SealedSteps<KIND>::pair_bytes(head_dim);
  for (int d = 0; d < head_dim; d += 4 * LANES, to += 4 * LANES * SEALED_SLOTS) {
    const int words = head_dim - d < 4 * LANES ? (head_dim - d) / 4 : LANES;
    const uint8_t* codes = record + d;
    for (int group = 0; group < SEALED_SLOTS / LANES; group++) {
      u32x16 x[LANES];
      // Where fewer than 64 channels are left, this reads what follows them in the record.
#pragma GCC unroll 8
      for (int i = 0; i < LANES; i += 2, codes += stride) load_code_words<KIND>(codes, head_dim, x[i], x[i + 1]);
      transpose(x);
      for (int w = 0; w < words; w++) {
        meanwhile();
        float* out = to + 4 * w * SEALED_SLOTS + group * LANES;
        unrolled<4>([&](auto i) __attribute__((always_inline)) {
          constexpr int BYTE = decltype(i)::value;
          const u32x16 code = BYTE == 3 ? x[w] >> 24 : BYTE == 0 ? x[w] & 0xff : (x[w] >> 8 * BYTE) & 0xff;
          store(out + BYTE * SEALED_SLOTS, steps_of<KIND>(code));
        });
      }
    }
  }
}

constexpr int VALUE_POINTS = SEALED_SLOTS / 2;  // times that write_value_codes calls `meanwhile`

// Writes the steps of values, [SEALED_SLOTS][head_dim].
template <Sealed KIND, class F>
__attribute__((noinline)) void write_value_codes(const uint8_t* record, int head_dim, float* to, F meanwhile) {
  using Steps = SealedSteps<KIND>;
  const int stride = Steps::pair_bytes(head_dim);
  for (int slot = 0; slot < SEALED_SLOTS; slot += 2, record += stride, to += 2 * head_dim) {
    meanwhile();
    for (int d = 0; d < head_dim; d += LANES) {
      f32x16 first, second;
      Steps::load(record + d, head_dim, first, second);
      store(to + d, first);
      store(to + head_dim + d, second);
    }
  }
}

}  // namespace magicdec
