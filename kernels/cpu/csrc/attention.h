// Attention of ragged queries over paged keys and values.
//
// A row's slots are cut into segments of SEGMENT slots, and these into blocks of SLOTS, both counted from the first
// slot of the row's page list. A block's keys and values are packed for `tile` once and then multiplied with all
// queries of the row, of all heads that share them: two small matrix products with a softmax between. Within a segment
// the softmax is computed online (Milakov & Gimelshein, arXiv 1805.02867). Segments, which may go to different threads,
// are merged in ascending order.
//
// A query's result therefore depends on its own slots alone, not on other queries, other rows, or the number of
// threads. Slots that a query must not see get a weight of exactly zero.
#pragma once

#include <type_traits>

#include "attention_block.h"
#include "team.h"

namespace magicdec {

constexpr int SEGMENT = 1024;  // slots per piece of work
constexpr int TALL = 64;       // largest product of queries and heads per group for which a row is cut by segment

// Largest number of query rows for which a block is read in place, without packing. D: see attend.
template <class T, int D>
constexpr int few() {
#if defined(__AVX512F__)
  return D > 0 ? 15 : 6;  // each number is compiled separately, so only the usual heads have all
#elif defined(MAGICDEC_AVX2)
  return 6;  // their sums fit the registers
#else
  return 0;
#endif
}

// -- pieces of work ---------------------------------------------------------------------------------------------------

// Queries [query, query + queries) of a row, for KV heads [head, head_end), over slots [first, last) of its list.
struct Piece {
  int row, query, queries, head, head_end;
  int64_t first, last;
  float* partial;  // destination of this segment's softmax; null: the piece covers all slots of its queries
};

// Returns the block that is read args.fetch_blocks after `block`: KV heads follow each other, and after the last one the first at
// the next slots. Returns `block` if there is none, or if pages are too small to be prefetched.
template <class T>
MAGICDEC_INLINE Block<T> block_after(const AttentionArgs& args, const Piece& piece, int head, int64_t start, const Block<T>& block) {
  const int heads = piece.head_end - piece.head, ahead = head - piece.head + args.fetch_blocks;
  const int then = piece.head + ahead % heads;
  const int64_t next = start + ahead / heads * SLOTS, end = args.lengths[piece.row];
  if (next + SLOTS > end || args.page_size % LANES != 0) return block;
  return find_block<T>(args, args.pages + piece.row * args.row_stride + then * args.head_stride, then, next, end, nullptr);
}

// Division of a row's work. Rows of few queries are cut by segment, all heads together; others by query and head.
struct Cut {
  int group;    // query heads per KV head
  int queries;  // per piece
  bool tall;
  int64_t segments;

  Cut(const AttentionArgs& args, int row) {
    group = args.heads / args.kv_heads;
    const int64_t n = args.queries[row];
    tall = n * group > TALL;
    queries = tall ? std::max(1, TALL * 3 / group) : int(n);
    segments = (args.lengths[row] + SEGMENT - 1) / SEGMENT;
  }
  // Number of floats of all partial results of the row.
  size_t partials(const AttentionArgs& args, int row) const {
    if (tall || segments == 1) return 0;
    return segments * Running::floats(int(args.queries[row]) * args.heads, args.head_dim);
  }
};

// Scratch memory of one thread.
struct Workspace {
  uint32_t *q, *keys, *values;
  float *scores, *weights, *segment, *all, *staged;

  static size_t floats(const AttentionArgs& args) {
    const size_t rows = max_rows(args);
    return rows * args.head_dim + 4 * size_t(SLOTS) * args.head_dim + 2 * rows * SLOTS +
           2 * Running::floats(int(rows), args.head_dim) + 8 * LANES;
  }
  // Largest number of query rows of a piece, over all its heads.
  static size_t max_rows(const AttentionArgs& args) {
    const int group = args.heads / args.kv_heads;
    return std::max({TALL * args.kv_heads, std::max(1, TALL * 3 / group) * group, args.heads});
  }
  Workspace(float* memory, const AttentionArgs& args) {
    const size_t rows = max_rows(args);
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
      const float total = sum(load<f32x16>(state.total + row * LANES)), inverse = 1.0f / total;
      T* out = static_cast<T*>(args.out) + place * args.head_dim;
      for (int d = 0; d < args.head_dim; d += LANES)
        store_floats(out + d, load<f32x16>(state.o + size_t(row) * args.head_dim + d) * inverse);
      args.lse[place] = (state.peak[row] + logarithm(splat(total))[0] * 1.44269504f) * 0.69314718f;
    }
  }
}

// Computes one piece. D: head_dim if it is known at compile time, else 0.
template <class T, int D>
void attend(const AttentionArgs& args, const Piece& piece, int64_t first_token, const Workspace& space) {
  using Dot = typename DotOf<T>::type;
  constexpr int FEW = few<T, D>();
  const int group = args.heads / args.kv_heads, head_dim = D > 0 ? D : args.head_dim, words = head_dim / Dot::ELEMENTS;
  const int rows = piece.queries * group;  // per KV head
  const int heads = piece.head_end - piece.head;
  const int64_t token = first_token + piece.query;
  const float scale = args.scale * 1.44269504f;

  // Gather the query rows of each KV head: [heads][queries][group].
  for (int h = 0; h < heads; h++)
    for (int i = 0; i < piece.queries; i++)
      std::memcpy(space.q + (size_t(h) * rows + size_t(i) * group) * words,
                  static_cast<const T*>(args.q) + (token + i) * args.q_stride + size_t(piece.head + h) * group * head_dim,
                  size_t(group) * head_dim * sizeof(T));

  // Slots of the row's list that the first query sees: up to its own.
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
        const Block<T> next = block_after(args, piece, piece.head + h, start, block);
        const uint32_t* q = space.q + size_t(h) * rows * words;
        T* weights = reinterpret_cast<T*>(space.weights);
        float* o = state.o + size_t(h) * rows * head_dim;
        const auto weigh_all = [&] {
          for (int row = 0; row < rows; row++) {
            if (rows > FEW && row < 2 * LANES) next.fetch(2 * 3 + row / LANES, row % LANES, 1, head_dim);
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
        product<Dot, false>(q, words, space.keys, words, space.scores, SLOTS, rows, SLOTS,
                             [&](int i) { next.fetch(2 + i / LANES, i % LANES, 1, head_dim); });
        weigh_all();
        product<Dot, true>(reinterpret_cast<const uint32_t*>(weights), SLOTS / Dot::ELEMENTS, space.values,
                           SLOTS / Dot::ELEMENTS, o, head_dim, rows, head_dim, [](int) {});
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
  size_t floats = Workspace::floats(args) * args.team.threads;
  for (int row = 0; row < args.rows; row++) floats += Cut(args, row).partials(args, row) + LANES;
  return to_whole_lines(floats * sizeof(float)) + to_whole_lines(count_pieces(args) * sizeof(Piece)) +
         to_whole_lines(args.rows * (sizeof(int64_t) + sizeof(float*)));
}

template <class T, int D>
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
      // The last queries see the most slots, so they go first.
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

  const auto space_of = [&](int thread) { return Workspace(floats + Workspace::floats(args) * thread, args); };
  for_pieces(args.team, count, [&](int64_t i, int thread) {
    attend<T, D>(args, pieces[i], tokens[pieces[i].row], space_of(thread));
  });
  for_pieces(args.team, args.rows, [&](int64_t row, int thread) {
    if (partials[row] == nullptr) return;
    const Cut cut(args, int(row));
    const int rows = cut.queries * cut.group;  // per KV head
    const size_t size = Running::floats(cut.queries * args.heads, args.head_dim);
    const Running all = Running::at(space_of(thread).all, rows);
    for (int head = 0; head < args.kv_heads; head++) {
      all.clear(rows, args.head_dim);
      for (int64_t segment = 0; segment < cut.segments; segment++) {
        const Running part = Running::at(partials[row] + segment * size, cut.queries * args.heads);
        for (int i = 0; i < rows; i++) merge(all, i, part, head * rows + i, args.head_dim);
      }
      finish_queries<T>(args, tokens[row], cut.queries, head, cut.group, all, 0);
    }
  });
}

template <class T>
void attention(const AttentionArgs& args) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (args.head_dim == 64) return attention<T, 64>(args);
    if (args.head_dim == 128) return attention<T, 128>(args);
  }
  attention<T, 0>(args);
}

}  // namespace magicdec
