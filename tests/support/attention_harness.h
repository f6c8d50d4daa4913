// Tests of attention: batches of any rows, and of rows that share pages, and the votes of their queries.
#pragma once

#include <map>

#include "kernels_harness.h"

// A batch, before its contents are drawn.
struct AttentionShape {
  Type type;
  int kv_heads, group, head_dim, page_size, pool;
  bool per_head;  // lists per KV head
  std::vector<int64_t> queries, lengths;
  int64_t window = 0;
  int rows() const { return int(queries.size()); }
  int lists() const { return per_head ? kv_heads : 1; }  // of a row
  int64_t first_seen(int64_t seen) const { return window > 0 ? std::max<int64_t>(seen - window, 0) : 0; }
  int64_t width() const { return (*std::max_element(lengths.begin(), lengths.end()) + page_size - 1) / page_size; }
};

// Number of pieces of work for two threads: rows of few queries are cut by segment, and where all of their queries see a
// segment that others list too, the pages before included, there is one piece for them all per KV head. With a window, no
// pieces before it, and none for several rows.
inline int64_t expected_pieces(const AttentionShape& shape, const std::vector<int64_t>& pages) {
  constexpr int64_t SEGMENT = 1024, TALL = 64, WIDE = 192;
  int64_t count = 0;
  std::map<std::vector<int64_t>, int> rows_of;  // by the first pages
  for (int row = 0; row < shape.rows(); row++) {
    const int64_t n = shape.queries[row], length = shape.lengths[row], wanted = n * shape.group * shape.rows() * shape.kv_heads / 8;
    const int64_t most = std::max<int64_t>(1, std::clamp(wanted, TALL, WIDE) / shape.group);
    const auto list = pages.begin() + row * shape.lists() * shape.width();
    if (n * shape.group > TALL) {
      count += (n + most - 1) / most * shape.kv_heads;
      continue;
    }
    for (int64_t end = shape.first_seen(length - n + 1) / SEGMENT * SEGMENT + SEGMENT; end - SEGMENT < length; end += SEGMENT) {
      if (shape.window > 0 || shape.per_head || length <= SEGMENT || length - n + 1 < end) count++;
      else rows_of[{list, list + (end + shape.page_size - 1) / shape.page_size}]++;
    }
  }
  for (const auto& each : rows_of) count += each.second > 1 ? shape.kv_heads : 1;
  return count;
}

// Votes of some queries, and the memory that they go to.
struct Poll {
  std::vector<int64_t> voters;
  Tensor votes;
  Poll(Random& random, int rows, const int64_t* queries, size_t units) : votes(Type::f32, units) {
    for (int row = 0; row < rows; row++) {
      const int64_t first = random.below(queries[row] + 1) - 1;
      voters.push_back(first), voters.push_back(first < 0 ? -1 : random.below(queries[row] + 1) - 1);
    }
    for (size_t i = 0; i < units; i++) votes.set(i, NAN);
  }
};

// pages: [rows][lists][width].
inline void check_attention(Random& random, const char* name, const AttentionShape& shape, std::vector<int64_t> pages) {
  const auto& [type, kv_heads, group, head_dim, page_size, pool, per_head, queries, lengths, window] = shape;
  const int rows = shape.rows(), heads = kv_heads * group, q_gap = random.of({0, 0, 1, 16}), page_gap = random.of({0, 0, 1, 64});
  const std::string what = describe(name, int(type), kv_heads, group, head_dim, page_size, per_head, rows, queries[0], lengths[0], window);
  std::vector<int64_t> starts;
  int64_t tokens = 0;
  for (const int64_t n : queries) starts.push_back(tokens), tokens += n;
  const int64_t width = shape.width(), page_stride = int64_t(kv_heads) * page_size * head_dim + page_gap;
  const int64_t q_stride = int64_t(heads) * head_dim + q_gap;
  Tensor k = normal(random, type, size_t(pool) * page_stride - page_gap), v = normal(random, type, k.size());
  Tensor q = normal(random, type, size_t(tokens) * q_stride - q_gap);
  AttentionArgs args{};
  args.type = type, args.k = k.at(0), args.v = v.at(0);
  args.heads = heads, args.kv_heads = kv_heads, args.head_dim = head_dim, args.page_size = page_size;
  args.q_stride = q_stride, args.page_stride = page_stride;
  args.row_stride = width * shape.lists(), args.head_stride = per_head ? width : 0;
  args.window = window;
  args.scale = float(1 / std::sqrt(double(head_dim)));
  do args.vote_unit = random.of({1, page_size, 1 + int(random.below(page_size))});
  while (page_size % args.vote_unit);
  const int64_t units = width * page_size / args.vote_unit;
  args.votes_head_stride = units + random.of({0, 3}), args.votes_row_stride = kv_heads * args.votes_head_stride;
  const auto ask = [&](int count, const int64_t* n) { return Poll(random, count, n, size_t(count) * args.votes_row_stride); };
  const auto run = [&](int first_row, int count, const int64_t* n, const int64_t* length, int64_t token, int threads, Tensor& lse,
                       Poll* poll = nullptr) {
    int64_t total = 0;
    for (int row = 0; row < count; row++) total += n[row];
    Tensor out(type, size_t(total) * heads * head_dim);
    lse = Tensor(Type::f32, size_t(total) * heads);
    args.q = q.at(size_t(token) * q_stride), args.out = out.at(0), args.lse = static_cast<float*>(lse.at(0));
    std::vector<int64_t> listed(pages.begin() + first_row * args.row_stride, pages.end());
    for (int64_t i = 0; i < count * shape.lists(); i++) {  // pages that no query sees, and that are not there
      const int64_t row = i / shape.lists();
      std::fill_n(listed.begin() + i * width, shape.first_seen(length[row] - n[row] + 1) / page_size, int64_t(1) << 40);
    }
    args.rows = count, args.queries = n, args.lengths = length, args.pages = listed.data();
    args.voters = poll ? poll->voters.data() : nullptr;
    args.votes = poll ? static_cast<float*>(poll->votes.at(0)) : nullptr;
    args.fetch_blocks = random.of({1, 2, 3}), args.fetch_to_l2 = random.below(2);
    call(threads, args, kernels.attention, kernels.attention_scratch);
    return out;
  };
  Tensor lse(Type::f32, 0), lse_part(Type::f32, 0);
  const Tensor out = run(0, rows, queries.data(), lengths.data(), 0, 1, lse);
  for (int sample = 0; sample < 6; sample++) {
    const int row = int(random.below(rows)), head = int(random.below(heads));
    const int64_t query = sample == 0 ? queries[row] - 1 : random.below(queries[row]);
    const int64_t seen = lengths[row] - queries[row] + query + 1, place = (starts[row] + query) * heads + head;
    const size_t query_at = (starts[row] + query) * q_stride + int64_t(head) * head_dim;
    const int64_t* list = &pages[row * args.row_stride + head / group * args.head_stride];
    const auto at = [&](int64_t slot) {
      return size_t(list[slot / page_size] * page_stride + (int64_t(head / group) * page_size + slot % page_size) * head_dim);
    };
    std::vector<double> weights(seen);
    double peak = -INFINITY, total = 0;
    for (int64_t slot = shape.first_seen(seen); slot < seen; slot++) {
      double score = 0;
      const size_t from = at(slot);
      for (int d = 0; d < head_dim; d++) score += q.get(query_at + d) * k.get(from + d);
      weights[slot] = score * args.scale, peak = std::max(peak, weights[slot]);
    }
    for (int64_t slot = 0; slot < seen; slot++) total += weights[slot] = slot < shape.first_seen(seen) ? 0 : std::exp(weights[slot] - peak);
    const double error = type == Type::f32 ? 1e-5 : type == Type::bf16 ? 0x1p-7 : 0x1p-10;  // of weights, and of the result
    std::vector<double> expected(head_dim), sizes(head_dim);
    for (int64_t slot = 0; slot < seen; slot++) {
      const size_t from = at(slot);
      for (int d = 0; d < head_dim; d++) {
        const double each = weights[slot] / total * v.get(from + d);
        expected[d] += each, sizes[d] += std::abs(each);
      }
    }
    for (int d = 0; d < head_dim; d++) check(what, out.get(place * head_dim + d), expected[d], error * sizes[d] + 1e-6);
    check(what + " lse", lse.get(place), peak + std::log(total), error / 2 + 1e-6 * std::abs(peak));
  }
  // Votes, which change no result.
  Poll poll = ask(rows, queries.data());
  Poll* const asked = window > 0 ? nullptr : &poll;
  const Tensor same = run(0, rows, queries.data(), lengths.data(), 0, 2, lse_part, asked);
  check_same(what + " with votes", same, out, 0, out.size());
  check_same(what + " lse with votes", lse_part, lse, 0, lse.size());
  for (int sample = 0; asked && sample < 2; sample++) {
    const int row = int(random.below(rows)), head = int(random.below(kv_heads));
    const int64_t* voters = &poll.voters[2 * row];
    const int64_t own = (lengths[row] + args.vote_unit - 1) / args.vote_unit;
    std::vector<double> expected(own);
    const int64_t* list = &pages[row * args.row_stride + head * args.head_stride];
    for (int voter = 0; voter < 2 * group; voter++) {
      const int64_t behind = voters[voter / group], query = queries[row] - 1 - behind;
      if (behind < 0) continue;
      const int64_t token = starts[row] + query, place = token * heads + head * group + voter % group;
      for (int64_t slot = 0; slot < lengths[row] - behind; slot++) {
        const size_t at = list[slot / page_size] * page_stride + (int64_t(head) * page_size + slot % page_size) * head_dim;
        double score = 0;
        for (int d = 0; d < head_dim; d++)
          score += q.get(token * q_stride + int64_t(head * group + voter % group) * head_dim + d) * k.get(at + d);
        expected[slot / args.vote_unit] += std::exp(score * args.scale - lse.get(place));
      }
    }
    const double error = type == Type::f32 ? 1e-4 : type == Type::bf16 ? 0x1p-7 : 0x1p-9;
    const size_t from = row * args.votes_row_stride + head * args.votes_head_stride;
    for (int64_t unit = 0; unit < own; unit++) {
      const double got = poll.votes.get(from + unit);
      if (voters[0] >= 0 || voters[1] >= 0) check(what + " votes", got, expected[unit], error * expected[unit] + 1e-6);
      else if (!std::isnan(got)) fail(what, "votes without voters", got, NAN);
    }
    for (int64_t unit = own; unit < args.votes_head_stride; unit++)
      if (!std::isnan(poll.votes.get(from + unit))) fail(what, "votes for no slots", poll.votes.get(from + unit), NAN);
  }
  // Ranges of each row's queries, alone; then all rows from each one on.
  const size_t size = size_t(heads) * head_dim;
  for (int row = 0; row < rows; row++) {
    const auto check_part = [&](int first_row, int count, int64_t query, const int64_t* n, const int64_t* length, int threads) {
      const int64_t token = starts[first_row] + query;
      Poll votes = ask(count, n);
      const Tensor part = run(first_row, count, n, length, token, threads, lse_part, asked && random.below(2) ? &votes : nullptr);
      check_same(what, part, out, token * size, part.size());
      check_same(what + " lse", lse_part, lse, token * heads, lse_part.size());
    };
    for (const int64_t limit : {1, 2, 5, 16, 33}) {
      const int64_t n = std::min(limit, queries[row]), first = random.below(queries[row] - n + 1);
      const int64_t length = lengths[row] - queries[row] + first + n;
      check_part(row, 1, first, &n, &length, 1 + int(limit % 2));
    }
    check_part(row, rows - row, 0, &queries[row], &lengths[row], 2 + row);
    if (row > 0) continue;
    const int64_t expected = expected_pieces(shape, pages), found = std::max<int64_t>(pieces, 1);
    if (found != expected) fail(what, "other pieces", double(found), double(expected));
  }
}

inline void test_attention(Random& random) {
  AttentionShape shape;
  shape.type = any_type(random), shape.kv_heads = 1 + int(random.below(3)), shape.group = random.of({1, 2, 3, 4, 5, 7, 8, 16});
  shape.head_dim = random.of({16, 32, 48, 64, 64, 80, 112, 128, 128, 144, 256}), shape.page_size = random.of({1, 3, 7, 16, 32, 48, 64});
  shape.pool = std::max(5, 97 / shape.page_size), shape.per_head = random.below(2);
  for (int row = int(random.below(3)); row >= 0; row--) {
    int64_t n = random.of({1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 30, 33, 65});
    int64_t length = n + random.of({0, 1, 15, 16, 31, 63, 64, 65, 127, 200, 959, 1023, 1024, 1100, 2050});
    const auto too_much = [&] { return n * length * shape.kv_heads * shape.group * shape.head_dim > 1 << 20; };
    if (too_much()) length += 1 + random.below(3) - n, n = 1 + random.below(3);
    length = std::max(length, n);
    if (too_much()) length = n + random.of({1, 63, 130});
    shape.queries.push_back(n), shape.lengths.push_back(length);
  }
  if (random.below(2)) shape.window = random.of({1, 2, 15, 16, 17, 63, 64, 65, 100, 512, 1024, 1025, 3000});
  std::vector<int64_t> pages(shape.rows() * shape.lists() * shape.width());
  for (int64_t& page : pages) page = random.below(shape.pool);
  check_attention(random, "attention", shape, pages);
}

// Rows that list the same pages: the first ones, as in a tree, and others.
inline void test_shared_pages(Random& random) {
  AttentionShape shape;
  shape.type = any_type(random), shape.kv_heads = 1 + int(random.below(2)), shape.group = random.of({1, 2, 3, 4});
  shape.head_dim = random.of({16, 16, 32, 48, 64}), shape.page_size = random.of({3, 16, 16, 48, 64, 100, 1024});
  shape.per_head = random.below(8) == 0;
  const int rows = 2 + int(random.below(4));
  for (int row = 0; row < rows; row++) {
    shape.queries.push_back(random.below(8) == 0 ? 17 * 4 / shape.group : 1 + random.below(8));
    shape.lengths.push_back(random.of({1000, 1024, 1025, 1030, 1500, 2047, 2048, 2049, 2056, 3100}) + random.below(8));
  }
  const int64_t width = shape.width(), size = shape.lists() * width;
  shape.pool = int(rows * size);
  std::vector<int64_t> pages(rows * size);
  for (size_t i = 0; i < pages.size(); i++) pages[i] = i;
  for (int row = 1; row < rows; row++) {
    const auto own = pages.begin() + row * size, others = pages.begin() + random.below(row) * size;
    const int64_t shared = random.of({int64_t(0), random.below(width + 1), int64_t(1023 / shape.page_size + 1), width});
    for (int list = 0; list < shape.lists(); list++) std::copy_n(others + list * width, std::min(shared, width), own + list * width);
    if (random.below(3) == 0) own[random.below(width)] = random.below(shape.pool);
    if (random.below(4) == 0) std::copy_n(others + width / 2, width - width / 2, own + width / 2);
  }
  check_attention(random, "shared pages", shape, pages);
}
