// Blocks of keys and values: where they are in the pages of a list, and how they are prefetched.
#pragma once

#include <algorithm>

#include "sealed.h"

namespace magicdec {

constexpr int SLOTS = SEALED_SLOTS;  // per block: those of a sealed page

// Returns the first slot that a query sees, by its window. seen: number of slots that it would see without one.
MAGICDEC_INLINE int64_t first_seen(const AttentionArgs& args, int64_t seen) {
  return args.window > 0 ? std::max<int64_t>(seen - args.window, 0) : 0;
}

// Addresses of a block's keys and values, in groups of sixteen consecutive slots.
template <class T>
struct Block {
  static constexpr int GROUPS = SLOTS / LANES;
  const T* at[2 * GROUPS];  // keys, then values
  const char* parameters[2];  // of a sealed block that is only prefetched, whose codes are at `at`; null: there are none
  int code_bytes;             // of a slot of it
  bool fetch_to_l2;

  MAGICDEC_INLINE const T* keys(int group) const { return at[group]; }
  MAGICDEC_INLINE const T* values(int group) const { return at[GROUPS + group]; }

  // Prefetches memory that will be read soon: `count` slots of a group of keys (0 … GROUPS - 1) or values (from GROUPS
  // on). A core has room for few requests at once, and stalls on more, so callers spread them over other work.
  MAGICDEC_INLINE void fetch(int group, int slot, int count, int head_dim) const {
    if (parameters[0]) return fetch_codes(group, slot, count, head_dim);
    const char* from = reinterpret_cast<const char*>(at[group] + slot * head_dim);
    const int bytes = count * head_dim * int(sizeof(T));
    if (fetch_to_l2) {
#pragma GCC unroll 16
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 0);
    }
  }

 private:
  // With the first slot of a group comes a quarter of the parameters.
  MAGICDEC_INLINE void fetch_codes(int group, int slot, int count, int head_dim) const {
    const char* codes = reinterpret_cast<const char*>(at[group]) + slot * code_bytes;
    for (int i = 0; i < count * code_bytes; i += 64) __builtin_prefetch(codes + i, 0, 0);
    if (slot > 0) return;
    const int bytes = group < GROUPS ? head_dim : SLOTS;
    const char* from = parameters[group / GROUPS] + group % GROUPS * bytes;
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 0);
  }
};

// Prefetches a block in equal parts, one at each of `points` points of other work.
template <class T>
struct Ahead {
  const Block<T> next;
  const int points;
  int due = 0;
  unsigned slot = 0;
  MAGICDEC_INLINE void step(int head_dim) {
    constexpr int ALL = 2 * SLOTS;
    for (due += ALL; due >= points; due -= points, slot++) next.fetch(slot / LANES, slot % LANES, 1, head_dim);
  }
};

// Records of a page and KV head. keys: null: the page is not sealed.
struct Records {
  const uint8_t *keys = nullptr, *values = nullptr;
};

// Returns the records of the block that begins at slot `start`.
MAGICDEC_INLINE Records find_records(const AttentionArgs& args, const int64_t* list, int head, int64_t start) {
  const SealedPages& sealed = args.sealed;
  if (sealed.count == 0 || list[start / SLOTS] >= sealed.count) return {};
  const int64_t page = list[start / SLOTS];
  return {sealed.k + page * sealed.k_stride + head * key_record_bytes(args.head_dim),
          sealed.v + page * sealed.v_stride + head * value_record_bytes(args.head_dim)};
}

// Prefetches a record, or its upper codes, in equal parts.
struct RecordAhead {
  const uint8_t* at;
  int bytes;  // of a part
  bool to_l2;
  MAGICDEC_INLINE void operator()() {
    for (int i = 0; i < bytes; i += 64) {
      if (to_l2)
        __builtin_prefetch(at + i, 0, 2);
      else
        __builtin_prefetch(at + i, 0, 0);
    }
    at += bytes;
  }
};

// Prefetches the codes and the parameters of a record, of which there are `size` bytes, at `points` points of other work; null:
// nothing. Parameters that do not follow the codes that are read are prefetched at once.
MAGICDEC_INLINE RecordAhead record_ahead(const AttentionArgs& args, const uint8_t* record, size_t size, int points) {
  if (!record) return {nullptr, 0, false};
  if (args.sealed.kind == Sealed::int4x2_drafts) {
    const size_t codes = size_t(SLOTS) * args.head_dim;
    for (size_t i = codes; i < size; i += 64) __builtin_prefetch(record + i, 0, 2);
    size = codes / 2;
  }
  return {record, int(size + points - 1) / points, args.fetch_to_l2};
}

// Returns a sealed block that can only be prefetched.
template <class T>
MAGICDEC_INLINE Block<T> coded_block(const AttentionArgs& args, Records records) {
  Block<T> block;
  block.fetch_to_l2 = args.fetch_to_l2;
  block.code_bytes = args.sealed.kind == Sealed::int4x2_drafts ? args.head_dim / 2 : args.head_dim;
  for (int group = 0; group < block.GROUPS; group++) {
    const size_t place = size_t(group) * LANES * block.code_bytes;
    block.at[group] = reinterpret_cast<const T*>(records.keys + place);
    block.at[block.GROUPS + group] = reinterpret_cast<const T*>(records.values + place);
  }
  const size_t codes = size_t(SLOTS) * args.head_dim;
  block.parameters[0] = reinterpret_cast<const char*>(records.keys + codes);
  block.parameters[1] = reinterpret_cast<const char*>(records.values + codes);
  return block;
}

// Returns a sealed block, decoded to `staged`. slots: number of its slots that are listed.
template <class T>
MAGICDEC_INLINE Block<T> decoded_block(const AttentionArgs& args, Records records, int64_t slots, T* staged) {
  Block<T> block;
  block.fetch_to_l2 = args.fetch_to_l2;
  block.parameters[0] = nullptr;
  const int head_dim = args.head_dim;
  T* values = staged + size_t(SLOTS) * head_dim;
  for (int group = 0; group < block.GROUPS; group++) {
    block.at[group] = staged + size_t(group) * LANES * head_dim;
    block.at[block.GROUPS + group] = values + size_t(group) * LANES * head_dim;
  }
  decode_page(args.sealed.kind, records.keys, records.values, head_dim, staged);
  if (slots < SLOTS)
    for (T* part : {staged, values}) std::memset(part + slots * head_dim, 0, (SLOTS - slots) * head_dim * sizeof(T));
  return block;
}

// Returns the block of one KV head that begins at slot `start` of a row whose slots end at `end`. A block is copied to
// `staged` if its groups may cross pages or it is not full, or decoded if its page is sealed; slots from `end` on become
// zeros, whatever they hold. begin: the first slot that a query sees. Pages before it, which may be another row's by now, are
// not read: zeros take their place, or slots that are seen. staged: null: the block is only prefetched.
template <class T>
MAGICDEC_INLINE Block<T> find_block(const AttentionArgs& args, const int64_t* list, int head, int64_t start, int64_t begin, int64_t end,
                                    T* staged) {
  if (const Records records = find_records(args, list, head, start); records.keys)
    return staged ? decoded_block(args, records, std::min<int64_t>(end - start, SLOTS), staged) : coded_block<T>(args, records);
  const int head_dim = args.head_dim;
  const size_t head_offset = size_t(head) * args.page_size * head_dim;
  const auto* keys = static_cast<const T*>(args.k) + head_offset;
  const auto* values = static_cast<const T*>(args.v) + head_offset;
  const auto at = [&](int64_t slot) {
    return size_t(list[slot / args.page_size] - args.sealed.count) * args.page_stride + size_t(slot % args.page_size) * head_dim;
  };
  Block<T> block;
  block.fetch_to_l2 = args.fetch_to_l2;
  block.parameters[0] = nullptr;
  if (args.page_size % LANES == 0 && start + SLOTS <= end) {
    for (int group = 0; group < block.GROUPS; group++) {
      const size_t place = at(std::max(start + group * LANES, begin / LANES * LANES));
      block.at[group] = keys + place, block.at[block.GROUPS + group] = values + place;
    }
    return block;
  }
  for (int group = 0; group < block.GROUPS; group++) {
    block.at[group] = staged + size_t(group) * LANES * head_dim;
    block.at[block.GROUPS + group] = block.at[group] + size_t(SLOTS) * head_dim;
  }
  const size_t bytes = head_dim * sizeof(T);
  for (int slot = 0; slot < SLOTS; slot++) {
    T *key = staged + size_t(slot) * head_dim, *value = key + size_t(SLOTS) * head_dim;
    if (start + slot >= begin && start + slot < end) {
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

}  // namespace magicdec
