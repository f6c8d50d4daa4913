// The input of a product with weights of 4 bits, and what a group of features adds to its sums.
#pragma once

#include <algorithm>

#include "linear_rows.h"
#include "team.h"

namespace magicdec {

constexpr int LINE_WORDS = 16;  // of a cache line

// A row of the input: the words of its bytes, then for each group its scale and what there is to add for zeros: an integer,
// or a float for minima.
struct Int4Rows {
  uint32_t* data;
  size_t stride;  // an odd number of lines, so that the rows of a tile are not in the same few sets of a cache
};

inline Int4Rows int4_rows_of(const Int4Args& args) {
  const size_t lines = (size_t(args.words) * 2 + size_t(args.groups) * 2 + LINE_WORDS - 1) / LINE_WORDS;
  return {static_cast<uint32_t*>(args.scratch), (lines | 1) * LINE_WORDS};
}

inline size_t linear_int4_scratch(const Int4Args& args) { return args.rows * int4_rows_of(args).stride * sizeof(uint32_t); }

// Rounds `n` elements of a group of `size` to bytes, round(x / scale) with scale = max |x| / 127; the others are 0. Elements
// that are not finite make the scale NaN.
template <class T>
MAGICDEC_INLINE void quantise_group(const T* x, int n, int size, Zeros zeros, uint8_t* to, uint32_t* about) {
  constexpr float TINY = 0x1p-118f;  // 127 / x is finite from here on
  f32x16 peak{}, spoilt{};
  for (int i = 0; i < n; i += LANES) {
    const f32x16 v = n - i >= LANES ? load_floats(x + i) : load_some(x + i, n - i);
    peak = maximum(peak, maximum(v, -v));
    spoilt += v * 0.0f;
  }
  const float largest_x = largest(peak), spoils = sum(spoilt);
  if (largest_x < TINY || spoils != spoils) {
    std::memset(to, 0, size);
    about[0] = about[1] = spoils != spoils ? bits<uint32_t>(spoils) : 0;
    return;
  }
  const float scale = largest_x / 127.0f, inverse = 127.0f / largest_x;
  i32x16 sums{};
  for (int i = 0; i < size; i += LANES) {
    const f32x16 v = n - i >= LANES ? load_floats(x + i) : n > i ? load_some(x + i, n - i) : f32x16{};
    // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
    const u32x16 q = bits<u32x16>(v * inverse + 12582912.0f) - 0x4b400000u;
    sums += bits<i32x16>(q);
    store_bytes(to + i, q, size - i);
  }
  const float total = sum(convert<f32x16>(sums));  // exact: below 2^24
  about[0] = bits<uint32_t>(scale);
  switch (zeros) {
    case Zeros::eight:
      about[1] = uint32_t(-8 * int32_t(total));
      break;
    case Zeros::points:
      about[1] = uint32_t(-int32_t(total));
      break;
    default:
      about[1] = bits<uint32_t>(scale * total);
  }
}

template <class T>
void quantise_rows(const Int4Args& args, Int4Rows rows) {
  const int size = args.words / args.groups * 8;
  for_rows(args.team, args.rows, args.features, [&](int64_t row) {
    const T* from = static_cast<const T*>(args.x) + row * args.x_stride;
    uint32_t* to = rows.data + row * rows.stride;
    for (int g = 0; g < args.groups; g++)
      quantise_group(from + int64_t(g) * size, std::min(size, args.features - g * size), size, args.zeros,
                     reinterpret_cast<uint8_t*>(to) + int64_t(g) * size, to + 2 * args.words + 2 * g);
  });
}

MAGICDEC_INLINE f32x16 fused(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return multiply_add(a, b, c);
#elif defined(MAGICDEC_AVX2)
  return avx2::multiply_add(a, b, c);
#elif defined(__aarch64__)
  return neon::multiply_add(a, b, c);
#else
  return a * b + c;
#endif
}

MAGICDEC_INLINE f32x16 load_numbers(const void* from, size_t at, bool halves) {
  return halves ? load_floats(static_cast<const f16*>(from) + at) : load<f32x16>(static_cast<const float*>(from) + at);
}

// Adds a group's share to the sums of M rows and one vector of columns. at: place of the group's numbers of these columns. about:
// of the first row. dot_of(m): sums of products of bytes and codes. sum_of(m): the sums to add to.
template <int M, class DotOf, class SumOf>
MAGICDEC_INLINE void add_group(const Int4Args& args, size_t at, const uint32_t* about, size_t stride, DotOf&& dot_of, SumOf&& sum_of) {
  const f32x16 scales = load_numbers(args.group_scales, at, args.half_scales);
  const auto add = [&](auto m, i32x16 dot) __attribute__((always_inline)) {
    sum_of(m) = fused(convert<f32x16>(dot), scales * bits<float>(about[m.value * stride]), sum_of(m));
  };
  if (args.zeros == Zeros::eight) {
    unrolled<M>([&](auto m) __attribute__((always_inline)) { add(m, dot_of(m) + int32_t(about[m.value * stride + 1])); });
  } else if (args.zeros == Zeros::points) {
    const i32x16 points = load_bytes(static_cast<const uint8_t*>(args.group_zeros) + at);
    unrolled<M>([&](auto m) __attribute__((always_inline)) { add(m, dot_of(m) + points * int32_t(about[m.value * stride + 1])); });
  } else {
    const f32x16 minima = load_numbers(args.group_zeros, at, args.zeros == Zeros::halves);
    unrolled<M>([&](auto m) __attribute__((always_inline)) {
      add(m, dot_of(m));
      sum_of(m) = fused(splat(bits<float>(about[m.value * stride + 1])), minima, sum_of(m));
    });
  }
}

template <class Out>
void finish_rows(const Int4Args& args, f32x16 (*sums)[2], int row, int rows, int block) {
  for (int m = 0; m < rows; m++) finish<Out, 1>(args, reinterpret_cast<f32x16(&)[1][2]>(sums[m]), row + m, block);
}

}  // namespace magicdec
