// Attention by pieces of work (attention_cut.h), which go to different threads, and the combination of their results.
//
// A Method computes one piece (attention_vectors.h, attention_amx.h). It has
//   Element  type of queries, keys, values and results
//   Space    scratch memory of one thread: floats(args), a constructor, `all`, a Running of max_rows(args) rows, and
//            voter_of, integers for as many queries
//   attend(args, division, votes, piece, space)
#pragma once

#include "attention_votes.h"
#include "team.h"

namespace magicdec {

// Returns the block that is read args.fetch_blocks after `block`: KV heads follow each other, and after the last one the
// first at the next slots. Returns `block` if there is none, or if pages are too small to be prefetched.
template <class T>
MAGICDEC_INLINE Block<T> block_after(const AttentionArgs& args, const Piece& piece, int head, int64_t start, const Block<T>& block) {
  const int heads = piece.head_end - piece.head, ahead = head - piece.head + args.fetch_blocks;
  const int then = piece.head + ahead % heads;
  const int64_t next = start + ahead / heads * SLOTS, end = args.lengths[piece.row];
  if (next + SLOTS > end || args.page_size % LANES != 0) return block;
  return find_block<T>(args, args.pages + piece.row * args.row_stride + then * args.head_stride, then, next, next, end, nullptr);
}

// The same for records: none if that block is not sealed.
MAGICDEC_INLINE Records records_after(const AttentionArgs& args, const Piece& piece, int head, int64_t start) {
  const int heads = piece.head_end - piece.head, ahead = head - piece.head + args.fetch_blocks;
  const int then = piece.head + ahead % heads;
  const int64_t next = start + ahead / heads * SLOTS;
  if (next >= args.lengths[piece.row]) return {};
  return find_records(args, args.pages + piece.row * args.row_stride + then * args.head_stride, then, next);
}

// Writes the results of queries: o and the natural log-sum-exp, with the sinks of their heads.
template <class T>
void finish_queries(const AttentionArgs& args, int64_t token, int queries, int head, int group, Running state, int at) {
  for (int i = 0; i < queries; i++) {
    for (int g = 0; g < group; g++) {
      const int row = at + i * group + g;
      const size_t place = size_t(token + i) * args.heads + head * group + g;
      float peak = state.peak[row], total = sum(load<f32x16>(state.total + row * LANES)), inverse = 1.0f / total;
      if (args.sinks) {
        const float sink = args.sinks[head * group + g] * 1.44269504f, top = std::max(peak, sink), kept = exp2_of(peak - top);
        peak = top;
        total = total * kept + exp2_of(sink - top);
        inverse = kept / total;
      }
      T* out = static_cast<T*>(args.out) + place * args.head_dim;
      for (int d = 0; d < args.head_dim; d += LANES)
        store_floats(out + d, load<f32x16>(state.o + size_t(row) * args.head_dim + d) * inverse);
      args.lse[place] = (peak + logarithm(splat(total))[0] * 1.44269504f) * 0.69314718f;
    }
  }
}

// Copies the results of a segment that rows share to the partial results of each. at: row of `state` that is the first of
// KV head piece.head + h; those of each row follow each other.
inline void deliver(const AttentionArgs& args, const Division& division, const Piece& piece, int h, Running state, int at) {
  const int group = args.heads / args.kv_heads, head = piece.head + h;
  const size_t head_dim = args.head_dim;
  division.for_members(piece, [&](int row, int query, int64_t, int queries) {
    const Running part = division.partial(row, piece.first / SEGMENT);
    const size_t from = at + query * group, to = size_t(head) * queries * group, count = size_t(queries) * group;
    std::copy_n(state.peak + from, count, part.peak + to);
    std::copy_n(state.total + from * LANES, count * LANES, part.total + to * LANES);
    std::copy_n(state.o + from * head_dim, count * head_dim, part.o + to * head_dim);
  });
}

// -- all rows ---------------------------------------------------------------------------------------------------------

template <class Method>
size_t pieces_scratch(const AttentionArgs& args) {
  return to_whole_lines(Division::bytes(args)) + Votes<typename Method::Element>::bytes(args) +
         Method::Space::floats(args) * args.team.threads * sizeof(float);
}

// Combines the results of a row's pieces. all: see Method.
template <class T>
void finish_row(const AttentionArgs& args, const Division& division, const Votes<T>& votes, int row, float* all) {
  const Cut cut(args, row);
  const int rows = cut.queries * cut.group;  // per KV head
  const Running total = Running::at(all, rows);
  for (int head = 0; cut.by_segment() && head < args.kv_heads; head++) {
    total.clear(rows, args.head_dim);
    for (int64_t segment = 0; segment < cut.segments; segment++) {
      const Running part = division.partial(row, cut.first_segment + segment);
      for (int i = 0; i < rows; i++) merge(total, i, part, head * rows + i, args.head_dim);
    }
    finish_queries<T>(args, division.first_token(row), cut.queries, head, cut.group, total, 0);
  }
  votes.count(division, row);
}

// Results of a row are combined by the thread that ends the last of its pieces, while they are in its caches.
template <class Method>
void attend_pieces(const AttentionArgs& args) {
  using T = typename Method::Element;
  using Space = typename Method::Space;
  char* memory = static_cast<char*>(args.scratch);
  const Division division(args, memory);
  memory += to_whole_lines(Division::bytes(args));
  const Votes<T> votes(args, memory);
  auto* floats = reinterpret_cast<float*>(memory + votes.bytes(args));
  for_pieces(args.team, division.count, [&](int64_t i, int thread) {
    const Piece& piece = division.pieces[i];
    const Space space(floats + Space::floats(args) * thread, args);
    division.for_members(piece, [&](int row, int, int64_t, int) { votes.make_room(row, thread); });
    Method::attend(args, division, votes, piece, space);
    division.for_members(piece, [&](int row, int, int64_t, int) {
      if (division.done(row)) finish_row(args, division, votes, row, space.all);
    });
  });
}

}  // namespace magicdec
