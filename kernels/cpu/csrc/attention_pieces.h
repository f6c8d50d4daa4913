// Division of attention into pieces of work, which go to different threads, and the combination of their results.
//
// A Method computes one piece (attention_vectors.h, attention_amx.h). It has
//   Element  type of queries, keys, values and results
//   Space    scratch memory of one thread: floats(args), a constructor, and `all`, a Running of max_rows(args) rows
//   attend(args, piece, first_token, space)
#pragma once

#include "attention_block.h"
#include "team.h"

namespace magicdec {

constexpr int SEGMENT = 1024;  // slots per piece of work
constexpr int TALL = 64;       // largest product of queries and heads per group for which a row is cut by segment

// Queries [query, query + queries) of a row, for KV heads [head, head_end), over slots [first, last) of its list.
struct Piece {
  int row, query, queries, head, head_end;
  int64_t first, last;
  float* partial;  // destination of this segment's softmax; null: the piece covers all slots of its queries
};

// Returns the block that is read args.fetch_blocks after `block`: KV heads follow each other, and after the last one the
// first at the next slots. Returns `block` if there is none, or if pages are too small to be prefetched.
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

// Largest number of query rows of a piece, over all its heads.
inline size_t max_rows(const AttentionArgs& args) {
  const int group = args.heads / args.kv_heads;
  return std::max({TALL * args.kv_heads, std::max(1, TALL * 3 / group) * group, args.heads});
}

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

// -- all rows ---------------------------------------------------------------------------------------------------------

inline int64_t count_pieces(const AttentionArgs& args) {
  int64_t pieces = 0;
  for (int row = 0; row < args.rows; row++) {
    const Cut cut(args, row);
    pieces += cut.tall ? (args.queries[row] + cut.queries - 1) / cut.queries * args.kv_heads : cut.segments;
  }
  return pieces;
}

template <class Method>
size_t pieces_scratch(const AttentionArgs& args) {
  size_t floats = Method::Space::floats(args) * args.team.threads;
  for (int row = 0; row < args.rows; row++) floats += Cut(args, row).partials(args, row) + LANES;
  return to_whole_lines(floats * sizeof(float)) + to_whole_lines(count_pieces(args) * sizeof(Piece)) +
         to_whole_lines(args.rows * (sizeof(int64_t) + sizeof(float*)));
}

template <class Method>
void attend_pieces(const AttentionArgs& args) {
  using Space = typename Method::Space;
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

  const auto space_of = [&](int thread) { return Space(floats + Space::floats(args) * thread, args); };
  for_pieces(args.team, count, [&](int64_t i, int thread) {
    Method::attend(args, pieces[i], tokens[pieces[i].row], space_of(thread));
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
      finish_queries<typename Method::Element>(args, tokens[row], cut.queries, head, cut.group, all, 0);
    }
  });
}

}  // namespace magicdec
