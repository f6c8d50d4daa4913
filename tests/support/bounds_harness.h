// Tests of the bounds of pages' keys, and of products with them.
#pragma once

#include "kernels_harness.h"

inline void test_bounds(Random& random) {
  const Type type = any_type(random);
  const int kv_heads = random.of({1, 2, 3}), group = random.of({1, 3, 4}), head_dim = random.of({16, 48, 64, 128, 256});
  const int page_size = random.of({1, 7, 16, 32}), pool = 23, heads = kv_heads * group, rows = random.of({1, 3, 9});
  const int width = random.near({1, 16, 40, 200}), first = int(random.below(3));
  const std::string what = describe("bounds", int(type), kv_heads, group, head_dim, page_size, rows, width, first);
  const int64_t head_size = int64_t(page_size) * head_dim, stride = 2 * kv_heads * head_size;  // values stand between keys
  const size_t size = size_t(kv_heads) * head_dim;
  const Tensor k = normal(random, type, size_t(pool) * stride);
  Tensor low(type, pool * size), high(type, pool * size);
  std::vector<int64_t> all(pool);
  for (int page = 0; page < pool; page++) all[page] = page;
  const auto summarise = [&](int from, int count, int threads) {
    Tensor a(type, pool * size), b(type, pool * size);
    SummariseArgs args{};
    args.type = type, args.k = k.bytes.data(), args.page_stride = stride, args.pages = &all[from], args.count = count;
    args.kv_heads = kv_heads, args.page_size = page_size, args.head_dim = head_dim, args.low = a.at(0), args.high = b.at(0);
    args.bounds_stride = size;
    call(threads, args, kernels.summarise);
    return std::make_pair(a, b);
  };
  std::tie(low, high) = summarise(0, pool, 1);
  for (size_t i = 0; i < pool * size; i++) {
    const size_t from = i / size * stride + i % size / head_dim * head_size + i % head_dim;
    double least = INFINITY, most = -INFINITY;
    for (int slot = 0; slot < page_size; slot++) {
      const double key = k.get(from + size_t(slot) * head_dim);
      least = std::min(least, key), most = std::max(most, key);
    }
    if (low.get(i) != least || high.get(i) != most) return fail(what, "not the extremes", low.get(i), least);
  }
  for_ranges(random, pool, [&](int from, int count, int threads) {
    const auto [a, b] = summarise(from, count, threads);
    for (int page = 0; page < pool; page++)
      for (size_t i = page * size; i < (page + 1) * size; i++) {
        const bool named = page >= from && page < from + count;
        if (a.get(i) != (named ? low.get(i) : 0) || b.get(i) != (named ? high.get(i) : 0)) return fail(what, "another page", a.get(i), low.get(i));
      }
  });

  const int64_t q_stride = int64_t(heads + 2) * head_dim, row_stride = width + random.of({0, 5});
  const Tensor q = normal(random, type, size_t(rows - 1) * q_stride + size_t(heads) * head_dim);
  std::vector<int64_t> pages(size_t(rows) * row_stride), ends(rows);
  for (auto& page : pages) page = random.below(pool);
  for (auto& end : ends) end = random.below(width + 3);
  const auto bound = [&](int from, int count, int threads) {
    Tensor scores(Type::f32, size_t(count) * kv_heads * width);
    BoundsArgs args{};
    args.type = type, args.q = q.bytes.data() + from * q_stride * size_of(type), args.q_stride = q_stride;
    args.low = low.at(0), args.high = high.at(0), args.bounds_stride = size, args.pages = &pages[from * row_stride], args.row_stride = row_stride;
    args.rows = count, args.width = width, args.first = first, args.ends = &ends[from];
    args.heads = heads, args.kv_heads = kv_heads, args.head_dim = head_dim;
    args.scores = static_cast<float*>(scores.at(0));
    call(threads, args, kernels.bounds, kernels.bounds_scratch);
    return scores;
  };
  const Tensor scores = bound(0, rows, 1);
  for (int row = 0; row < rows; row++)
    for (int head = 0; head < kv_heads; head++)
      for (int i = 0; i < width; i++) {
        const double got = scores.get((size_t(row) * kv_heads + head) * width + i);
        if (i < first || i >= ends[row]) {
          if (got != -INFINITY) return fail(what, "a page that cannot be chosen", got, -INFINITY);
          continue;
        }
        double sum = 0, total = 0;
        for (int each = 0; each < group * head_dim; each++) {
          const double x = q.get(row * q_stride + size_t(head) * group * head_dim + each);
          const size_t at = pages[row * row_stride + i] * size + head * head_dim + each % head_dim;
          const double term = std::max(x * low.get(at), x * high.get(at));
          sum += term, total += std::abs(x) * std::max(std::abs(low.get(at)), std::abs(high.get(at)));
        }
        check(what, got, sum, total * 1e-5 + 1e-30);
      }
  for_ranges(random, rows, [&](int from, int count, int threads) {
    check_same(what, bound(from, count, threads), scores, size_t(from) * kv_heads * width, size_t(count) * kv_heads * width);
  });
}
