// Matrix products: rows times packed weights.
#pragma once

#include <algorithm>

#include "linear_rows.h"
#include "linear_tiles.h"
#include "team.h"

namespace magicdec {

constexpr int ROW_CHUNK = 96;  // rows whose input stays in the L2 cache while all weights are read

// SPREAD: whether rows are copied as the left factors of a product's steps, two per word. FETCHES: whether tiles of more than two
// rows prefetch weights. There vectors of columns take turns, so each passes over every second line, and processors do not expect
// the next ones.
constexpr int FETCH_WORDS = 512;  // how far ahead
#if defined(MAGICDEC_AVX2)
constexpr bool FETCHES = true;
template <class Dot>
constexpr bool SPREAD = Dot::Steps::STEPS == 2;
#else
constexpr bool FETCHES = false;
template <class Dot>
constexpr bool SPREAD = false;
#endif

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
      tile<Dot, M, 2, SPREAD<Dot>>(sums, a, x.stride, b, BLOCK, args.words, [&](int w) __attribute__((always_inline)) {
        if constexpr (FETCHES && M > 2) {
          __builtin_prefetch(b + w * BLOCK + FETCH_WORDS, 0, 3);
          __builtin_prefetch(b + w * BLOCK + FETCH_WORDS + LANES, 0, 3);
        }
      });
      finish_sums<Dot, Out, M>(args, sums, scales, row + done, block);
    });
    done += height;
  }
}

// How a product reads its rows.
struct Input {
  bool copied;
  size_t words;  // per row of the copy
  bool tiles;    // multiply by AMX tiles
  bool floats;   // copied as float32, for the twin of the tiles and for products in steps
};

inline Input input_of(const LinearArgs& args) {
  const size_t words = args.words;
#if defined(MAGICDEC_TILES)
  if (args.format == Weights::i8) return {true, words, args.rows >= args.tiles_from, false};
  if (args.format == Weights::bf16 && args.rows < args.tiles_from) return {true, words * 2, false, true};
  const bool tiles = args.format == Weights::bf16;
#else
  if (args.format == Weights::i8) return {true, SPREAD<DotI8> ? words * 2 : words, false, false};
  if (SPREAD<DotBF16> && args.format != Weights::f32) return {true, words * 2, false, true};
  constexpr bool tiles = false;
#endif
  const int elements = args.format == Weights::f32 ? 1 : 2;
  const bool in_words = args.x_stride % elements == 0 && reinterpret_cast<uintptr_t>(args.x) % sizeof(uint32_t) == 0;
  return {args.features != args.words * elements || !in_words, words, tiles, false};
}

inline size_t linear_scratch(const LinearArgs& args) {
  const Input input = input_of(args);
  if (!input.copied) return 0;
  return to_whole_lines(args.rows * input.words * sizeof(uint32_t)) + to_whole_lines(args.rows * sizeof(float));
}

// Number of rows that are multiplied with all weights before the next ones are: their input stays in the L2 cache.
inline int row_chunk(const LinearArgs& args, bool tiles) {
  constexpr size_t CACHED = 1 << 19;
  if (!tiles) return ROW_CHUNK;
  return int(std::clamp<size_t>(CACHED / (size_t(args.words) * sizeof(uint32_t)), 64, 512)) / 32 * 32;
}

template <class Dot, class In, class Out>
void linear(const LinearArgs& args) {
  const Input input = input_of(args);
  auto* copy = static_cast<uint32_t*>(args.scratch);
  const size_t copied = to_whole_lines(args.rows * input.words * sizeof(uint32_t)) / sizeof(uint32_t);
  auto* scales = input.copied ? reinterpret_cast<float*>(copy + copied) : nullptr;
  const Rows x = input.copied ? Rows{copy, input.words} : Rows{static_cast<const uint32_t*>(args.x), size_t(args.x_stride) / Dot::ELEMENTS};
  if (input.copied)
    for_rows(args.team, args.rows, args.features, [&](int64_t row) {
      const In* from = static_cast<const In*>(args.x) + row * args.x_stride;
      uint32_t* to = copy + row * input.words;
      if constexpr (Dot::ELEMENTS == 4)
        scales[row] = quantise_row<SPREAD<Dot>>(from, to, args.features, args.words);
      else if (input.floats)
        widen_row(from, reinterpret_cast<float*>(to), args.features, int(input.words));
      else
        copy_row(from, to, args.features, args.words, Dot::ELEMENTS);
    });
  const int columns = packed_columns(args);
  const int blocks = (columns + BLOCK - 1) / BLOCK;
  const int height = row_chunk(args, input.tiles);
  const int64_t chunks = (args.rows + height - 1) / height;
  for_pieces(args.team, chunks * blocks, [&](int64_t piece, int) {
    const int64_t chunk = piece / blocks;
    const int row = int(args.rows * chunk / chunks), end = int(args.rows * (chunk + 1) / chunks), block = int(piece % blocks);
#if defined(MAGICDEC_TILES)
    if constexpr (std::is_same_v<Dot, DotBF16> || std::is_same_v<Dot, DotI8>) {
      if (input.tiles) return tile_block<Dot, Out>(args, x, scales, row, end, block);
      if (input.floats) return thin_block<Out>(args, reinterpret_cast<const float*>(x.data), row, end, block);
    }
#endif
    linear_block<Dot, Out>(args, x, scales, row, end, block);
  });
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
