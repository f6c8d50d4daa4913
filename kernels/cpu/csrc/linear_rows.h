// The rows of a matrix product: their input as words, and what is done with their sums.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "tile.h"

namespace magicdec {

// Rows of `words` words in the layout that tiles read: the caller's memory if it has that layout, else a copy.
struct Rows {
  const uint32_t* data;
  size_t stride;
};

template <class T>
MAGICDEC_INLINE void copy_row(const T* from, uint32_t* to, int features, int words, int elements) {
  std::memcpy(to, from, features * sizeof(T));
  std::memset(reinterpret_cast<T*>(to) + features, 0, (size_t(words) * elements - features) * sizeof(T));
}

// Copies a row as float32, `words` elements with the padding.
template <class T>
MAGICDEC_INLINE void widen_row(const T* from, float* to, int features, int words) {
  int i = 0;
  for (; i + LANES <= features; i += LANES) store(to + i, load_floats(from + i));
  if (i < features) store(to + i, load_some(from + i, features - i)), i += LANES;
  for (; i < words; i += LANES) store(to + i, f32x16{});
}

// Stores the low bytes of the first `n` words, or of all if there are fewer.
MAGICDEC_INLINE void store_bytes(uint8_t* to, u32x16 q, int n) {
  uint8_t bytes[LANES];
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8((__m512i)q));
#elif defined(__aarch64__)
  neon::store_bytes(bytes, q);
#elif defined(MAGICDEC_AVX2)
  avx2::store_bytes(bytes, q);
#else
  for (int lane = 0; lane < LANES; lane++) bytes[lane] = uint8_t(q[lane]);
#endif
  std::memcpy(to, bytes, std::min(LANES, n));
}

// Quantizes a row to bytes, round(x / scale) + DotI8::ZERO, with scale = max |x| / 127. Returns the scale: NaN where an
// element is not finite. SPREAD: each word becomes two, of its even and of its odd bytes.
template <bool SPREAD, class T>
MAGICDEC_INLINE float quantise_row(const T* x, uint32_t* words_to, int features, int words) {
  auto* to = reinterpret_cast<uint8_t*>(words_to + (SPREAD ? words : 0));
  f32x16 peak{}, spoilt{};
  int i = 0;
  for (; i + LANES <= features; i += LANES) {
    const f32x16 v = load_floats(x + i);
    peak = maximum(peak, maximum(v, -v));
    spoilt += v * 0.0f;
  }
  if (i < features) {
    const f32x16 v = load_some(x + i, features - i);
    peak = maximum(peak, maximum(v, -v));
    spoilt += v * 0.0f;
  }
  const float largest_x = largest(peak), spoils = sum(spoilt);
  const float scale = largest_x / 127.0f, inverse = largest_x > 0 ? 127.0f / largest_x : 0.0f;
  for (i = 0; i < words * 4; i += LANES) {
    const int n = std::min(LANES, features - i);
    const f32x16 v = (n == LANES ? load_floats(x + i) : n > 0 ? load_some(x + i, n) : f32x16{}) * inverse;
    // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
    const u32x16 q = bits<u32x16>(v + 12582912.0f) + (DotI8::ZERO - 0x4b400000u);
    store_bytes(to + i, q, words * 4 - i);
  }
  if constexpr (SPREAD) {  // from the second half of the memory to all of it
    for (i = 0; i < words; i++) {
      const uint32_t word = words_to[words + i];
      words_to[2 * i] = word & 0x00ff00ff, words_to[2 * i + 1] = word >> 8 & 0x00ff00ff;
    }
  }
  return spoils != spoils ? spoils : scale;
}

template <class Out>
MAGICDEC_INLINE void store_columns(Out* y, f32x16 v, int n) {
  if (n >= LANES)
    store_floats(y, v);
  else if (n > 0)
    store_some(y, v, n);
}

// Packed columns that a product's result comes from.
inline int packed_columns(const ProductArgs& args) { return args.gate == Gate::none ? args.columns : args.columns * 2; }

// Joins gates and values; see kernels.ops.Gate. All gates are g / (1 + e^-z). For gelu_tanh, (1 + tanh(z / 2)) / 2 = 1 / (1 + e^-z).
MAGICDEC_INLINE f32x16 join(Gate gate, f32x16 g, f32x16 value) {
  constexpr float TWICE_ROOT = 1.59576912f;  // 2 sqrt(2 / pi)
  constexpr float CLAMP = 7.0f, STEEPNESS = 1.702f;
  f32x16 z = g;
  if (gate == Gate::gelu_tanh) {
    z = g * (g * g * 0.044715f + 1.0f) * TWICE_ROOT;
  } else if (gate == Gate::clamped_silu) {  // of two numbers that are not ordered, minimum and maximum return the second: NaN stays
    g = minimum(splat(CLAMP), g);
    z = g * STEEPNESS;
    value = minimum(splat(CLAMP), maximum(splat(-CLAMP), value)) + 1.0f;
  }
  return g / (1.0f + exponential(-z)) * value;
}

template <class Out, int M>
MAGICDEC_INLINE void finish(const ProductArgs& args, f32x16 (&sums)[M][2], int row, int block) {
  for (int m = 0; m < M; m++) {
    f32x16 first = sums[m][0], second = sums[m][1];
    if (args.bias) {
      first += load<f32x16>(args.bias + block * BLOCK);
      second += load<f32x16>(args.bias + block * BLOCK + LANES);
    }
    Out* y = static_cast<Out*>(args.y) + (row + m) * args.y_stride;
    if (args.gate != Gate::none) {
      const int column = block * LANES;
      store_columns(y + column, join(args.gate, first, second), args.columns - column);
    } else {
      const int column = block * BLOCK;
      store_columns(y + column, first, args.columns - column);
      store_columns(y + column + LANES, second, args.columns - column - LANES);
    }
  }
}

// The same for sums of a kind of dot product: those of bytes are scaled first. scales: of the rows.
template <class Dot, class Out, int M>
MAGICDEC_INLINE void finish_sums(const LinearArgs& args, typename Dot::Sums (&sums)[M][2], const float* scales, int row, int block) {
  if constexpr (Dot::ELEMENTS == 4) {
    f32x16 scaled[M][2];
    for (int c = 0; c < 2; c++) {
      const i32x16 offset = DotI8::ZERO ? load<i32x16>(args.offsets + block * BLOCK + c * LANES) : i32x16{};
      const f32x16 column = load<f32x16>(args.scales + block * BLOCK + c * LANES);
      for (int m = 0; m < M; m++) scaled[m][c] = convert<f32x16>(sums[m][c] + offset) * (column * scales[row + m]);
    }
    finish<Out, M>(args, scaled, row, block);
  } else {
    finish<Out, M>(args, sums, row, block);
  }
}

}  // namespace magicdec
