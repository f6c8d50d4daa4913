// The tiles of Intel AMX: eight registers of up to 16 rows of 64 bytes, and products of them.
//
// With MAGICDEC_SOFTWARE_TILES the same functions compute in memory what Intel's manual specifies, to the bit, so that
// kernels made of tiles are tested on processors without them.
#pragma once

#include <cstring>

#include "vec.h"

namespace magicdec {

constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 64;  // per row
constexpr int TILE_WORDS = TILE_BYTES / 4;

// Shapes of the tiles, in the layout that the processor loads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // per row of each tile
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int tile_bytes) { rows[tile] = uint8_t(tile_rows), bytes[tile] = uint16_t(tile_bytes); }
};

#if defined(MAGICDEC_SOFTWARE_TILES)

struct SoftwareTiles {
  TileShapes shapes;
  alignas(64) uint32_t data[8][TILE_ROWS][TILE_WORDS];
};
inline thread_local SoftwareTiles software_tiles;

inline bool tiles_permitted() { return true; }

// Sets the shapes of all tiles, and clears them.
inline void tile_shapes(const TileShapes& shapes) {
  software_tiles.shapes = shapes;
  std::memset(software_tiles.data, 0, sizeof software_tiles.data);
}
inline void tile_release() { software_tiles.shapes = {}; }

template <int TILE>
inline void tile_zero() {
  std::memset(software_tiles.data[TILE], 0, sizeof software_tiles.data[TILE]);
}

// stride: bytes from row to row in memory.
template <int TILE>
inline void tile_load(const void* from, size_t stride) {
  tile_zero<TILE>();
  for (int row = 0; row < software_tiles.shapes.rows[TILE]; row++)
    std::memcpy(software_tiles.data[TILE][row], static_cast<const char*>(from) + row * stride, software_tiles.shapes.bytes[TILE]);
}
template <int TILE>
inline void tile_store(void* to, size_t stride) {
  for (int row = 0; row < software_tiles.shapes.rows[TILE]; row++)
    std::memcpy(static_cast<char*>(to) + row * stride, software_tiles.data[TILE][row], software_tiles.shapes.bytes[TILE]);
}

// C[m][n] += the sums over A's words k of the products of the two 16-bit floats of A[m][k] and B[k][n]. Each call sums
// the even products from zero, and the odd ones, both in ascending k with fused multiply-adds, and adds both to C.
// Denormal numbers count as zeros.
template <int C, int A, int B>
inline void tile_dot_bf16() {
  auto& t = software_tiles;
  const FlushDenormals flush;
  for (int m = 0; m < t.shapes.rows[C]; m++) {
    f32x16 even{}, odd{};
    for (int k = 0; k < t.shapes.bytes[A] / 4; k++) {
      const uint32_t a = t.data[A][m][k];
      const u32x16 b = load<u32x16>(t.data[B][k]);
      even = multiply_add(splat(bits<float>(a << 16)), bits<f32x16>(b << 16), even);
      odd = multiply_add(splat(bits<float>(a & 0xffff0000)), bits<f32x16>(b & 0xffff0000), odd);
    }
    store(t.data[C][m], load<f32x16>(t.data[C][m]) + (even + odd));
  }
}

// C[m][n] += the sums over A's words k of the products of the four bytes of A[m][k], unsigned, and B[k][n], signed.
template <int C, int A, int B>
inline void tile_dot_bytes() {
  auto& t = software_tiles;
  for (int m = 0; m < t.shapes.rows[C]; m++) {
    i32x16 sums = load<i32x16>(t.data[C][m]);
    for (int k = 0; k < t.shapes.bytes[A] / 4; k++) sums = DotI8::add(sums, t.data[A][m][k], load<u32x16>(t.data[B][k]));
    store(t.data[C][m], sums);
  }
}

// C[m][n] += likewise, with signed bytes of A[m][k] and unsigned ones of B[k][n].
template <int C, int A, int B>
inline void tile_dot_codes() {
  auto& t = software_tiles;
  for (int m = 0; m < t.shapes.rows[C]; m++) {
    __m512i sums = _mm512_loadu_si512(t.data[C][m]);
    for (int k = 0; k < t.shapes.bytes[A] / 4; k++)
      sums = _mm512_dpbusd_epi32(sums, _mm512_loadu_si512(t.data[B][k]), _mm512_set1_epi32(t.data[A][m][k]));
    _mm512_storeu_si512(t.data[C][m], sums);
  }
}

#elif defined(__AMX_TILE__)

}  // namespace magicdec
#include <sys/syscall.h>
#include <unistd.h>
namespace magicdec {

// Asks the kernel for this process's permission to use tiles. It is asked once, before any thread uses them, and may refuse.
inline bool tiles_permitted() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

MAGICDEC_INLINE void tile_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
MAGICDEC_INLINE void tile_release() { asm volatile("tilerelease"); }

template <int TILE>
MAGICDEC_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE>
MAGICDEC_INLINE void tile_load(const void* from, size_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
}
template <int TILE>
MAGICDEC_INLINE void tile_store(void* to, size_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(to), "r"(stride) : "memory");
}
template <int C, int A, int B>
MAGICDEC_INLINE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
MAGICDEC_INLINE void tile_dot_bytes() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
MAGICDEC_INLINE void tile_dot_codes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

#if defined(MAGICDEC_SOFTWARE_TILES) || defined(__AMX_TILE__)
#define MAGICDEC_TILES 1

// Shapes of tiles for the time of a piece of work. Idle tiles make a thread's context larger, so they are released.
struct TileUse {
  explicit TileUse(const TileShapes& shapes) { tile_shapes(shapes); }
  ~TileUse() { tile_release(); }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
};
#endif

}  // namespace magicdec
