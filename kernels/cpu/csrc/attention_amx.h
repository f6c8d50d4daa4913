// Attention by AMX tiles, for bfloat16 and head_dim a multiple of TILE_DIMS. All numbers of queries take the same path.
//
// Query rows of one KV head form groups of 16, padded with zeros; a row is a column of the scores and a row of the rest:
//   scores   [64 slots][16 queries] = keys [64 slots][head_dim], where they are, · queries [head_dim / 2 words][16 queries]
//   weights  2 × [16 queries][16 words of two slots]
//   o        [16 queries][head_dim] += weights · values [32 words of two slots][head_dim], packed once per block
// While the vector units compute the weights of a group, tiles multiply the weights of the group before with the values,
// and the queries of the group after with the keys.
#pragma once

#include "amx.h"
#include "attention_pieces.h"

#if defined(MAGICDEC_TILES)

namespace magicdec {

constexpr int TILE_DIMS = 2 * TILE_WORDS;           // that one product sums over
constexpr int TILE_SIZE = TILE_ROWS * TILE_WORDS;   // words
constexpr int GROUP_SCORES = SLOTS * TILE_ROWS;     // floats
constexpr int GROUP_WEIGHTS = 2 * TILE_SIZE;        // words
constexpr int WEIGH_POINTS = 16;                    // times that weigh_group calls `meanwhile`

inline int to_whole_groups(int64_t rows) { return int((rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS); }

// Scratch memory of one thread.
struct TileSpace {
  uint32_t *q, *values, *weights;  // [heads][groups][head_dim / 2][16]; [SLOTS / 2][head_dim]; two groups' weights
  int32_t* query_of;               // [rows]: the query that a row of the groups belongs to
  int64_t* token_of;               // [rows]: the token of a query
  int32_t* voter_of;               // [rows]: the voter that a query is
  float *scores, *segment, *all, *staged;

  static size_t floats(const AttentionArgs& args) { return TileSpace(nullptr, args).used; }
  TileSpace(float* memory, const AttentionArgs& args) {
    const int rows = to_whole_groups(max_rows(args));
    const size_t head_dim = args.head_dim;
    const auto take = [&](auto*& part, size_t words) {
      if (memory) part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(memory + used);
      used += (words + LANES - 1) / LANES * LANES;
    };
    take(q, rows * head_dim / 2);
    take(values, SLOTS / 2 * head_dim);
    take(weights, 2 * GROUP_WEIGHTS);
    take(query_of, rows);
    take(token_of, 2 * rows);
    take(voter_of, rows);
    take(scores, 2 * GROUP_SCORES);
    take(segment, Running::floats(rows, args.head_dim));
    take(all, Running::floats(rows, args.head_dim));
    take(staged, SLOTS * head_dim);  // 16-bit keys, then values
  }

 private:
  size_t used = 0;
};

// -- steps of the products --------------------------------------------------------------------------------------------

// A product of one group, in steps that fit between other work. The sums are in tiles 0 … 3, and are stored one step after
// their products, which nothing then waits for.
constexpr int product_steps(int head_dim) { return head_dim / TILE_DIMS + 1; }

// Calls f(Count<0>{}) … f(Count<N - 1>{}).
template <int N, class F>
MAGICDEC_INLINE void for_tiles(F&& f) {
  if constexpr (N > 1) for_tiles<N - 1>(f);
  f(Count<N - 1>{});
}

MAGICDEC_INLINE void score_step(int step, const Block<bf16>& block, const uint32_t* q, int head_dim, float* scores) {
  const int d = step * TILE_DIMS;
  if (d == head_dim) return for_tiles<4>([&](auto tile) { tile_store<tile.value>(scores + tile.value * TILE_SIZE, TILE_BYTES); });
  if (d == 0) for_tiles<4>([](auto tile) { tile_zero<tile.value>(); });
  tile_load<6>(q + step * TILE_SIZE, TILE_BYTES);
  for_tiles<4>([&](auto tile) {  // slots 16 tile … 16 tile + 15
    constexpr int KEYS = 4 + tile.value % 2;
    tile_load<KEYS>(block.keys(tile.value) + d, head_dim * sizeof(bf16));
    tile_dot_bf16<tile.value, KEYS, 6>();
  });
}

// SUMS: first of the two tiles that hold the sums of this step; the other two have those of the step before.
template <int SUMS>
MAGICDEC_INLINE void mix_columns(int d, const uint32_t* values, int head_dim, float* o) {
  const size_t stride = head_dim * sizeof(float);
  if (d < head_dim) {
    for_tiles<2>([&](auto i) { tile_load<SUMS + i.value>(o + d + i.value * TILE_WORDS, stride); });
    for_tiles<2>([&](auto half) {  // of the slots
      const uint32_t* from = values + half.value * TILE_ROWS * head_dim + d;
      for_tiles<2>([&](auto i) {
        tile_load<4 + i.value>(from + i.value * TILE_WORDS, stride);
        tile_dot_bf16<SUMS + i.value, 6 + half.value, 4 + i.value>();
      });
    });
  }
  if (d > 0) for_tiles<2>([&](auto i) { tile_store<2 - SUMS + i.value>(o + d - TILE_DIMS + i.value * TILE_WORDS, stride); });
}

MAGICDEC_INLINE void mix_step(int step, const uint32_t* weights, const uint32_t* values, int head_dim, float* o) {
  if (step == 0) tile_load<6>(weights, TILE_BYTES), tile_load<7>(weights + TILE_SIZE, TILE_BYTES);
  if (step % 2 == 0)
    mix_columns<0>(step * TILE_DIMS, values, head_dim, o);
  else
    mix_columns<2>(step * TILE_DIMS, values, head_dim, o);
}

// -- weights ----------------------------------------------------------------------------------------------------------

// 2^x, zero where `visible` is not set.
MAGICDEC_INLINE __m512 exp2_of_scores(__mmask16 visible, __m512 x) { return _mm512_maskz_scalef_ps(visible, exp2_of_fraction(x), x); }

// Transposes 32 slots × 16 queries of 16-bit elements: from x[i] = [slots i', i' + 8][queries], i' = i for i < 8, else
// i + 8, to x[query] = [slots].
MAGICDEC_INLINE void transpose_weights(__m512i (&x)[LANES]) {
  __m512i y[LANES];
  for (int i = 0; i < LANES; i += 2) {
    y[i] = _mm512_unpacklo_epi16(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi16(x[i], x[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {
    for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm512_unpacklo_epi32(y[i + j], y[i + 2 + j]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi32(y[i + j], y[i + 2 + j]);
    }
  }
  for (int i = 0; i < LANES; i += 8) {
    for (int j = 0; j < 4; j++) {
      y[i + 2 * j] = _mm512_unpacklo_epi64(x[i + j], x[i + 4 + j]);
      y[i + 2 * j + 1] = _mm512_unpackhi_epi64(x[i + j], x[i + 4 + j]);
    }
  }
  // y[8 k + query]: [slots 16 k …, 16 k + 8 …][queries query, query + 8], eight slots per 128-bit lane.
  for (int i = 0; i < 8; i++) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
  }
}

// Converts the scores of a group, whose first row is `row`, to weights, and updates its running softmax.
// PART: some queries do not see all slots of the block; each one sees [hidden, visible) of them.
// meanwhile: called with each i < WEIGH_POINTS, in ascending order.
template <bool PART, class F>
MAGICDEC_INLINE void weigh_group(const float* scores, i32x16 hidden, i32x16 visible, float scale, Running state, int row, int head_dim,
                                 uint32_t* weights, F&& meanwhile) {
  const auto visible_at = [&](int slot) -> __mmask16 {
    if (!PART) return 0xffff;
    const __m512i each = _mm512_set1_epi32(slot);
    return _mm512_mask_cmple_epi32_mask(_mm512_cmpgt_epi32_mask((__m512i)visible, each), (__m512i)hidden, each);
  };
  const auto score_at = [&](int slot) { return _mm512_load_ps(scores + slot * LANES); };
  __m512 highest[4];
  for (auto& each : highest) each = _mm512_set1_ps(NOTHING);
  for (int slot = 0; slot < SLOTS; slot += 4)
    for (int i = 0; i < 4; i++)
      highest[i] = _mm512_mask_max_ps(highest[i], visible_at(slot + i), score_at(slot + i), highest[i]);
  const __m512 high = _mm512_max_ps(_mm512_max_ps(highest[0], highest[1]), _mm512_max_ps(highest[2], highest[3])) * scale;

  __m512 peak = _mm512_loadu_ps(state.peak + row);
  const __mmask16 rises = _mm512_cmp_ps_mask(high, peak + HEADROOM, _CMP_GT_OQ);
  if (rises) {
    const __m512 before = peak;
    peak = _mm512_mask_mov_ps(peak, rises, high);
    _mm512_storeu_ps(state.peak + row, peak);
    const f32x16 shrink = exp2_falling((f32x16)(before - peak));
    alignas(64) float factors[LANES];
    store(factors, shrink);
    const __mmask16 begun = _mm512_cmp_ps_mask(before, _mm512_set1_ps(NOTHING), _CMP_NEQ_UQ);
    for (unsigned rest = rises & begun; rest; rest &= rest - 1) {
      const int query = __builtin_ctz(rest);
      float *total = state.total + (row + query) * LANES, *o = state.o + size_t(row + query) * head_dim;
      store(total, load<f32x16>(total) * factors[query]);
      for (int d = 0; d < head_dim; d += LANES) store(o + d, load<f32x16>(o + d) * factors[query]);
    }
  }

  const __m512 times = _mm512_set1_ps(scale);
  const __m512 less = _mm512_max_ps(peak, _mm512_set1_ps(std::numeric_limits<float>::lowest()));
  const auto weight_at = [&](int slot) {
    return exp2_of_scores(visible_at(slot), _mm512_fmsub_ps(score_at(slot), times, less));
  };
  for (int half = 0; half < 2; half++, weights += TILE_SIZE) {
    __m512i x[LANES];
#pragma GCC unroll 1
    for (int i = 0; i < LANES; i += 2) {
      const int slot = half * 32 + i % 8 + i / 8 * 16;
      for (int j = 0; j < 2; j++)
        x[i + j] = (__m512i)_mm512_cvtne2ps_pbh(weight_at(slot + j + 8), weight_at(slot + j));
      meanwhile(half * 8 + i / 2);
    }
    transpose_weights(x);
    const auto ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (int query = 0; query < LANES; query++) {
      _mm512_store_si512(weights + query * TILE_WORDS, x[query]);
      float* total = state.total + (row + query) * LANES;  // of the rounded weights, as they are multiplied
      _mm512_storeu_ps(total, _mm512_dpbf16_ps(_mm512_loadu_ps(total), (__m512bh)x[query], ones));
    }
  }
}

// -- a piece ----------------------------------------------------------------------------------------------------------

// Packs the query rows of a piece: those of one KV head, [queries][heads that share it], in groups.
inline void pack_queries(const AttentionArgs& args, const Division& division, const Piece& piece, const TileSpace& space) {
  const int group = args.heads / args.kv_heads, rows = piece.queries * group, padded = to_whole_groups(rows);
  const int words = args.head_dim / 2;
  for (int row = 0; row < padded; row++) space.query_of[row] = std::min(row, rows - 1) / group;
  division.for_members(piece, [&](int, int query, int64_t token, int queries) {
    for (int i = 0; i < queries; i++) space.token_of[query + i] = token + i;
  });
  uint32_t* to = space.q;
  for (int head = piece.head; head < piece.head_end; head++) {
    for (int first = 0; first < padded; first += TILE_ROWS, to += words * TILE_ROWS) {
      for (int w = 0; w < words; w += LANES) {
        u32x16 x[LANES] = {};
        for (int i = 0; i < std::min(TILE_ROWS, rows - first); i++) {
          const int row = first + i;
          x[i] = load<u32x16>(static_cast<const bf16*>(args.q) + space.token_of[row / group] * args.q_stride +
                              size_t(head * group + row % group) * args.head_dim + w * 2);
        }
        transpose(x);
        for (int i = 0; i < LANES; i++) store(to + (w + i) * TILE_ROWS, x[i]);
      }
    }
  }
}

// D: head_dim if it is known at compile time, else 0.
template <int D>
struct ByTiles {
  using Element = bf16;
  using Space = TileSpace;

  static void attend(const AttentionArgs& args, const Division& division, const Votes<bf16>& votes, const Piece& piece, const Space& space) {
    const int group = args.heads / args.kv_heads, heads = piece.head_end - piece.head;
    const int rows = piece.queries * group, padded = to_whole_groups(rows);  // per KV head
    const TileUse use(full_tiles());
    pack_queries(args, division, piece, space);
    const bool voting = votes.find(division, piece, space.voter_of);

    const Running state = Running::at(space.segment, padded * heads);
    const Running all = Running::at(space.all, rows * heads);
    all.clear(rows * heads, args.head_dim);
    const int64_t begin = first_seen(args, piece.seen) / SLOTS * SLOTS;
    for (int64_t segment = piece.first; segment < piece.last; segment += SEGMENT) {
      const int64_t end = std::min(piece.last, segment + SEGMENT);
      state.clear(padded * heads, args.head_dim);
      for (int64_t start = std::max(segment, begin); start < end; start += SLOTS)
        for (int h = 0; h < heads; h++) add_block(args, voting ? &votes : nullptr, piece, h, start, end, state, space);
      if (piece.part) continue;
      for (int h = 0; h < heads; h++)
        for (int row = 0; row < rows; row++) merge(all, h * rows + row, state, h * padded + row, args.head_dim);
    }
    for (int h = 0; h < heads; h++) {
      if (piece.part)
        deliver(args, division, piece, h, state, h * padded);
      else
        finish_queries<bf16>(args, division.first_token(piece.row) + piece.query, piece.queries, piece.head + h, group, all, h * rows);
    }
  }

 private:
  static TileShapes full_tiles() {
    TileShapes shapes;
    for (int tile = 0; tile < 8; tile++) shapes.set(tile, TILE_ROWS, TILE_BYTES);
    return shapes;
  }

  // Adds slots [start, start + SLOTS), which end at `end`, to the running softmax of all queries of the piece's KV head h.
  // votes: null if none of the queries votes.
  static void add_block(const AttentionArgs& args, const Votes<bf16>* votes, const Piece& piece, int h, int64_t start, int64_t end,
                        Running state, const Space& space) {
    const int head_dim = D > 0 ? D : args.head_dim, head = piece.head + h, group = args.heads / args.kv_heads;
    const int rows = piece.queries * group, padded = to_whole_groups(rows);
    const int64_t* list = args.pages + piece.row * args.row_stride + head * args.head_stride;
    const Block<bf16> block = find_block(args, list, head, start, first_seen(args, piece.seen), end, reinterpret_cast<bf16*>(space.staged));
    const float scale = args.scale * 1.44269504f;

    // Slots of the block that the piece's first query sees. Later groups see more: the first ones may see none.
    const int64_t visible = piece.seen - start;
    int first = 0;
    while (visible + space.query_of[first * TILE_ROWS + TILE_ROWS - 1] <= 0) first++;
    // By a window, the last groups may see none.
    const int64_t hidden = args.window > 0 ? visible - args.window : -(1 << 30);  // slots that the first query does not see
    int groups = padded / TILE_ROWS;
    while (hidden + space.query_of[(groups - 1) * TILE_ROWS] >= SLOTS) groups--;

    const int steps = product_steps(head_dim);  // of each of a group's two products
    Ahead<bf16> ahead{block_after(args, piece, head, start, block), PACK_POINTS + (groups - first) * (WEIGH_POINTS + 2 * steps)};
    const auto score = [&](int g, int step) __attribute__((always_inline)) {
      ahead.step(head_dim);
      const uint32_t* q = space.q + size_t(h * padded + g * TILE_ROWS) * (head_dim / 2);
      score_step(step, block, q, head_dim, space.scores + g % 2 * GROUP_SCORES);
    };
    const auto mix = [&](int g, int step) __attribute__((always_inline)) {
      ahead.step(head_dim);
      float* o = state.o + size_t(h * padded + g * TILE_ROWS) * head_dim;
      mix_step(step, space.weights + g % 2 * GROUP_WEIGHTS, space.values, head_dim, o);
    };

    pack_values(block, head_dim, space.values, [&] { ahead.step(head_dim); });
    for (int step = 0; step < steps; step++) score(first, step);
    for (int g = first; g < groups; g++) {
      const int mixes = g > first ? steps : 0, all = mixes + (g + 1 < groups ? steps : 0);
      int done = 0;
      const auto meanwhile = [&](int point) __attribute__((always_inline)) {
        ahead.step(head_dim);
        for (; done * WEIGH_POINTS < (point + 1) * all; done++) {
          if (done < mixes)
            mix(g - 1, done);
          else
            score(g + 1, done - mixes);
        }
      };
      const float* scores = space.scores + g % 2 * GROUP_SCORES;
      uint32_t* weights = space.weights + g % 2 * GROUP_WEIGHTS;
      const int row = h * padded + g * TILE_ROWS;
      const i32x16 queries = load<i32x16>(space.query_of + g * TILE_ROWS);
      if (visible + queries[0] >= SLOTS && hidden + queries[TILE_ROWS - 1] <= 0)
        weigh_group<false>(scores, queries, queries, scale, state, row, head_dim, weights, meanwhile);
      else
        weigh_group<true>(scores, queries + int(hidden), queries + int(visible), scale, state, row, head_dim, weights, meanwhile);
      if (!votes) continue;
      for (int i = 0; i < std::min(TILE_ROWS, rows - g * TILE_ROWS); i++) {
        const auto* kept = reinterpret_cast<const bf16*>(weights + i * TILE_WORDS);
        const int query = space.query_of[g * TILE_ROWS + i];
        votes->keep(space.voter_of[query], head, (g * TILE_ROWS + i) % group, start, kept, kept + 2 * TILE_SIZE, state.peak[row + i]);
      }
    }
    for (int step = 0; step < steps; step++) mix(groups - 1, step);
  }
};

}  // namespace magicdec

#endif
