// Votes of queries for the KV that their rows list (Ballot in kernels/attention/base.py).
//
// While pieces are computed, a voter's weights are kept block by block, with the peak that they are relative to: as they
// are, or summed by sixteen slots where units have a multiple of that, which takes less memory. When the voter's
// log-sum-exp is known, they become votes, with one exponential per block.
#pragma once

#include "attention_cut.h"

namespace magicdec {

constexpr int VOTERS = 2;                  // of a row, at most
constexpr int STRETCH = LANES * SLOTS;     // slots whose blocks have their peaks in one vector
constexpr int GROUPS = SLOTS / LANES;      // of a block's slots, that are summed

// Writes the sums of the groups of a block, whose weights are in two halves.
template <class T>
MAGICDEC_INLINE void sum_groups(const T* first, const T* second, float* sums) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    const auto ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    const auto pairs = [&](const T* half) { return _mm512_dpbf16_ps(_mm512_setzero_ps(), load<__m512bh>(half), ones); };
    const __m512 a = pairs(first), b = pairs(second);
    __m512 x = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    x += _mm512_permute_ps(x, 0x4e);           // a and b of each 128-bit lane
    x += _mm512_shuffle_f32x4(x, x, 0xb1);     // of lanes 0 and 1: groups 0 and 2; of lanes 2 and 3: groups 1 and 3
    return store(sums, _mm_unpacklo_ps(_mm512_castps512_ps128(x), _mm512_extractf32x4_ps(x, 2)));
  }
#endif
  for (int i = 0; i < GROUPS; i++) sums[i] = sum(load_floats((i < GROUPS / 2 ? first : second - SLOTS / 2) + i * LANES));
}

template <class T>
class Votes {
 public:
  static size_t bytes(const AttentionArgs& args) {
    if (!args.voters) return 0;
    size_t all = 0;
    for (int row = 0; row < args.rows; row++) all += row_bytes(args, row);
    return table_bytes(args) + all + args.team.threads * room_bytes(args);
  }

  Votes(const AttentionArgs& args, char* memory) : args_(args) {
    if (!args.voters) return;
    rows_ = reinterpret_cast<Row*>(memory);
    rooms_ = reinterpret_cast<Room*>(rows_ + args.rows);
    memory += table_bytes(args);
    const size_t bytes = room_bytes(args);
    for (int thread = 0; thread < args.team.threads; thread++) rooms_[thread] = {memory + thread * bytes, false};
    memory += args.team.threads * bytes;
    for (int row = 0; row < args.rows; memory += row_bytes(args, row++)) rows_[row] = {nullptr, memory, blocks_of(args, row)};
  }

  // Called before each piece of a row. The first one decides where the weights of the row's voters are kept: in memory of its
  // thread, which one row after the other uses, so that caches hold it; or in memory of the row, while another row uses that.
  void make_room(int row, int thread) const {
    if (!args_.voters || blocks_of(args_, row) == 0 || memory_of(rows_[row])) return;
    char* none = nullptr;
    Room& mine = rooms_[thread];
    const bool is_free = !__atomic_load_n(&mine.taken, __ATOMIC_ACQUIRE);
    if (is_free) mine.taken = true;
    char* memory = is_free ? mine.memory : rows_[row].own;
    const bool first = __atomic_compare_exchange_n(&rows_[row].kept, &none, memory, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    if (!first && is_free) mine.taken = false;  // another thread has begun the row
  }

  // Writes the voter that each query of a piece is, -1 for none, and returns whether there is any.
  bool find(const Division& division, const Piece& piece, int32_t* voter_of) const {
    if (!args_.voters) return false;
    bool any = false;
    std::fill_n(voter_of, piece.queries, -1);
    division.for_members(piece, [&](int row, int query, int64_t token, int queries) {
      const int64_t last = args_.queries[row] - 1 - (token - division.first_token(row));  // counted from the first one here
      for (int column = VOTERS - 1; column >= 0; column--) {  // of two equal voters the first one counts for both
        const int64_t behind = args_.voters[row * VOTERS + column], at = last - behind;
        if (behind < 0 || at < 0 || at >= queries) continue;
        voter_of[query + at] = row * VOTERS + column;
        any = true;
      }
    });
    return any;
  }

  // Keeps the weights of a block, in two halves. voter: see find. g: number of the query head, of those of KV head `head`.
  MAGICDEC_INLINE void keep(int voter, int head, int g, int64_t start, const T* first, const T* second, float peak) const {
    if (voter < 0) return;
    const Row& row = rows_[voter / VOTERS];
    const int64_t block = place(head, voter % VOTERS, g) * row.blocks + start / SLOTS;
    peaks(row)[block] = peak;
    if (sums_groups(args_)) {
      sum_groups(first, second, sums(row) + block * GROUPS);
    } else {
      std::memcpy(weights(row) + block * SLOTS, first, SLOTS / 2 * sizeof(T));
      std::memcpy(weights(row) + block * SLOTS + SLOTS / 2, second, SLOTS / 2 * sizeof(T));
    }
  }

  // Counts the votes of a row, whose pieces are done and whose log-sum-exps are there.
  void count(const Division& division, int row) const {
    if (!args_.voters || blocks_of(args_, row) == 0) return;
    const int64_t length = args_.lengths[row];
    for (int head = 0; head < args_.kv_heads; head++) {
      float* votes = args_.votes + row * args_.votes_row_stride + head * args_.votes_head_stride;
      std::fill_n(votes, (length + args_.vote_unit - 1) / args_.vote_unit, 0.0f);
      for (int64_t first = 0; first < length; first += STRETCH) {
        alignas(64) float sums[STRETCH] = {};
        add_voters(division, row, head, first, sums);
        add_units(sums, first, std::min<int64_t>(STRETCH, length - first), votes);
      }
    }
    for (int thread = 0; thread < args_.team.threads; thread++)
      if (memory_of(rows_[row]) == rooms_[thread].memory) __atomic_store_n(&rooms_[thread].taken, false, __ATOMIC_RELEASE);
  }

 private:
  // Kept: peaks [kv_heads, VOTERS, heads of a KV head, blocks]; then weights, or their sums, the same with as many per block.
  struct Row {
    char* kept;      // null: not decided yet
    char* own;       // memory that is used by no other row
    int64_t blocks;  // that there is room for
  };
  struct Room {  // of a thread
    char* memory;
    bool taken;  // by a row that is not finished
  };

  static char* memory_of(const Row& row) { return __atomic_load_n(&row.kept, __ATOMIC_ACQUIRE); }
  float* peaks(const Row& row) const { return reinterpret_cast<float*>(memory_of(row)); }
  float* sums(const Row& row) const { return peaks(row) + voter_rows(args_) * row.blocks; }
  T* weights(const Row& row) const { return reinterpret_cast<T*>(sums(row)); }

  static bool sums_groups(const AttentionArgs& args) { return args.vote_unit % LANES == 0; }
  static size_t voter_rows(const AttentionArgs& args) { return size_t(args.heads) * VOTERS; }
  // Returns a multiple of LANES, 0 if the row has no voters.
  static int64_t blocks_of(const AttentionArgs& args, int row) {
    const int64_t* voters = args.voters + row * VOTERS;
    return std::max(voters[0], voters[1]) < 0 ? 0 : (args.lengths[row] + STRETCH - 1) / STRETCH * LANES;
  }
  static size_t row_bytes(const AttentionArgs& args, int row) {
    const size_t block = sums_groups(args) ? GROUPS * sizeof(float) : SLOTS * sizeof(T);
    return voter_rows(args) * blocks_of(args, row) * (sizeof(float) + block);
  }
  static size_t room_bytes(const AttentionArgs& args) {
    size_t most = 0;
    for (int row = 0; row < args.rows; row++) most = std::max(most, row_bytes(args, row));
    return most;
  }
  static size_t table_bytes(const AttentionArgs& args) {
    return to_whole_lines(args.rows * sizeof(Row) + args.team.threads * sizeof(Room));
  }
  int64_t place(int head, int column, int g) const {
    const int group = args_.heads / args_.kv_heads;
    return (int64_t(head) * VOTERS + column) * group + g;
  }

  // Adds the softmax weights of STRETCH slots from `first` on, or of their groups, of all voters and all query heads of a KV
  // head.
  void add_voters(const Division& division, int row, int head, int64_t first, float* votes) const {
    const int group = args_.heads / args_.kv_heads;
    const Row& kept = rows_[row];
    const int64_t *voters = args_.voters + row * VOTERS, end = division.first_token(row) + args_.queries[row];
    for (int column = 0; column < VOTERS; column++) {
      const int64_t behind = voters[column], seen = args_.lengths[row] - behind - first;
      if (behind < 0 || seen <= 0 || (column > 0 && behind == voters[0])) continue;
      const float times = voters[0] == voters[1] ? VOTERS : 1;
      const int blocks = int(std::min<int64_t>(LANES, (seen + SLOTS - 1) / SLOTS));
      for (int g = 0; g < group; g++) {
        const int64_t from = place(head, column, g) * kept.blocks + first / SLOTS;
        const float lse = args_.lse[(end - 1 - behind) * args_.heads + head * group + g] * 1.44269504f;
        const f32x16 factors = exp2_falling(load<f32x16>(peaks(kept) + from) - lse) * times;
        for (int block = 0; block < blocks; block++) {
          if (sums_groups(args_)) {
            const float* from_groups = sums(kept) + (from + block) * GROUPS;
            for (int i = 0; i < GROUPS; i++) votes[block * GROUPS + i] += from_groups[i] * factors[block];
          } else {
            const T* from_slots = weights(kept) + (from + block) * SLOTS;
            float* to = votes + block * SLOTS;
            for (int i = 0; i < SLOTS; i += LANES) store(to + i, load<f32x16>(to + i) + load_floats(from_slots + i) * factors[block]);
          }
        }
      }
    }
  }

  // Adds the weights of `count` slots from `first` on, or of their groups, to the votes of their units.
  void add_units(const float* sums, int64_t first, int64_t count, float* votes) const {
    int64_t unit = args_.vote_unit;
    if (sums_groups(args_)) first /= LANES, count = (count + LANES - 1) / LANES, unit /= LANES;
    votes += first / unit;
    if (unit == 1) return void(std::copy_n(sums, count, votes));
    for (int64_t i = 0, left = unit - first % unit; i < count; i++) {
      *votes += sums[i];
      if (--left == 0) votes++, left = unit;
    }
  }

  const AttentionArgs& args_;
  Row* rows_ = nullptr;
  Room* rooms_ = nullptr;
};

}  // namespace magicdec
