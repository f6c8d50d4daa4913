// Products of many rows with weights of 4 bits by AMX tiles. Their sums are the same integers that vectors compute.
#pragma once

#include "amx.h"
#include "int4_rows.h"

#if defined(MAGICDEC_TILES)

namespace magicdec {

constexpr int CODE_WORDS = TILE_WORDS / 2;  // words of codes that a tile of bytes holds

// Whether tiles multiply: they are worth it from 16 rows on, and groups must have one shape of tile. Of 16 x 16 sums over 64
// features, tiles take 16 cycles and vectors 128; adding them to the sums of groups takes both about 32.
inline bool takes_tiles(const Int4Args& args) {
  const int words = args.words / args.groups;
  return args.rows >= TILE_ROWS && (words <= CODE_WORDS || words % CODE_WORDS == 0);
}

// Writes the bytes of words of codes of one block: two words for each.
MAGICDEC_INLINE void unpack_codes(const uint32_t* codes, int words, uint32_t* to) {
  for (int w = 0; w < words; w++)
    for (int c = 0; c < 2; c++) {
      const u32x16 both = load<u32x16>(codes + w * BLOCK + c * LANES);
      store(to + 2 * w * BLOCK + c * LANES, both & 0x0f0f0f0f);
      store(to + (2 * w + 1) * BLOCK + c * LANES, both >> 4 & 0x0f0f0f0f);
    }
}

// Up to 32 rows times one block of columns. Tiles 0 … 3: sums, of two times sixteen rows and columns; 4, 5: rows; 6, 7: codes.
// SECOND: whether there are more than sixteen rows.
template <bool SECOND>
void int4_tile_rows(const Int4Args& args, const uint32_t* x, size_t stride, int rows, int block, f32x16 (*sums)[2]) {
  alignas(64) uint32_t unpacked[TILE_WORDS * BLOCK];
  alignas(64) i32x16 dots[2 * TILE_ROWS][2];
  constexpr size_t STRIDE = sizeof dots[0], CODES_STRIDE = BLOCK * sizeof(uint32_t);
  const size_t x_stride = stride * sizeof(uint32_t);
  const int words = args.words / args.groups, step = std::min(words, CODE_WORDS);
  const uint32_t* codes = args.packed + size_t(block) * args.words * BLOCK;
  for (int m = 0; m < rows; m++) sums[m][0] = sums[m][1] = f32x16{};
  for (int g = 0; g < args.groups; g++) {
    tile_zero<0>();
    tile_zero<1>();
    if constexpr (SECOND) {
      tile_zero<2>();
      tile_zero<3>();
    }
    for (int w = 0; w < words; w += step, codes += step * BLOCK) {
      const uint32_t* a = x + 2 * (g * words + w);
      unpack_codes(codes, step, unpacked);
      tile_load<6>(unpacked, CODES_STRIDE);
      tile_load<4>(a, x_stride);
      tile_dot_codes<0, 4, 6>();
      tile_load<7>(unpacked + LANES, CODES_STRIDE);
      tile_dot_codes<1, 4, 7>();
      if constexpr (SECOND) {
        tile_load<5>(a + TILE_ROWS * stride, x_stride);
        tile_dot_codes<2, 5, 6>();
        tile_dot_codes<3, 5, 7>();
      }
    }
    tile_store<0>(&dots[0][0], STRIDE);
    tile_store<1>(&dots[0][1], STRIDE);
    if constexpr (SECOND) {
      tile_store<2>(&dots[TILE_ROWS][0], STRIDE);
      tile_store<3>(&dots[TILE_ROWS][1], STRIDE);
    }
    for (int m = 0; m < rows;) {
      const auto add = [&](auto count) __attribute__((always_inline)) {
        for (int c = 0; c < 2; c++)
          add_group<decltype(count)::value>(
              args, (size_t(block) * args.groups + g) * BLOCK + c * LANES, x + m * stride + 2 * args.words + 2 * g, stride,
              [&](auto i) __attribute__((always_inline)) { return dots[m + i.value][c]; },
              [&](auto i) __attribute__((always_inline)) -> f32x16& { return sums[m + i.value][c]; });
        m += decltype(count)::value;
      };
      if (rows - m >= 8)
        add(Count<8>{});
      else
        add(Count<1>{});
    }
  }
}

// Computes rows [row, end) times one block of columns.
template <class Out>
void int4_tile_block(const Int4Args& args, Int4Rows x, int row, int end, int block) {
  const int words = 2 * std::min(args.words / args.groups, CODE_WORDS);
  TileShapes shapes;
  int held = 0;  // rows that the shapes are for
  for (; row < end; row += 2 * TILE_ROWS) {
    const int rows = std::min(2 * TILE_ROWS, end - row), above = std::min(TILE_ROWS, rows), below = rows - above;
    if (rows != held) {
      for (int tile : {0, 1}) shapes.set(tile, above, TILE_BYTES);
      for (int tile : {2, 3}) shapes.set(tile, below, below ? TILE_BYTES : 0);
      shapes.set(4, above, words * 4);
      shapes.set(5, below, below ? words * 4 : 0);
      for (int tile : {6, 7}) shapes.set(tile, words, TILE_BYTES);
      tile_shapes(shapes);
      held = rows;
    }
    f32x16 sums[2 * TILE_ROWS][2];
    const uint32_t* from = x.data + row * x.stride;
    if (below)
      int4_tile_rows<true>(args, from, x.stride, rows, block, sums);
    else
      int4_tile_rows<false>(args, from, x.stride, rows, block, sums);
    finish_rows<Out>(args, sums, row, rows, block);
  }
  tile_release();
}

}  // namespace magicdec

#endif
