// Matrix products by AMX tiles, and their twin for few rows.
//
// Both sum in the order of `tile_dot_bf16`: sixteen words at a time, even and odd elements apart, each from zero. So a row's
// result does not depend on which of the two computes it, and the faster one can: tiles multiply sixteen rows in the time of
// one, the twin needs no more than its loads while memory is the bound. Sums of bytes are exact in any order.
#pragma once

#include <type_traits>

#include "amx.h"
#include "linear_rows.h"

#if defined(MAGICDEC_TILES)

namespace magicdec {

constexpr int MAX_THIN = 6;         // rows of the twin: 24 of 32 registers hold even and odd sums
constexpr int PREFETCH_BYTES = 4096;  // how far ahead weights are fetched that are read from memory

MAGICDEC_INLINE void fetch_ahead(const uint32_t* from, int lines) {
  const char* next = reinterpret_cast<const char*>(from) + PREFETCH_BYTES;
  for (int i = 0; i < lines; i++) __builtin_prefetch(next + 64 * i, 0, 3);
}

// M rows times one block of columns, without tiles. x: rows as floats.
template <class Out, int M>
void thin_rows(const LinearArgs& args, const float* x, size_t stride, int row, int block) {
  const uint32_t* b = args.packed + size_t(block) * args.words * BLOCK;
  f32x16 sums[M][2] = {};
  for (int w = 0; w < args.words; w += TILE_WORDS) {
    f32x16 even[M][2] = {}, odd[M][2] = {};
    for (int i = w; i < w + TILE_WORDS; i++) {
      f32x16 low[2], high[2];
      fetch_ahead(b + i * BLOCK, 2);
      for (int c = 0; c < 2; c++) {
        const u32x16 right = load<u32x16>(b + i * BLOCK + c * LANES);
        low[c] = bits<f32x16>(right << 16), high[c] = bits<f32x16>(right & 0xffff0000);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const float* left = x + m * stride + 2 * i;
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
          even[m][c] = multiply_add(splat(left[0]), low[c], even[m][c]);
          odd[m][c] = multiply_add(splat(left[1]), high[c], odd[m][c]);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int c = 0; c < 2; c++) sums[m][c] += even[m][c] + odd[m][c];
  }
  finish<Out, M>(args, sums, row, block);
}

template <class Out>
void thin_block(const LinearArgs& args, const float* x, int row, int end, int block) {
  const FlushDenormals as_tiles_do;
  const size_t stride = size_t(args.words) * 2;
  const int rows = end - row;
  for (int done = 0; done < rows;) {
    const int height = tile_height(rows, done, MAX_THIN);
    with_rows<MAX_THIN>(height, [&](auto count) {
      thin_rows<Out, decltype(count)::value>(args, x + (row + done) * stride, stride, row + done, block);
    });
    done += height;
  }
}

template <class Dot, int C, int A, int B>
MAGICDEC_INLINE void tile_dot() {
  if constexpr (Dot::ELEMENTS == 4)
    tile_dot_bytes<C, A, B>();
  else
    tile_dot_bf16<C, A, B>();
}

// Up to 32 rows times one block of columns. Tiles 0 … 3: sums, of two times sixteen rows and columns; 4, 5: rows; 6, 7: columns.
// SECOND: whether there are more than sixteen rows. first: whether the weights come from memory.
template <class Dot, class Out, bool SECOND>
void tile_rows(const LinearArgs& args, Rows x, const float* scales, int row, int rows, int block, bool first) {
  const uint32_t* b = args.packed + size_t(block) * args.words * BLOCK;
  const uint32_t* a = x.data + size_t(row) * x.stride;
  const size_t a_stride = x.stride * sizeof(uint32_t), b_stride = BLOCK * sizeof(uint32_t);
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (SECOND) {
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int w = 0; w < args.words; w += TILE_WORDS, b += TILE_WORDS * BLOCK) {
    if (first) fetch_ahead(b, 2 * TILE_WORDS);
    tile_load<6>(b, b_stride);
    tile_load<4>(a + w, a_stride);
    tile_dot<Dot, 0, 4, 6>();
    tile_load<7>(b + LANES, b_stride);
    tile_dot<Dot, 1, 4, 7>();
    if constexpr (SECOND) {
      tile_load<5>(a + TILE_ROWS * x.stride + w, a_stride);
      tile_dot<Dot, 2, 5, 6>();
      tile_dot<Dot, 3, 5, 7>();
    }
  }
  alignas(64) typename Dot::Sums sums[2 * TILE_ROWS][2];
  constexpr size_t STRIDE = sizeof sums[0];
  tile_store<0>(&sums[0][0], STRIDE);
  tile_store<1>(&sums[0][1], STRIDE);
  if constexpr (SECOND) {
    tile_store<2>(&sums[TILE_ROWS][0], STRIDE);
    tile_store<3>(&sums[TILE_ROWS][1], STRIDE);
  }
  for (int m = 0; m < rows; m++) finish_sums<Dot, Out, 1>(args, reinterpret_cast<typename Dot::Sums(&)[1][2]>(sums[m]), scales, row + m, block);
}

// Computes rows [row, end) times one block of columns.
template <class Dot, class Out>
void tile_block(const LinearArgs& args, Rows x, const float* scales, int row, int end, int block) {
  // Tiles flush denormal numbers anyway, and the twin does where it finishes sums. Few rows of bytes do not.
  [[maybe_unused]] const std::conditional_t<Dot::ELEMENTS == 4, Nothing, FlushDenormals> as_the_twin_does{};
  TileShapes shapes;
  int held = 0;  // rows that the shapes are for
  bool first = true;
  for (; row < end; row += 2 * TILE_ROWS, first = false) {
    const int rows = std::min(2 * TILE_ROWS, end - row), above = std::min(TILE_ROWS, rows), below = rows - above;
    if (rows != held) {
      for (int tile : {0, 1, 4}) shapes.set(tile, above, TILE_BYTES);
      for (int tile : {2, 3, 5}) shapes.set(tile, below, below ? TILE_BYTES : 0);
      for (int tile : {6, 7}) shapes.set(tile, TILE_ROWS, TILE_BYTES);
      tile_shapes(shapes);
      held = rows;
    }
    if (below)
      tile_rows<Dot, Out, true>(args, x, scales, row, rows, block, first);
    else
      tile_rows<Dot, Out, false>(args, x, scales, row, rows, block, first);
  }
  tile_release();
}

}  // namespace magicdec

#endif
