// Thin matrix products: a few rows times weights, which are read once.
#pragma once

#include <omp.h>

#include <algorithm>

#include "dispatch.h"
#include "tile.h"

namespace magicdec {

constexpr int ROW_CHUNK = 96;  // rows whose input stays in the L2 cache while all weights are read

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

// Quantizes a row to bytes, round(x / scale) + DotI8::ZERO, with scale = max |x| / 127. Returns the scale.
template <class T>
MAGICDEC_INLINE float quantise_row(const T* x, uint8_t* to, int features, int words) {
  f32x16 peak{};
  int i = 0;
  for (; i + LANES <= features; i += LANES) {
    const f32x16 v = load_floats(x + i);
    peak = maximum(peak, maximum(v, -v));
  }
  if (i < features) {
    const f32x16 v = load_some(x + i, features - i);
    peak = maximum(peak, maximum(v, -v));
  }
  const float largest_x = largest(peak);
  const float scale = largest_x / 127.0f, inverse = largest_x > 0 ? 127.0f / largest_x : 0.0f;
  for (i = 0; i < words * 4; i += LANES) {
    const int n = std::min(LANES, features - i);
    const f32x16 v = (n == LANES ? load_floats(x + i) : n > 0 ? load_some(x + i, n) : f32x16{}) * inverse;
    // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
    const u32x16 q = bits<u32x16>(v + 12582912.0f) + (DotI8::ZERO - 0x4b400000u);
    uint8_t bytes[LANES];
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8((__m512i)q));
#elif defined(__aarch64__)
    neon::store_bytes(bytes, q);
#else
    for (int lane = 0; lane < LANES; lane++) bytes[lane] = uint8_t(q[lane]);
#endif
    std::memcpy(to + i, bytes, std::min(LANES, words * 4 - i));
  }
  return scale;
}

template <class Out>
MAGICDEC_INLINE void store_columns(Out* y, f32x16 v, int n) {
  if (n >= LANES)
    store_floats(y, v);
  else if (n > 0)
    store_some(y, v, n);
}

template <class Out, int M>
MAGICDEC_INLINE void finish(const LinearArgs& args, f32x16 (&sums)[M][2], int row, int block) {
  for (int m = 0; m < M; m++) {
    f32x16 first = sums[m][0], second = sums[m][1];
    if (args.bias) {
      first += load<f32x16>(args.bias + block * BLOCK);
      second += load<f32x16>(args.bias + block * BLOCK + LANES);
    }
    Out* y = static_cast<Out*>(args.y) + (row + m) * args.y_stride;
    if (args.silu_mul) {
      const int column = block * LANES;
      store_columns(y + column, first / (1.0f + exponential(-first)) * second, args.columns - column);
    } else {
      const int column = block * BLOCK;
      store_columns(y + column, first, args.columns - column);
      store_columns(y + column + LANES, second, args.columns - column - LANES);
    }
  }
}

// Computes all tiles of rows [row, end) times one block of columns.
template <class Dot, class Out>
void linear_block(const LinearArgs& args, Rows x, const float* scales, int row, int end, int block) {
  const uint32_t* b = args.packed + size_t(block) * args.words * BLOCK;
  const int rows = end - row;
  for (int done = 0; done < rows;) {
    const int height = tile_height(rows, done, MAX_ROWS);
    const uint32_t* a = x.data + size_t(row + done) * x.stride;
    with_rows<MAX_ROWS>(height, [&](auto count) {
      constexpr int M = decltype(count)::value;
      typename Dot::Sums sums[M][2] = {};
      tile<Dot, M, 2>(sums, a, x.stride, b, BLOCK, args.words);
      if constexpr (Dot::ELEMENTS == 4) {
        f32x16 scaled[M][2];
        for (int c = 0; c < 2; c++) {
          const i32x16 offset = DotI8::ZERO ? load<i32x16>(args.offsets + block * BLOCK + c * LANES) : i32x16{};
          const f32x16 column = load<f32x16>(args.scales + block * BLOCK + c * LANES);
          for (int m = 0; m < M; m++)
            scaled[m][c] = convert<f32x16>(sums[m][c] + offset) * (column * scales[row + done + m]);
        }
        finish<Out, M>(args, scaled, row + done, block);
      } else {
        finish<Out, M>(args, sums, row + done, block);
      }
    });
    done += height;
  }
}

inline bool needs_copy(const LinearArgs& args) {
  if (args.format == Weights::i8) return true;
  const int elements = args.format == Weights::f32 ? 1 : 2;
  const bool words = args.x_stride % elements == 0 && reinterpret_cast<uintptr_t>(args.x) % sizeof(uint32_t) == 0;
  return args.features != args.words * elements || !words;
}

inline size_t linear_scratch(const LinearArgs& args) {
  if (!needs_copy(args)) return 0;
  return to_whole_lines(size_t(args.rows) * args.words * 4) + to_whole_lines(size_t(args.rows) * sizeof(float));
}

template <class Dot, class In, class Out>
void linear(const LinearArgs& args) {
  const bool copied = needs_copy(args);
  auto* copy = static_cast<uint32_t*>(args.scratch);
  auto* scales = copied ? reinterpret_cast<float*>(static_cast<char*>(args.scratch) + to_whole_lines(size_t(args.rows) * args.words * 4)) : nullptr;
  const Rows x = copied ? Rows{copy, size_t(args.words)}
                        : Rows{static_cast<const uint32_t*>(args.x), size_t(args.x_stride) / Dot::ELEMENTS};
  const int columns = args.silu_mul ? args.columns * 2 : args.columns;
  const int blocks = (columns + BLOCK - 1) / BLOCK;
  const int threads = std::min(omp_get_max_threads(), blocks);
#pragma omp parallel num_threads(threads)
  {
    if (copied) {
#pragma omp for schedule(static)
      for (int row = 0; row < args.rows; row++) {
        const In* from = static_cast<const In*>(args.x) + row * args.x_stride;
        uint32_t* to = copy + size_t(row) * args.words;
        if constexpr (Dot::ELEMENTS == 4)
          scales[row] = quantise_row(from, reinterpret_cast<uint8_t*>(to), args.features, args.words);
        else
          copy_row(from, to, args.features, args.words, Dot::ELEMENTS);
      }
    }
    // Few rows: threads split the columns. Many: threads split the rows, so that a thread's input stays in its cache.
    const int fitting = (args.rows + ROW_CHUNK - 1) / ROW_CHUNK;
    const int chunks = fitting < threads ? 1 : (fitting + threads - 1) / threads * threads;
    if (chunks == 1) {
#pragma omp for schedule(static) nowait
      for (int block = 0; block < blocks; block++) linear_block<Dot, Out>(args, x, scales, 0, args.rows, block);
    } else {
#pragma omp for schedule(dynamic) nowait
      for (int chunk = 0; chunk < chunks; chunk++)
        for (int block = 0; block < blocks; block++)
          linear_block<Dot, Out>(args, x, scales, int(int64_t(args.rows) * chunk / chunks),
                                 int(int64_t(args.rows) * (chunk + 1) / chunks), block);
    }
  }
}

template <class Dot, class In>
void linear_to(const LinearArgs& args) {
  if (args.out == Type::f32) return linear<Dot, In, float>(args);
  if constexpr (!std::is_same_v<In, float>) linear<Dot, In, In>(args);
}

// Supported formats: weights of the input's type, or bytes with any input; outputs of the input's type or float32.
inline void linear_any(const LinearArgs& args) {
  with_type(args.in, [&](auto zero) {
    using In = decltype(zero);
    if (args.format == Weights::i8)
      linear_to<DotI8, In>(args);
    else
      linear_to<typename DotOf<In>::type, In>(args);
  });
}

}  // namespace magicdec
