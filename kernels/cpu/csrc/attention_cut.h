// Division of attention into pieces of work, which go to different threads.
//
// Rows of few queries are cut by segment. A segment that several of them list identically, and that all of their queries
// see completely, becomes pieces with the queries of all these rows, so that its keys and values are read once
// (bifurcated attention, arXiv 2403.08845). Rows share from their first segment on, and may part at any later one.
#pragma once

#include <utility>

#include "attention_block.h"

namespace magicdec {

constexpr int SEGMENT = 1024;  // slots per piece of work
constexpr int TALL = 64;       // largest product of queries and heads per group for which a row is cut by segment
constexpr int WIDE = 3 * TALL;  // largest product of other pieces

// Queries of a row, or of several, for KV heads [head, head_end), over slots [first, last) of the row's list.
struct Piece {
  int row, query, queries, head, head_end;  // query: the first one, of the row
  int64_t first, last;
  int64_t seen;        // number of slots that the first query would see without a window; the next would see one more
  bool part;           // one segment of rows that are cut by segment; else all slots of its queries
  const int* members;  // rows that share the segment, `row` being one, which list it identically; null: none but `row`
  int count;           // of members
};

// Returns how many of `rows` query rows of a KV head are one piece, so that each thread has about `pieces` pieces if there
// are `others` such sets of rows. Small pieces read keys and values more often.
inline int64_t piece_rows(const AttentionArgs& args, int64_t rows, int64_t others, int pieces) {
  return std::clamp<int64_t>(rows * others / (pieces * args.team.threads), TALL, WIDE);
}

// Division of a row's work. Rows of few queries are cut by segment, all heads together; others by query and head.
struct Cut {
  int group;    // query heads per KV head
  int queries;  // per piece
  bool tall;
  int64_t first_segment, segments;  // the first one that a query sees; number of segments from it on

  Cut(const AttentionArgs& args, int row) {
    group = args.heads / args.kv_heads;
    const int64_t n = args.queries[row];
    tall = n * group > TALL;
    queries = int(n);
    if (tall) queries = std::max(1, int(piece_rows(args, n * group, args.rows * args.kv_heads, 4)) / group);
    first_segment = first_seen(args, args.lengths[row] - n + 1) / SEGMENT;
    segments = (args.lengths[row] + SEGMENT - 1) / SEGMENT - first_segment;
  }
  bool by_segment() const { return !tall && segments > 1; }
  // Number of floats of the partial results of one segment.
  size_t partial(const AttentionArgs& args) const { return Running::floats(queries * args.heads, args.head_dim); }
  // Number of floats of all partial results of the row.
  size_t partials(const AttentionArgs& args) const { return by_segment() ? segments * partial(args) : 0; }
};

// Largest number of query rows of a piece, over all its heads.
inline size_t max_rows(const AttentionArgs& args) {
  const int group = args.heads / args.kv_heads;
  return std::max({TALL * args.kv_heads, std::max(1, WIDE / group) * group, args.heads});
}

// The pieces of all rows, in memory of bytes(args), 64-byte aligned.
class Division {
 public:
  int64_t count = 0;
  Piece* pieces;

  static size_t bytes(const AttentionArgs& args) {
    size_t floats = 0;
    for (int row = 0; row < args.rows; row++) floats += Cut(args, row).partials(args);
    const Limits limits(args);
    return to_whole_lines(limits.pieces * sizeof(Piece)) + to_whole_lines(args.rows * sizeof(Row)) +
           to_whole_lines((args.rows + limits.members) * sizeof(int)) + floats * sizeof(float);
  }

  Division(const AttentionArgs& args, char* memory) : args_(args) {
    const Limits limits(args);
    const auto take = [&](size_t bytes) { return std::exchange(memory, memory + to_whole_lines(bytes)); };
    pieces = reinterpret_cast<Piece*>(take(limits.pieces * sizeof(Piece)));
    rows_ = reinterpret_cast<Row*>(take(args.rows * sizeof(Row)));
    int* candidates = reinterpret_cast<int*>(take((args.rows + limits.members) * sizeof(int)));
    members_ = candidates + args.rows;
    auto* floats = reinterpret_cast<float*>(memory);
    int64_t token = 0;
    int found = 0;
    for (int row = 0; row < args.rows; row++) {
      const Cut cut(args, row);
      rows_[row] = {token, floats, 0, 0};
      token += args.queries[row];
      floats += cut.partials(args);
      if (cut.by_segment() && args.head_stride == 0 && args.window == 0) candidates[found++] = row;
    }
    add_shared(candidates, found, 0);
    for (int row = 0; row < args.rows; row++) add_own(row);
    for (int64_t i = 0; i < count; i++) for_members(pieces[i], [&](int row, int, int64_t, int) { rows_[row].left++; });
  }

  // Notes that one more piece of a row is done, and returns whether all are.
  bool done(int row) const { return __atomic_sub_fetch(&rows_[row].left, 1, __ATOMIC_ACQ_REL) == 0; }

  // Result of a segment of a row that is cut by segment: [heads][queries], or rather [kv_heads][queries][group].
  Running partial(int row, int64_t segment) const {
    const Cut cut(args_, row);
    return Running::at(rows_[row].partials + (segment - cut.first_segment) * cut.partial(args_), cut.queries * args_.heads);
  }

  int64_t first_token(int row) const { return rows_[row].token; }

  // Calls f(row, query, token, queries) for each row of a piece. query: number of the piece's query that is the first of
  // this row's; token: of that query.
  template <class F>
  void for_members(const Piece& piece, F&& f) const {
    if (!piece.members) return f(piece.row, 0, rows_[piece.row].token + piece.query, piece.queries);
    for (int i = 0, query = 0; i < piece.count; i++) {
      const int row = piece.members[i], queries = int(args_.queries[row]);
      f(row, query, rows_[row].token, queries);
      query += queries;
    }
  }

 private:
  struct Row {
    int64_t token;  // of its first query
    float* partials;
    int64_t shared;  // number of segments, from the first on, that are in pieces of several rows
    int64_t left;    // number of pieces that are not done yet
  };

  // Largest numbers of pieces, and of rows in the lists of members.
  struct Limits {
    size_t pieces = 0, members = 0;
    explicit Limits(const AttentionArgs& args) {
      for (int row = 0; row < args.rows; row++) {
        const Cut cut(args, row);
        if (cut.tall)
          pieces += (args.queries[row] + cut.queries - 1) / cut.queries * args.kv_heads;
        else
          pieces += cut.segments * args.kv_heads, members += cut.segments;
      }
    }
  };

  void add_own(int row) {
    const Cut cut(args_, row);
    const int64_t n = args_.queries[row], length = args_.lengths[row], seen = length - n + 1;
    if (cut.tall) {
      // The last queries see the most slots, so they go first.
      for (int64_t query = (n - 1) / cut.queries * cut.queries; query >= 0; query -= cut.queries) {
        const int queries = int(std::min<int64_t>(cut.queries, n - query));
        const int64_t first = first_seen(args_, seen + query) / SEGMENT * SEGMENT;
        for (int head = 0; head < args_.kv_heads; head++)
          pieces[count++] = {row, int(query), queries, head, head + 1, first, seen + query + queries - 1, seen + query, false, nullptr, 0};
      }
      return;
    }
    for (int64_t first = (cut.first_segment + rows_[row].shared) * SEGMENT; first < length; first += SEGMENT)
      pieces[count++] = {row, 0, int(n), 0, args_.kv_heads, first, std::min(length, first + SEGMENT), seen, cut.segments > 1, nullptr, 0};
  }

  const int64_t* pages_of(int row, int64_t segment) const {
    return args_.pages + row * args_.row_stride + segment * SEGMENT / args_.page_size;
  }

  // Adds pieces of the segment for all sets of rows that list it identically, and of the segments after it. rows: those
  // that share all segments before; reordered.
  void add_shared(int* rows, int count, int64_t segment) {
    const int64_t end = (segment + 1) * SEGMENT;
    int* const all = std::partition(rows, rows + count, [&](int row) { return args_.lengths[row] - args_.queries[row] + 1 >= end; });
    if (all - rows < 2) return;
    std::sort(rows, all, [&](int a, int b) {
      const int64_t of_a = *pages_of(a, segment), of_b = *pages_of(b, segment);
      return of_a != of_b ? of_a < of_b : a < b;
    });
    const size_t bytes = ((end - 1) / args_.page_size - segment * SEGMENT / args_.page_size + 1) * sizeof(int64_t);
    while (rows < all) {
      const int64_t* pages = pages_of(*rows, segment);
      int* next = rows + 1;  // first row with another first page
      while (next < all && *pages_of(*next, segment) == *pages) next++;
      int* same = std::partition(rows + 1, next, [&](int row) { return std::memcmp(pages_of(row, segment), pages, bytes) == 0; });
      if (same - rows > 1) {
        add_pieces(rows, int(same - rows), segment);
        add_shared(rows, int(same - rows), segment + 1);
      }
      rows = same;
    }
  }

  // Adds the pieces of a segment that all of these rows list.
  void add_pieces(const int* rows, int rows_count, int64_t segment) {
    const int group = args_.heads / args_.kv_heads;
    int64_t all = 0;
    for (int i = 0; i < rows_count; i++) all += args_.queries[rows[i]] * group;
    const int64_t most = piece_rows(args_, all, Cut(args_, *rows).segments * args_.kv_heads, 1);
    const int* end = std::copy(rows, rows + rows_count, members_);
    while (members_ < end) {
      Piece piece{*members_, 0, 0, 0, args_.kv_heads, segment * SEGMENT, (segment + 1) * SEGMENT, (segment + 1) * SEGMENT, true, members_, 0};
      for (; members_ < end && (piece.queries + args_.queries[*members_]) * group <= most; members_++, piece.count++) {
        piece.queries += int(args_.queries[*members_]);
        rows_[*members_].shared = segment + 1;
      }
      for (int head = 0; head < args_.kv_heads; head++) {
        piece.head = head, piece.head_end = head + 1;
        pieces[count++] = piece;
      }
    }
  }

  const AttentionArgs& args_;
  Row* rows_;
  int* members_;  // end of the lists of members
};

}  // namespace magicdec
