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
  float *q_floats, *factors, *parameters;  // for sealed pages
  float *scores, *weights, *segment, *all, *staged;
  int32_t* voter_of;

  static size_t floats(const AttentionArgs& args) {
    const size_t rows = max_rows(args);
    const size_t width = std::max(args.head_dim, SLOTS), sealed = rows * args.head_dim + (TILE_HEIGHT + 4) * width;
    return rows * args.head_dim + 4 * size_t(SLOTS) * args.head_dim + 2 * AT_ONCE * SLOTS +
           2 * Running::floats(int(rows), args.head_dim) + rows + (args.sealed.count > 0 ? sealed : 0) + 12 * LANES;
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
    if (args.sealed.count == 0) return;
    q_floats = take(rows * args.head_dim);
    factors = take(TILE_HEIGHT * std::max(args.head_dim, SLOTS));
    parameters = take(2 * (args.head_dim + SLOTS));
  }
};

// Adds a sealed block to the running softmax of some queries, by products with its codes. q: [rows][head_dim]. next: records
// that are prefetched meanwhile. weigh_rows: converts scores of a number of rows, from one on, to weights of type T. o:
// [rows][head_dim].
template <class T, class F>
MAGICDEC_INLINE void add_sealed(const AttentionArgs& args, Records records, int64_t slots, Records next, int head_dim, int rows,
                                const float* q, const Workspace& space, float* o, F&& weigh_rows) {
  auto *keys = reinterpret_cast<float*>(space.keys), *values = reinterpret_cast<float*>(space.values);
  T* weights = reinterpret_cast<T*>(space.weights);
  const size_t codes = size_t(SLOTS) * head_dim;
  float *key_scales = space.parameters, *key_minima = key_scales + head_dim;
  float *value_scales = key_minima + head_dim, *value_minima = value_scales + SLOTS;
  load_parameters(args.sealed.kind, records.keys + codes, head_dim, key_scales, key_minima);
  load_parameters(args.sealed.kind, records.values + codes, SLOTS, value_scales, value_minima);
  for (int64_t slot = slots; slot < SLOTS; slot++) value_scales[slot] = value_minima[slot] = 0.0f;  // whatever they hold
  const auto* factors = reinterpret_cast<const uint32_t*>(space.factors);

  const auto score = [&](int row, auto count) __attribute__((always_inline)) {
    constexpr int M = decltype(count)::value;
    float constant[M];
    for (int m = 0; m < M; m++)
      constant[m] = scale_factors(q + size_t(row + m) * head_dim, key_scales, key_minima, head_dim, space.factors + m * head_dim);
    product<DotF32, M, false>(factors, head_dim, space.keys, head_dim, space.scores, SLOTS, SLOTS);
    for (int m = 0; m < M; m++)
      for (int i = m * SLOTS; i < (m + 1) * SLOTS; i += LANES) store(space.scores + i, load<f32x16>(space.scores + i) + constant[m]);
    weigh_rows(row, M, space.scores, weights);
  };
  const auto mix = [&](int row, auto count) __attribute__((always_inline)) {
    constexpr int M = decltype(count)::value;
    float* out = o + size_t(row) * head_dim;
    for (int m = 0; m < M; m++) {
      float* scaled = space.factors + m * SLOTS;
      for (int i = 0; i < SLOTS; i += LANES) store(scaled + i, load_floats(weights + m * SLOTS + i));
      const float constant = scale_factors(scaled, value_scales, value_minima, SLOTS, scaled);
      for (float* each = out + m * head_dim; each < out + (m + 1) * head_dim; each += LANES) store(each, load<f32x16>(each) + constant);
    }
    product<DotF32, M, true>(factors, SLOTS, space.values, SLOTS, out, head_dim, head_dim);
  };
  const auto write_values = [&] {
    const RecordAhead fetch = record_ahead(args, next.values, value_record_bytes(head_dim), VALUE_POINTS);
    with_kind(args.sealed.kind, [&](auto each) { write_value_codes<each.value>(records.values, head_dim, values, fetch); });
  };
  const RecordAhead fetch = record_ahead(args, next.keys, key_record_bytes(head_dim), head_dim);
  with_kind(args.sealed.kind, [&](auto each) { turn_key_codes<each.value>(records.keys, head_dim, keys, fetch); });
  if (rows <= TILE_HEIGHT) {  // keys are in the L1 cache until values take their place
    with_rows<TILE_HEIGHT>(rows, [&](auto count) __attribute__((always_inline)) {
      score(0, count);
      write_values();
      mix(0, count);
    });
    return;
  }
  write_values();
  for (int row = 0; row < rows;) {
    const int height = tile_height(rows, row, TILE_HEIGHT);
    with_rows<TILE_HEIGHT>(height, [&](auto count) __attribute__((always_inline)) { score(row, count), mix(row, count); });
    row += height;
  }
}

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

  if constexpr (multiplies_codes<T>()) {
    if (args.sealed.count > 0) {
      const auto* from = reinterpret_cast<const T*>(space.q);
      for (size_t i = 0; i < size_t(rows) * heads * head_dim; i += LANES) store(space.q_floats + i, load_floats(from + i));
    }
  }
  const bool voting = votes.find(division, piece, space.voter_of);

  // A segment of one row goes where its partial results belong.
  const bool direct = piece.part && !piece.members;
  const Running state = direct ? division.partial(piece.row, piece.first / SEGMENT) : Running::at(space.segment, rows * heads);
  const bool whole = !piece.part && piece.last - piece.first <= SEGMENT;
  const Running all = Running::at(space.all, rows * heads);
  if (!piece.part && !whole) all.clear(rows * heads, head_dim);

  const int64_t begin = first_seen(args, piece.seen);
  const int64_t* lists = args.pages + piece.row * args.row_stride;
  for (int64_t segment = piece.first; segment < piece.last; segment += SEGMENT) {
    const int64_t segment_end = std::min(piece.last, segment + SEGMENT);
    state.clear(rows * heads, head_dim);
    for (int64_t start = std::max(segment, begin / SLOTS * SLOTS); start < segment_end; start += SLOTS) {
      for (int h = 0; h < heads; h++) {
        const int64_t* list = lists + (piece.head + h) * args.head_stride;
        const Records records = multiplies_codes<T>() ? find_records(args, list, piece.head + h, start) : Records{};
        const uint32_t* q = space.q + size_t(h) * rows * words;
        T* weights = reinterpret_cast<T*>(space.weights);
        float* o = state.o + size_t(h) * rows * head_dim;
        const auto weigh_rows = [&](int first, int count, const float* scores, T* to) {
          for (int row = first; row < first + count; row++, scores += SLOTS, to += SLOTS) {
            const int64_t seen = piece.seen + row / group, visible = std::min<int64_t>(seen - start, SLOTS);
            const int64_t hidden = std::max<int64_t>(first_seen(args, seen) - start, 0);
            if (visible <= hidden) {
              std::memset(to, 0, SLOTS * sizeof(T));
              continue;
            }
            weigh(scores, int(hidden), int(visible), scale, state, h * rows + row, head_dim, to);
            if (voting)
              votes.keep(space.voter_of[row / group], piece.head + h, row % group, start, to, to + SLOTS / 2, state.peak[h * rows + row]);
          }
        };
        if constexpr (multiplies_codes<T>()) {
          if (records.keys) {
            add_sealed<T>(args, records, std::min<int64_t>(segment_end - start, SLOTS), records_after(args, piece, piece.head + h, start),
                          head_dim, rows, space.q_floats + size_t(h) * rows * head_dim, space, o, weigh_rows);
            continue;
          }
        }
        const Block<T> block = find_block(args, list, piece.head + h, start, begin, segment_end, reinterpret_cast<T*>(space.staged));
        const Block<T> next = block_after(args, piece, piece.head + h, start, block);
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
