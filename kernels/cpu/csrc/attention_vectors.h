// Attention by vectors, for all types and instruction sets.
//
// A block's keys and values are packed for `tile` once and then multiplied with all queries of the piece that share them, a
// few rows at a time: two small matrix products with a softmax between. Few queries read a block in place.
#pragma once

#include "attention_pieces.h"

namespace magicdec {

// Largest number of query rows that are multiplied with a block in place at a time, without packing. D: see attend.
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

// Largest number of query rows for which a block is not packed.
template <class T, int D>
constexpr int in_place() {
#if defined(__AVX512F__)
  return few<T, D>();
#else
  return D > 0 ? 2 * few<T, D>() : few<T, D>();  // to transpose keys twice costs less than to store them
#endif
}

constexpr int AT_ONCE = 16;  // query rows that have scores and weights at the same time, at most

// Scratch memory of one thread.
struct Workspace {
  uint32_t *q, *keys, *values;
  float *scores, *weights, *segment, *all, *staged;
  int32_t* voter_of;

  static size_t floats(const AttentionArgs& args) {
    const size_t rows = max_rows(args);
    return rows * args.head_dim + 4 * size_t(SLOTS) * args.head_dim + 2 * AT_ONCE * SLOTS +
           2 * Running::floats(int(rows), args.head_dim) + rows + 9 * LANES;
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
    scores = take(AT_ONCE * SLOTS);
    weights = take(AT_ONCE * SLOTS);
    segment = take(Running::floats(int(rows), args.head_dim));
    all = take(Running::floats(int(rows), args.head_dim));
    staged = take(2 * size_t(SLOTS) * args.head_dim);
    voter_of = reinterpret_cast<int32_t*>(take(rows));
  }
};

// Computes one piece. D: head_dim if it is known at compile time, else 0.
template <class T, int D>
void attend(const AttentionArgs& args, const Division& division, const Votes<T>& votes, const Piece& piece, const Workspace& space) {
  using Dot = typename DotOf<T>::type;
  constexpr int FEW = few<T, D>(), IN_PLACE = in_place<T, D>();
  static_assert(IN_PLACE <= AT_ONCE && TILE_HEIGHT <= AT_ONCE);
  const int group = args.heads / args.kv_heads, head_dim = D > 0 ? D : args.head_dim, words = head_dim / Dot::ELEMENTS;
  const int rows = piece.queries * group;  // per KV head
  const int heads = piece.head_end - piece.head;
  const float scale = args.scale * 1.44269504f;

  // Gather the query rows of each KV head: [heads][queries][group].
  division.for_members(piece, [&](int, int query, int64_t token, int queries) {
    for (int h = 0; h < heads; h++)
      for (int i = 0; i < queries; i++)
        std::memcpy(space.q + (size_t(h) * rows + size_t(query + i) * group) * words,
                    static_cast<const T*>(args.q) + (token + i) * args.q_stride + size_t(piece.head + h) * group * head_dim,
                    size_t(group) * head_dim * sizeof(T));
  });

  const bool voting = votes.find(division, piece, space.voter_of);

  // A segment of one row goes where its partial results belong.
  const bool direct = piece.part && !piece.members;
  const Running state = direct ? division.partial(piece.row, piece.first / SEGMENT) : Running::at(space.segment, rows * heads);
  const bool whole = !piece.part && piece.last <= SEGMENT;
  const Running all = Running::at(space.all, rows * heads);
  if (!piece.part && !whole) all.clear(rows * heads, head_dim);

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
        const auto weigh_rows = [&](int first, int count, const float* scores, T* to) {
          for (int row = first; row < first + count; row++, scores += SLOTS, to += SLOTS) {
            const int64_t visible = std::min<int64_t>(piece.seen + row / group - start, SLOTS);
            if (visible <= 0) {
              std::memset(to, 0, SLOTS * sizeof(T));
              continue;
            }
            weigh(scores, int(visible), scale, state, h * rows + row, head_dim, to);
            if (voting)
              votes.keep(space.voter_of[row / group], piece.head + h, row % group, start, to, to + SLOTS / 2, state.peak[h * rows + row]);
          }
        };
        if (rows <= IN_PLACE) {
          // Calls f(count, row) for tiles of at most FEW rows.
          const auto for_tiles_of_rows = [&](auto&& f) {
            for (int row = 0; row < rows;) {
              const int height = tile_height(rows, row, std::max(FEW, 1));
              with_rows<std::max(FEW, 1)>(height, [&](auto count) { f(count, row); });
              row += height;
            }
          };
          for_tiles_of_rows([&](auto count, int row) {
            score_few<T, decltype(count)::value>(block, next, head_dim, q + row * words, space.scores + row * SLOTS);
          });
          weigh_rows(0, rows, space.scores, weights);
          for_tiles_of_rows([&](auto count, int row) {
            mix_few<T, decltype(count)::value>(block, next, head_dim, weights + row * SLOTS, o + row * head_dim);
          });
          continue;
        }
        Ahead<T> ahead{next, block.GROUPS + PACK_POINTS + 2 * ((rows + TILE_HEIGHT - 1) / TILE_HEIGHT)};
        const auto fetch = [&] { ahead.step(head_dim); };
        pack_keys(block, head_dim, space.keys, fetch);
        pack_values(block, head_dim, space.values, fetch);
        for (int row = 0; row < rows;) {
          const int height = tile_height(rows, row, TILE_HEIGHT);
          with_rows<TILE_HEIGHT>(height, [&](auto count) {
            constexpr int M = decltype(count)::value;
            fetch();
            product<Dot, M, false>(q + size_t(row) * words, words, space.keys, words, space.scores, SLOTS, SLOTS);
            weigh_rows(row, M, space.scores, weights);
            fetch();
            product<Dot, M, true>(reinterpret_cast<const uint32_t*>(weights), SLOTS / Dot::ELEMENTS, space.values,
                                  SLOTS / Dot::ELEMENTS, o + size_t(row) * head_dim, head_dim, head_dim);
          });
          row += height;
        }
      }
    }
    if (!piece.part && !whole)
      for (int row = 0; row < rows * heads; row++) merge(all, row, state, row, head_dim);
  }
  if (direct) return;
  for (int h = 0; h < heads; h++) {
    if (piece.part)
      deliver(args, division, piece, h, state, h * rows);
    else
      finish_queries<T>(args, division.first_token(piece.row) + piece.query, piece.queries, piece.head + h, group,
                        whole ? state : all, h * rows);
  }
}

template <class T, int D>
struct ByVectors {
  using Element = T;
  using Space = Workspace;
  static void attend(const AttentionArgs& args, const Division& division, const Votes<T>& votes, const Piece& piece, const Space& space) {
    magicdec::attend<T, D>(args, division, votes, piece, space);
  }
};

}  // namespace magicdec
