// Attention of ragged queries over paged keys and values.
//
// A row's slots are cut into SEGMENTs, a segment into SLOTS blocks, both counted from the first slot that the row's page
// list names. A block's keys and values are laid out for `tile` once and then meet all queries of the row, of all heads
// that share them: two small matrix products with a softmax between. Within a segment the softmax runs along (Milakov &
// Gimelshein, arXiv 1805.02867); segments, which may go to different threads, are merged in rising order.
//
// So each query's numbers depend on its own slots and on nothing else: not on the queries beside it, on other rows, or
// on the number of threads. Slots that a query must not see count with a weight of exactly zero.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "dispatch.h"
#include "tile.h"

namespace magicdec {

constexpr int SLOTS = 64;      // of a block
constexpr int SEGMENT = 1024;  // slots of one piece of work
#if defined(__AVX512F__)
constexpr int FEW = 6;  // rows of queries for which laying out a block would cost more than meeting them as it stands
#else
constexpr int FEW = 0;
#endif
constexpr int TALL = 64;       // queries times heads of a group from which on a row's work is cut by queries as well

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Running softmax of some queries: o is the sum of values weighted by 2^(score - most), total the sum of the weights.
struct Running {
  float* most;   // [rows]
  float* total;  // [rows]
  float* o;      // [rows, head_dim]

  static size_t floats(int rows, int head_dim) { return size_t(rows) * (head_dim + 2); }
  static Running at(float* memory, int rows) { return {memory, memory + rows, memory + 2 * rows}; }
  void clear(int rows, int head_dim) const {
    std::fill(most, most + rows, NOTHING);
    std::fill(total, total + rows, 0.0f);
    std::fill(o, o + size_t(rows) * head_dim, 0.0f);
  }
};

MAGICDEC_INLINE float exp2_of(float x) { return exp2_falling(splat(x))[0]; }

inline void merge(Running into, int to, Running from, int row, int head_dim) {
  if (from.total[row] == 0.0f) return;
  const float most = std::max(into.most[to], from.most[row]);
  const float mine = exp2_of(into.most[to] - most), its = exp2_of(from.most[row] - most);
  into.most[to] = most;
  into.total[to] = into.total[to] * mine + from.total[row] * its;
  float* o = into.o + size_t(to) * head_dim;
  const float* other = from.o + size_t(row) * head_dim;
  for (int d = 0; d < head_dim; d += LANES) store(o + d, load<f32x16>(o + d) * mine + load<f32x16>(other + d) * its);
}

// -- one block of keys and values -------------------------------------------------------------------------------------

// Swaps rows and columns of 16 × 16 words.
MAGICDEC_INLINE void transpose(u32x16 (&x)[LANES]) {
#if defined(__AVX512F__)
  __m512i a[LANES], b[LANES];
  for (int i = 0; i < LANES; i++) a[i] = (__m512i)x[i];
  for (int i = 0; i < 8; i++) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  // a[4 i + j]: column j of each 128-bit lane, of rows 4 i … 4 i + 3.
  for (int j = 0; j < 4; j++) {
    const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    x[j] = (u32x16)_mm512_shuffle_i32x4(low, low2, 0x88);
    x[8 + j] = (u32x16)_mm512_shuffle_i32x4(low, low2, 0xdd);
    x[4 + j] = (u32x16)_mm512_shuffle_i32x4(high, high2, 0x88);
    x[12 + j] = (u32x16)_mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#else
  uint32_t words[LANES][LANES];
  for (int i = 0; i < LANES; i++) store(words[i], x[i]);
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) x[i][j] = words[j][i];
#endif
}

// Sixteen slots, one after the other, of keys and of values: where a block's four groups of them stand.
template <class T>
struct Block {
  static constexpr int GROUPS = SLOTS / LANES;
  const T *keys[GROUPS], *values[GROUPS];

  // Asks for the memory that will be read soon: a sixteenth of a group's, i of 16.
  MAGICDEC_INLINE void fetch_keys(int group, int i, int head_dim) const { fetch(keys[group] + i * head_dim, head_dim); }
  MAGICDEC_INLINE void fetch_values(int group, int i, int head_dim) const { fetch(values[group] + i * head_dim, head_dim); }

 private:
  static MAGICDEC_INLINE void fetch(const T* from, int count) {
    const char* line = reinterpret_cast<const char*>(from);
    for (size_t i = 0; i < count * sizeof(T); i += 64) __builtin_prefetch(line + i, 0, 2);
  }
};

// The block that begins at slot `start` of a row whose slots end at `end`, of one KV head. Where groups are not whole
// pieces of pages, or not whole, they are copied; slots that do not count become zeros, whatever they hold.
template <class T>
MAGICDEC_INLINE Block<T> find_block(const AttentionArgs& args, const int64_t* list, int head, int64_t start, int64_t end, T* staged) {
  const int head_dim = args.head_dim;
  const size_t head_offset = size_t(head) * args.page_size * head_dim;
  const auto* keys = static_cast<const T*>(args.k) + head_offset;
  const auto* values = static_cast<const T*>(args.v) + head_offset;
  const auto at = [&](int64_t slot) {
    return size_t(list[slot / args.page_size]) * args.page_stride + size_t(slot % args.page_size) * head_dim;
  };
  Block<T> block;
  if (args.page_size % LANES == 0 && start + SLOTS <= end) {
    for (int group = 0; group < block.GROUPS; group++) {
      const size_t place = at(start + group * LANES);
      block.keys[group] = keys + place, block.values[group] = values + place;
    }
    return block;
  }
  for (int group = 0; group < block.GROUPS; group++) {
    block.keys[group] = staged + size_t(group) * LANES * head_dim;
    block.values[group] = block.keys[group] + size_t(SLOTS) * head_dim;
  }
  const size_t bytes = head_dim * sizeof(T);
  for (int slot = 0; slot < SLOTS; slot++) {
    T *key = staged + size_t(slot) * head_dim, *value = key + size_t(SLOTS) * head_dim;
    if (start + slot < end) {
      const size_t place = at(start + slot);
      std::memcpy(key, keys + place, bytes);
      std::memcpy(value, values + place, bytes);
    } else {
      std::memset(key, 0, bytes);
      std::memset(value, 0, bytes);
    }
  }
  return block;
}

// The block after one, to ask for ahead of time: itself where there is none, or where pages are too small to ask for.
template <class T>
MAGICDEC_INLINE Block<T> next_block(const AttentionArgs& args, const int64_t* list, int head, int64_t start, int64_t end, const Block<T>& block) {
  const int64_t next = start + SLOTS;
  return next + SLOTS <= end && args.page_size % LANES == 0 ? find_block<T>(args, list, head, next, end, nullptr) : block;
}

// Words w … w + 15 of sixteen keys, [slot][word], become [word][slot].
template <class T>
MAGICDEC_INLINE void turn_keys(const T* keys, int head_dim, int w, int count, u32x16 (&x)[LANES]) {
  constexpr int ELEMENTS = DotOf<T>::type::ELEMENTS;
  for (int i = 0; i < LANES; i++) {
    const T* from = keys + i * head_dim + w * ELEMENTS;
    if (count == LANES) {
      x[i] = load<u32x16>(from);
    } else {
      x[i] = u32x16{};
      std::memcpy(&x[i], from, count * sizeof(uint32_t));
    }
  }
  transpose(x);
}

// Becomes [head_dim / ELEMENTS words][SLOTS].
template <class T>
MAGICDEC_INLINE void pack_keys(const Block<T>& block, const Block<T>& next, int head_dim, uint32_t* packed) {
  const int words = head_dim / DotOf<T>::type::ELEMENTS;
  for (int group = 0; group < block.GROUPS; group++) {
    for (int i = 0; i < LANES; i++) next.fetch_keys(group, i, head_dim);
    for (int w = 0; w < words; w += LANES) {
      const int n = std::min(LANES, words - w);
      u32x16 x[LANES];
      turn_keys(block.keys[group], head_dim, w, n, x);
      for (int i = 0; i < n; i++) store(packed + (w + i) * SLOTS + group * LANES, x[i]);
    }
  }
}

// Two slots' values of 16 columns, side by side in words; for float32 one slot's.
template <class T>
MAGICDEC_INLINE u32x16 pair_values(const T* values, int head_dim) {
  if constexpr (sizeof(T) == 4)
    return load<u32x16>(values);
  else
    return widen(load<u16x16>(values)) | (widen(load<u16x16>(values + head_dim)) << 16);
}

// The same for 32 columns.
template <class T>
MAGICDEC_INLINE void pair_values(const T* values, int head_dim, u32x16& first, u32x16& second) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) {
    alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    alignas(64) static constexpr uint16_t HIGH[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i a = _mm512_loadu_si512(values), b = _mm512_loadu_si512(values + head_dim);
    first = (u32x16)_mm512_permutex2var_epi16(a, _mm512_load_si512(LOW), b);
    second = (u32x16)_mm512_permutex2var_epi16(a, _mm512_load_si512(HIGH), b);
    return;
  }
#endif
  first = pair_values(values, head_dim), second = pair_values(values + LANES, head_dim);
}

// Becomes [SLOTS / ELEMENTS words][head_dim].
template <class T>
MAGICDEC_INLINE void pack_values(const Block<T>& block, const Block<T>& next, int head_dim, uint32_t* packed) {
  constexpr int ELEMENTS = DotOf<T>::type::ELEMENTS;
  for (int slot = 0; slot < SLOTS; slot += ELEMENTS) {
    const T* values = block.values[slot / LANES] + (slot % LANES) * head_dim;
    for (int i = 0; i < ELEMENTS; i++) next.fetch_values(slot / LANES, slot % LANES + i, head_dim);
    uint32_t* to = packed + slot / ELEMENTS * head_dim;
    int d = 0;
    for (; d + 2 * LANES <= head_dim; d += 2 * LANES) {
      u32x16 first, second;
      pair_values(values + d, head_dim, first, second);
      store(to + d, first);
      store(to + d + LANES, second);
    }
    if (d < head_dim) store(to + d, pair_values(values + d, head_dim));
  }
}

// -- a block meets queries --------------------------------------------------------------------------------------------

// For few rows of queries: each word of a key meets them in the register in which it was turned.
template <class T, int M>
MAGICDEC_INLINE void score_few(const Block<T>& block, const Block<T>& next, int head_dim, const uint32_t* q, float* scores) {
  using Dot = typename DotOf<T>::type;
  const int words = head_dim / Dot::ELEMENTS;
  for (int group = 0; group < block.GROUPS; group++) {
    f32x16 sums[M] = {};
    for (int i = 0; i < LANES; i++) next.fetch_keys(group, i, head_dim);
    for (int w = 0; w < words; w += LANES) {
      const int n = std::min(LANES, words - w);
      u32x16 x[LANES];
      turn_keys(block.keys[group], head_dim, w, n, x);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        if (i >= n) break;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) sums[m] = Dot::add(sums[m], q[m * words + w + i], x[i]);
      }
    }
    for (int m = 0; m < M; m++) store(scores + m * SLOTS + group * LANES, sums[m]);
  }
}

// For few rows of weights [M][SLOTS]: o[M][head_dim] += weights · values.
template <class T, int M>
MAGICDEC_INLINE void mix_few(const Block<T>& block, const Block<T>& next, int head_dim, const T* weights, float* o) {
  using Dot = typename DotOf<T>::type;
  constexpr int C = 4;
  const auto* words = reinterpret_cast<const uint32_t*>(weights);
  const auto columns = [&](int d, auto width) {
    constexpr int N = decltype(width)::value;
    f32x16 sums[M][N];
    for (int m = 0; m < M; m++)
      for (int c = 0; c < N; c++) sums[m][c] = load<f32x16>(o + m * head_dim + d + c * LANES);
    for (int slot = 0; slot < SLOTS; slot += Dot::ELEMENTS) {
      const T* values = block.values[slot / LANES] + (slot % LANES) * head_dim + d;
      if (d == 0)
        for (int i = 0; i < Dot::ELEMENTS; i++) next.fetch_values(slot / LANES, slot % LANES + i, head_dim);
      u32x16 right[N];
      if constexpr (N == 1)
        right[0] = pair_values(values, head_dim);
      else
        for (int c = 0; c < N; c += 2) pair_values(values + c * LANES, head_dim, right[c], right[c + 1]);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const uint32_t left = words[(m * SLOTS + slot) / Dot::ELEMENTS];
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sums[m][c] = Dot::add(sums[m][c], left, right[c]);
      }
    }
    for (int m = 0; m < M; m++)
      for (int c = 0; c < N; c++) store(o + m * head_dim + d + c * LANES, sums[m][c]);
  };
  int d = 0;
  for (; d + C * LANES <= head_dim; d += C * LANES) columns(d, Count<C>{});
  for (; d < head_dim; d += LANES) columns(d, Count<1>{});
}

// out[m][n] = (KEEP ? out[m][n] : 0) + a · b over `columns` columns, a multiple of 16.
template <class Dot, bool KEEP>
MAGICDEC_INLINE void product(const uint32_t* a, size_t a_stride, const uint32_t* b, int words, float* out, size_t out_stride,
                             int rows, int columns) {
  const auto columns_of = [&](auto width, int column) {
    constexpr int C = decltype(width)::value;
    for (int row = 0; row < rows;) {
      const int height = tile_height(rows, row, MAX_ROWS);
      with_rows<MAX_ROWS>(height, [&](auto count) {
        constexpr int M = decltype(count)::value;
        typename Dot::Sums sums[M][C];
        float* o = out + row * out_stride + column;
        for (int m = 0; m < M; m++)
          for (int c = 0; c < C; c++) sums[m][c] = KEEP ? load<f32x16>(o + m * out_stride + c * LANES) : f32x16{};
        tile<Dot, M, C>(sums, a + row * a_stride, a_stride, b + column, columns, words);
        for (int m = 0; m < M; m++)
          for (int c = 0; c < C; c++) store(o + m * out_stride + c * LANES, sums[m][c]);
      });
      row += height;
    }
  };
  int column = 0;
  for (; column + 2 * LANES <= columns; column += 2 * LANES) columns_of(Count<2>{}, column);
  if (column < columns) columns_of(Count<1>{}, column);
}

// Scores of one query against a block become weights. seen: how many of its slots the query may look at.
template <class T>
MAGICDEC_INLINE void weigh(float* scores, int seen, float scale, Running state, int row, int head_dim, T* weights) {
  f32x16 s[SLOTS / LANES], most = splat(NOTHING);
  for (int i = 0; i < SLOTS / LANES; i++) {
    s[i] = load<f32x16>(scores + i * LANES) * scale;
    if (seen < (i + 1) * LANES) {
      const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      s[i] = select(lane < seen - i * LANES, s[i], splat(NOTHING));
    }
    most = maximum(most, s[i]);
  }
  const float before = state.most[row], now = std::max(before, largest(most));
  f32x16 total{};
  for (int i = 0; i < SLOTS / LANES; i++) {
    store_floats(weights + i * LANES, exp2_falling(s[i] - now));
    total += load_floats(weights + i * LANES);  // as they will be multiplied: rounded
  }
  state.most[row] = now;
  if (now == before) {
    state.total[row] += sum(total);
    return;
  }
  const float shrink = exp2_of(before - now);
  state.total[row] = state.total[row] * shrink + sum(total);
  float* o = state.o + size_t(row) * head_dim;
  for (int d = 0; d < head_dim; d += LANES) store(o + d, load<f32x16>(o + d) * shrink);
}

// -- pieces of work ---------------------------------------------------------------------------------------------------

// Queries [query, query + queries) of a row, for KV heads [head, head_end), over slots [first, last) of its list.
struct Piece {
  int row, query, queries, head, head_end;
  int64_t first, last;
  float* partial;  // where the softmax of this segment goes; null: the piece is all there is of its queries
};

// How a row's work is cut. Rows of few queries: by segment, all heads together. Others: by query and head.
struct Cut {
  int group;    // query heads per KV head
  int queries;  // of one piece
  bool tall;
  int64_t segments;

  Cut(const AttentionArgs& args, int row) {
    group = args.heads / args.kv_heads;
    const int64_t n = args.queries[row];
    tall = n * group > TALL;
    queries = tall ? std::max(1, TALL * 3 / group) : int(n);
    segments = (args.lengths[row] + SEGMENT - 1) / SEGMENT;
  }
  // Floats of all partial results of the row.
  size_t partials(const AttentionArgs& args, int row) const {
    if (tall || segments == 1) return 0;
    return segments * Running::floats(int(args.queries[row]) * args.heads, args.head_dim);
  }
};

// Memory of one thread.
struct Workspace {
  uint32_t *q, *keys, *values;
  float *scores, *weights, *segment, *all, *staged;

  static size_t floats(const AttentionArgs& args) {
    const size_t rows = most_rows(args);
    return rows * args.head_dim + 4 * size_t(SLOTS) * args.head_dim + 2 * rows * SLOTS +
           2 * Running::floats(int(rows), args.head_dim) + 8 * LANES;
  }
  // Query rows of a piece, all its heads.
  static size_t most_rows(const AttentionArgs& args) {
    const int group = args.heads / args.kv_heads;
    return std::max({TALL * args.kv_heads, std::max(1, TALL * 3 / group) * group, args.heads});
  }
  Workspace(float* memory, const AttentionArgs& args) {
    const size_t rows = most_rows(args);
    const auto take = [&](size_t floats) {
      float* taken = memory;
      memory += (floats + LANES - 1) / LANES * LANES;
      return taken;
    };
    q = reinterpret_cast<uint32_t*>(take(rows * args.head_dim));
    keys = reinterpret_cast<uint32_t*>(take(size_t(SLOTS) * args.head_dim));
    values = reinterpret_cast<uint32_t*>(take(size_t(SLOTS) * args.head_dim));
    scores = take(rows * SLOTS);
    weights = take(rows * SLOTS);
    segment = take(Running::floats(int(rows), args.head_dim));
    all = take(Running::floats(int(rows), args.head_dim));
    staged = take(2 * size_t(SLOTS) * args.head_dim);
  }
};

template <class T>
void finish_queries(const AttentionArgs& args, int64_t token, int queries, int head, int group, Running state, int at) {
  for (int i = 0; i < queries; i++) {
    for (int g = 0; g < group; g++) {
      const int row = at + i * group + g;
      const size_t place = size_t(token + i) * args.heads + head * group + g;
      const float inverse = 1.0f / state.total[row];
      T* out = static_cast<T*>(args.out) + place * args.head_dim;
      for (int d = 0; d < args.head_dim; d += LANES)
        store_floats(out + d, load<f32x16>(state.o + size_t(row) * args.head_dim + d) * inverse);
      if (args.lse) args.lse[place] = (state.most[row] + logarithm(splat(state.total[row]))[0] * 1.44269504f) * 0.69314718f;
    }
  }
}

template <class T>
void attend(const AttentionArgs& args, const Piece& piece, int64_t first_token, const Workspace& space) {
  using Dot = typename DotOf<T>::type;
  const int group = args.heads / args.kv_heads, head_dim = args.head_dim, words = head_dim / Dot::ELEMENTS;
  const int rows = piece.queries * group;  // of one KV head
  const int heads = piece.head_end - piece.head;
  const int64_t token = first_token + piece.query;
  const float scale = args.scale * 1.44269504f;

  // Query rows of a KV head, together: [heads][queries][group].
  for (int h = 0; h < heads; h++)
    for (int i = 0; i < piece.queries; i++)
      std::memcpy(space.q + (size_t(h) * rows + size_t(i) * group) * words,
                  static_cast<const T*>(args.q) + (token + i) * args.q_stride + size_t(piece.head + h) * group * head_dim,
                  size_t(group) * head_dim * sizeof(T));

  // What a query sees of the row's list: up to its own slot.
  const int64_t seen = args.lengths[piece.row] - args.queries[piece.row] + piece.query + 1;
  float* memory = piece.partial ? piece.partial : space.segment;
  const Running state = Running::at(memory, rows * heads);
  const bool whole = piece.first == 0 && piece.last - piece.first <= SEGMENT && !piece.partial;
  const Running all = Running::at(space.all, rows * heads);
  if (!piece.partial && !whole) all.clear(rows * heads, head_dim);

  const int64_t* lists = args.pages + piece.row * args.row_stride;
  for (int64_t segment = piece.first; segment < piece.last; segment += SEGMENT) {
    const int64_t segment_end = std::min(piece.last, segment + SEGMENT);
    state.clear(rows * heads, head_dim);
    for (int64_t start = segment; start < segment_end; start += SLOTS) {
      for (int h = 0; h < heads; h++) {
        const int64_t* list = lists + (piece.head + h) * args.head_stride;
        const Block<T> block = find_block(args, list, piece.head + h, start, segment_end, reinterpret_cast<T*>(space.staged));
        const Block<T> next = next_block(args, list, piece.head + h, start, args.lengths[piece.row], block);
        const uint32_t* q = space.q + size_t(h) * rows * words;
        T* weights = reinterpret_cast<T*>(space.weights);
        float* o = state.o + size_t(h) * rows * head_dim;
        const auto weigh_all = [&] {
          for (int row = 0; row < rows; row++) {
            const int64_t visible = std::min<int64_t>(seen + row / group - start, SLOTS);
            if (visible > 0)
              weigh(space.scores + row * SLOTS, int(visible), scale, state, h * rows + row, head_dim, weights + row * SLOTS);
            else
              std::memset(weights + row * SLOTS, 0, SLOTS * sizeof(T));
          }
        };
        if (rows <= FEW) {
          with_rows<std::max(FEW, 1)>(rows, [&](auto count) {
            constexpr int M = decltype(count)::value;
            score_few<T, M>(block, next, head_dim, q, space.scores);
            weigh_all();
            mix_few<T, M>(block, next, head_dim, weights, o);
          });
          continue;
        }
        pack_keys(block, next, head_dim, space.keys);
        pack_values(block, next, head_dim, space.values);
        product<Dot, false>(q, words, space.keys, words, space.scores, SLOTS, rows, SLOTS);
        weigh_all();
        product<Dot, true>(reinterpret_cast<const uint32_t*>(weights), SLOTS / Dot::ELEMENTS, space.values,
                           SLOTS / Dot::ELEMENTS, o, head_dim, rows, head_dim);
      }
    }
    if (!piece.partial && !whole)
      for (int row = 0; row < rows * heads; row++) merge(all, row, state, row, head_dim);
  }
  if (piece.partial) return;
  for (int h = 0; h < heads; h++)
    finish_queries<T>(args, token, piece.queries, piece.head + h, group, whole ? state : all, h * rows);
}

// -- all rows ---------------------------------------------------------------------------------------------------------

inline int64_t count_pieces(const AttentionArgs& args) {
  int64_t pieces = 0;
  for (int row = 0; row < args.rows; row++) {
    const Cut cut(args, row);
    pieces += cut.tall ? (args.queries[row] + cut.queries - 1) / cut.queries * args.kv_heads : cut.segments;
  }
  return pieces;
}

inline size_t attention_scratch(const AttentionArgs& args) {
  size_t floats = Workspace::floats(args) * omp_get_max_threads();
  for (int row = 0; row < args.rows; row++) floats += Cut(args, row).partials(args, row) + LANES;
  return to_whole_lines(floats * sizeof(float)) + to_whole_lines(count_pieces(args) * sizeof(Piece)) +
         to_whole_lines(args.rows * (sizeof(int64_t) + sizeof(float*)));
}

template <class T>
void attention(const AttentionArgs& args) {
  char* memory = static_cast<char*>(args.scratch);
  auto* pieces = reinterpret_cast<Piece*>(memory);
  memory += to_whole_lines(count_pieces(args) * sizeof(Piece));
  auto* tokens = reinterpret_cast<int64_t*>(memory);
  auto** partials = reinterpret_cast<float**>(tokens + args.rows);
  memory += to_whole_lines(args.rows * (sizeof(int64_t) + sizeof(float*)));
  auto* floats = reinterpret_cast<float*>(memory);

  int64_t count = 0, token = 0;
  for (int row = 0; row < args.rows; row++) {
    const Cut cut(args, row);
    const int64_t n = args.queries[row], length = args.lengths[row];
    tokens[row] = token;
    token += n;
    partials[row] = nullptr;
    if (cut.tall) {
      // The last queries see most: they go first.
      for (int64_t query = (n - 1) / cut.queries * cut.queries; query >= 0; query -= cut.queries) {
        const int queries = int(std::min<int64_t>(cut.queries, n - query));
        for (int head = 0; head < args.kv_heads; head++)
          pieces[count++] = {row, int(query), queries, head, head + 1, 0, length - n + query + queries, nullptr};
      }
    } else if (cut.segments == 1) {
      pieces[count++] = {row, 0, int(n), 0, args.kv_heads, 0, length, nullptr};
    } else {
      const size_t size = Running::floats(int(n) * args.heads, args.head_dim);
      partials[row] = floats;
      for (int64_t first = 0; first < length; first += SEGMENT, floats += size)
        pieces[count++] = {row, 0, int(n), 0, args.kv_heads, first, std::min(length, first + SEGMENT), floats};
      floats += (LANES - cut.partials(args, row) % LANES) % LANES;
    }
  }

  std::atomic<int64_t> next{0};
  const int threads = int(std::min<int64_t>(omp_get_max_threads(), count));
#pragma omp parallel num_threads(threads)
  {
    const Workspace space(floats + Workspace::floats(args) * omp_get_thread_num(), args);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      attend<T>(args, pieces[i], tokens[pieces[i].row], space);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int row = 0; row < args.rows; row++) {
      if (partials[row] == nullptr) continue;
      const Cut cut(args, row);
      const int rows = cut.queries * cut.group;  // of one KV head
      const size_t size = Running::floats(cut.queries * args.heads, args.head_dim);
      const Running all = Running::at(space.all, rows);
      for (int head = 0; head < args.kv_heads; head++) {
        all.clear(rows, args.head_dim);
        for (int64_t segment = 0; segment < cut.segments; segment++) {
          const Running part = Running::at(partials[row] + segment * size, cut.queries * args.heads);
          for (int i = 0; i < rows; i++) merge(all, i, part, head * rows + i, args.head_dim);
        }
        finish_queries<T>(args, tokens[row], cut.queries, head, cut.group, all, 0);
      }
    }
  }
}

}  // namespace magicdec
