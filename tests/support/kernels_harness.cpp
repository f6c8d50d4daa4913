// Runs the CPU kernels without torch: on emulated processors, and under sanitizers.
//
//     g++ -std=gnu++17 -O2 -pthread -Ikernels/cpu/csrc FLAGS kernels/cpu/csrc/kernels.cpp tests/support/kernels_harness.cpp
//     ./a.out [CASES [SEED]]
//
// Each case draws the sizes, types and contents of one call per kernel. Its results are compared with a plain reference in
// double precision, and then with those of calls that have fewer rows, other places and other numbers of threads: they
// must be the same to the bit.
#include "attention_harness.h"
#include "bounds_harness.h"
#include "int4_harness.h"
#include "coded_harness.h"
#include "kernels_harness.h"

namespace {

// -- linear -----------------------------------------------------------------------------------------------------------

void test_linear(Random& random) {
  const auto format = Weights(random.below(4));
  const bool bytes = format == Weights::i8;
  const Type in = bytes ? any_type(random) : Type(int(format)), out = random.below(2) ? Type::f32 : in;
  const int features = random.near({1, 3, 16, 32, 37, 64, 96, 128, 202, 577}), columns = random.near({1, 5, 16, 32, 48, 64, 100});
  const int rows = random.near({1, 4, 6, 12, 16, 24, 32, 64, 96}), x_stride = features + random.of({0, 0, 1, 6});
  const auto gate = random.below(3) ? Gate::none : Gate(1 + random.below(3));
  const bool gated = gate != Gate::none, with_bias = random.below(2);
  const bool denormal = !bytes && random.below(8) == 0;  // products and biases: all paths treat them alike
  const int elements = bytes ? 4 : format == Weights::f32 ? 1 : 2;
  const int words = (features + 16 * elements - 1) / (16 * elements) * 16;
  const int blocks = gated ? (columns + 15) / 16 : (columns + BLOCK - 1) / BLOCK;
  const std::string what = describe("linear", int(format), int(in), int(out), rows, features, columns, x_stride, int(gate), with_bias);

  // Bytes: the largest input is 127 / 128, so that quantizing is exact and so are the sums.
  Tensor x = normal(random, in, size_t(rows - 1) * x_stride + features, denormal ? 1e-20 : 1);
  if (bytes) {
    for (size_t i = 0; i < x.size(); i++) x.set(i, double(random.below(255) - 127) / 128 + double(random.below(17) - 8) / 2048);
    for (size_t i = 0; i < x.size(); i++)
      if (std::abs(x.get(i)) > 127.0 / 128) x.set(i, 127.0 / 128);
    for (int row = 0; row < rows; row++) x.set(size_t(row) * x_stride + random.below(features), random.of({127.0, -127.0}) / 128);
  }
  // Packed columns, and as they are packed.
  const int held = blocks * BLOCK;
  std::vector<double> weights(size_t(held) * features);
  std::vector<float> scales(held), bias(held);
  std::vector<int32_t> offsets(held);
  std::vector<uint32_t> packed(size_t(blocks) * words * BLOCK);
  for (int column = 0; column < held; column++) {
    scales[column] = float(0.001 + 0.01 * random.uniform());
    bias[column] = float(random.normal() * (denormal ? 1e-39 : 1));
    for (int i = 0; i < features; i++) {
      auto* word = &packed[(size_t(column / BLOCK) * words + i / elements) * BLOCK + column % BLOCK];
      double& weight = weights[size_t(column) * features + i];
      if (bytes) {
        const auto byte = int8_t(random.below(255) - 127);
        weight = byte;
        offsets[column] -= 128 * byte;
        std::memcpy(reinterpret_cast<uint8_t*>(word) + i % 4, &byte, 1);
      } else {
        Tensor one(in, 1);
        one.set(0, random.normal() * (denormal ? 1e-20 : 1));
        weight = one.get(0);
        std::memcpy(reinterpret_cast<uint8_t*>(word) + i % elements * size_of(in), one.at(0), size_of(in));
      }
    }
  }
  LinearArgs args{};
  args.format = format, args.packed = packed.data();
  if (bytes) args.scales = scales.data(), args.offsets = offsets.data();
  if (with_bias) args.bias = bias.data();
  args.words = words, args.columns = columns, args.gate = gate;
  args.in = in, args.out = out, args.features = features, args.x_stride = x_stride, args.y_stride = columns;
  const auto run = [&](int first, int count, int threads) {
    Tensor y(out, size_t(count) * columns);
    args.x = x.at(size_t(first) * x_stride), args.rows = count, args.y = y.at(0);
    args.tiles_from = random.of({1, 16, 1 << 30});
    call(threads, args, kernels.linear, kernels.linear_scratch);
    return y;
  };
  const Tensor y = run(0, rows, 1);
  std::vector<double> inputs(features);
  for (int row = 0; row < rows; row++) {
    for (int i = 0; i < features; i++) {
      const double input = x.get(size_t(row) * x_stride + i);
      inputs[i] = bytes ? std::nearbyint(input * 128) : input;
    }
    for (int column = 0; column < columns; column++) {
      // Returns the product with a packed column, and adds its largest error to `error`.
      const auto product = [&](int packed_column, double& error) {
        double total = 0, size = 0;
        for (int i = 0; i < features; i++) {
          const double each = inputs[i] * weights[size_t(packed_column) * features + i];
          total += each, size += std::abs(each);
        }
        if (bytes) total = float(total) * (scales[packed_column] * (1.0f / 128)), size = 0;
        if (with_bias) total += bias[packed_column];
        error = 1e-5 * size + (bytes && !with_bias && !gated ? 0 : 4e-7 * std::abs(total));
        return total;
      };
      double error, expected;
      if (gated) {
        double of_gate, of_value;
        const int at = column / 16 * BLOCK + column % 16;
        const double g = product(at, of_gate), value = product(at + 16, of_value);
        error = 0;
        expected = join(gate, g, value, of_gate, of_value, error);
      } else {
        expected = product(column, error);
      }
      if (out != Type::f32 || error > 0) error += rounding(out) * std::abs(expected) + 0x1p-25;
      check(what, y.get(size_t(row) * columns + column), expected, error);
    }
  }
  for_ranges(random, rows, [&](int first, int count, int threads) {
    check_same(what, run(first, count, threads), y, size_t(first) * columns, size_t(count) * columns);
  });
}

// -- norm, rotary, sample ---------------------------------------------------------------------------------------------

void test_norm(Random& random) {
  const Type type = any_type(random);
  const int rows = random.of({1, 9, 40}), size = random.near({5, 16, 37, 64, 576});
  const bool with_delta = random.below(2);
  const std::string what = describe("norm", int(type), rows, size, with_delta);
  const Tensor before = normal(random, type, size_t(rows) * size);
  Tensor delta = normal(random, type, before.size()), weight = normal(random, type, size);
  NormArgs args{};
  args.type = type, args.weight = weight.at(0), args.size = size, args.eps = 1e-5f;
  const auto run = [&](int first, int count, int threads, Tensor& x) {
    x = Tensor(type, size_t(count) * size);
    std::memcpy(x.at(0), before.bytes.data() + first * size * size_of(type), x.bytes.size());
    Tensor out(type, x.size());
    args.x = x.at(0), args.out = out.at(0), args.rows = count;
    args.delta = with_delta ? delta.at(size_t(first) * size) : nullptr;
    call(threads, args, kernels.norm);
    return out;
  };
  Tensor x(type, 0), x_part(type, 0);
  const Tensor out = run(0, rows, 1, x);
  for (int row = 0; row < rows; row++) {
    double squares = 0;
    for (int i = row * size; i < (row + 1) * size; i++) {
      const double sum = before.get(i) + (with_delta ? delta.get(i) : 0);
      check(what + " sum", x.get(i), sum, rounding(type) * std::abs(sum) + 0x1p-25);
      squares += x.get(i) * x.get(i);
    }
    for (int i = 0; i < size; i++) {
      const double expected = x.get(row * size + i) / std::sqrt(squares / size + 1e-5) * weight.get(i);
      check(what, out.get(row * size + i), expected, (rounding(type) + 1e-6) * std::abs(expected) + 0x1p-25);
    }
  }
  for_ranges(random, rows, [&](int first, int count, int threads) {
    check_same(what, run(first, count, threads, x_part), out, size_t(first) * size, size_t(count) * size);
    check_same(what + " sum", x_part, x, size_t(first) * size, size_t(count) * size);
  });
}

void test_rotary(Random& random) {
  const Type type = any_type(random);
  const int kv_heads = 1 + int(random.below(2)), heads = kv_heads * (1 + int(random.below(3))), all = heads + 2 * kv_heads;
  const int head_dim = random.of({2, 8, 16, 48, 64, 80, 128}), half = head_dim / 2, page_size = random.of({1, 7, 16}), limit = 50;
  const int tokens = random.of({1, 11, 40}), pool = 5 + tokens / page_size;
  const bool with_norms = random.below(2);
  const std::string what = describe("rotary", int(type), kv_heads, heads, head_dim, page_size, tokens, with_norms);
  const Tensor before = normal(random, type, size_t(tokens) * all * head_dim);
  Tensor q_norm = normal(random, type, head_dim), k_norm = normal(random, type, head_dim);
  std::vector<float> cos(limit * half), sin(limit * half);
  for (int i = 0; i < limit * half; i++) cos[i] = float(std::cos(0.1 * i)), sin[i] = float(std::sin(0.1 * i));
  std::vector<int64_t> positions(tokens), slots(tokens);
  const int64_t shift = random.below(pool * page_size);
  for (int i = 0; i < tokens; i++) positions[i] = random.below(limit), slots[i] = (shift + i) % (pool * page_size);
  RotaryArgs args{};
  args.type = type, args.cos = cos.data(), args.sin = sin.data(), args.eps = 1e-5f;
  if (with_norms) args.q_norm = q_norm.at(0), args.k_norm = k_norm.at(0);
  args.heads = heads, args.kv_heads = kv_heads, args.head_dim = head_dim, args.page_size = page_size;
  args.page_stride = int64_t(kv_heads) * page_size * head_dim;
  Tensor k(type, size_t(pool) * args.page_stride), v(type, k.size());
  const auto run = [&](int first, int count, int threads) {  // returns the tokens as the kernel leaves them, keys included
    Tensor qkv(type, size_t(count) * all * head_dim);
    std::memcpy(qkv.at(0), before.bytes.data() + size_t(first) * all * head_dim * size_of(type), qkv.bytes.size());
    std::fill(k.bytes.begin(), k.bytes.end(), 0), std::fill(v.bytes.begin(), v.bytes.end(), 0);
    args.qkv = qkv.at(0), args.positions = &positions[first], args.slots = &slots[first], args.tokens = count;
    args.k = k.at(0), args.v = v.at(0);
    call(threads, args, kernels.rotary);
    for (int token = 0; token < count; token++) {
      for (int h = 0; h < 2 * kv_heads; h++) {
        const int64_t slot = slots[first + token], page = slot / page_size * args.page_stride;
        const size_t stored = page + (int64_t(h % kv_heads) * page_size + slot % page_size) * head_dim;
        const uint8_t* from = (h < kv_heads ? k : v).bytes.data() + stored * size_of(type);
        if (std::memcmp(from, qkv.at((size_t(token) * all + heads + h) * head_dim), head_dim * size_of(type)) != 0)
          fail(what, "not what is stored", h, token);
      }
    }
    return qkv;
  };
  const Tensor out = run(0, tokens, 1);
  for (int head = 0; head < tokens * all; head++) {
    const size_t at = size_t(head) * head_dim;
    const int token = head / all, which = head % all;
    std::vector<double> x(head_dim);
    double squares = 0;
    for (int d = 0; d < head_dim; d++) x[d] = before.get(at + d), squares += x[d] * x[d];
    if (with_norms && which < heads + kv_heads)
      for (int d = 0; d < head_dim; d++) x[d] *= (which < heads ? q_norm : k_norm).get(d) / std::sqrt(squares / head_dim + 1e-5);
    for (int d = 0; d < half; d++) {
      const size_t angle = positions[token] * half + d;
      const bool turned = which < heads + kv_heads;
      const double c = turned ? cos[angle] : 1, s = turned ? sin[angle] : 0;
      const double error = (2.2 * rounding(type) + 1e-6) * (std::abs(x[d]) + std::abs(x[d + half])) + 0x1p-24;
      check(what, out.get(at + d), x[d] * c - x[d + half] * s, error);
      check(what, out.get(at + d + half), x[d + half] * c + x[d] * s, error);
    }
  }
  for_ranges(random, tokens, [&](int first, int count, int threads) {
    check_same(what, run(first, count, threads), out, size_t(first) * all * head_dim, size_t(count) * all * head_dim);
  });
}

void test_sample(Random& random) {
  const int rows = random.of({1, 3, 9});
  const int64_t size = random.near({1, 16, 100, 4096, 9001}), stride = size + random.of({0, 3}), first = random.of({0, 0, 20000});
  const std::string what = describe("sample", rows, size, stride, first);
  Tensor logits = normal(random, Type::f32, size_t(rows - 1) * stride + size, 3);
  std::vector<float> temperature(rows);
  std::vector<int64_t> seeds(rows), positions(rows);
  for (int row = 0; row < rows; row++) {
    temperature[row] = random.of({0.0f, 0.5f, 1.0f, 1.7f});
    seeds[row] = int64_t(random.next()), positions[row] = random.below(100000);
  }
  if (random.below(3) == 0)  // equal ones
    for (size_t i = 0; i < logits.size(); i++) logits.set(i, std::nearbyint(logits.get(i) / 4));
  const bool impossible = random.below(4) == 0, unordered = random.below(4) == 0;
  if (impossible)
    for (int64_t i = 0; i < size; i++) logits.set(i, -INFINITY);
  if (unordered) logits.set((rows - 1) * stride + random.below(size), NAN);
  SampleArgs args{};
  args.stride = stride, args.size = size, args.first = first;
  const auto run = [&](int from, int count, int threads, std::vector<int64_t>& tokens) {
    Tensor values(Type::f32, count);
    for (int row = 0; row < count; row++) values.set(row, -INFINITY);
    tokens.assign(count, first);
    args.logits = static_cast<const float*>(logits.at(from * stride)), args.rows = count;
    args.temperature = &temperature[from], args.seeds = &seeds[from], args.positions = &positions[from];
    args.values = static_cast<float*>(values.at(0)), args.tokens = tokens.data();
    call(threads, args, kernels.sample, kernels.sample_scratch);
    return values;
  };
  std::vector<int64_t> tokens, tokens_part;
  const Tensor values = run(0, rows, 1, tokens);
  for (int row = 0; row < rows; row++) {
    if (unordered && row == rows - 1) {
      if (!std::isnan(values.get(row))) fail(what, "no NaN", values.get(row), NAN);
      continue;
    }
    const auto value = [&](int64_t token) {
      const double logit = logits.get(row * stride + token);
      return temperature[row] > 0 ? logit / temperature[row] + noise(seeds[row], positions[row], first + token) : logit;
    };
    double best = -INFINITY;
    int64_t lowest = 0;
    for (int64_t token = 0; token < size; token++)
      if (const double each = value(token); each > best) best = each, lowest = token;
    const int64_t got = tokens[row] - first;
    if ((impossible && row == 0) || temperature[row] == 0) {
      if (values.get(row) != best || got != lowest) fail(what, "not the first of the largest", double(got), double(lowest));
    } else if (got < 0 || got >= size) {
      fail(what, "no token", double(got), 0);
    } else {
      check(what, values.get(row), best, 1e-5 * std::max(1.0, std::abs(best)));
      check(what + " token", value(got), best, 1e-5 * std::max(1.0, std::abs(best)));
    }
  }
  for_ranges(random, rows, [&](int from, int count, int threads) {
    check_same(what, run(from, count, threads, tokens_part), values, from, count);
    for (int row = 0; row < count; row++)
      if (!std::isnan(values.get(from + row)) && tokens_part[row] != tokens[from + row])
        fail(what, "another token", double(tokens_part[row]), double(tokens[from + row]));
  });
}

void test_best(Random& random) {
  const int64_t rows = random.of({1, 3, 40}), size = random.near({1, 16, 37, 200, 1000, 3000});
  const int64_t count = random.below(4) == 0 ? size : 1 + random.below(size);
  const std::string what = describe("best", rows, size, count);
  Tensor x = normal(random, Type::f32, size_t(rows * size), random.of({1e-30, 1.0, 1e30}));
  if (random.below(3) == 0)  // equal ones, zeros of both signs too
    for (size_t i = 0; i < x.size(); i++) x.set(i, std::nearbyint(x.get(i)));
  if (random.below(4) == 0) x.set(random.below(x.size()), -INFINITY);
  BestArgs args{};
  args.size = size, args.count = count;
  const auto run = [&](int first, int many, int threads) {
    std::vector<int64_t> indices(many * count);
    args.x = static_cast<const float*>(x.at(first * size)), args.rows = many, args.indices = indices.data();
    call(threads, args, kernels.best, kernels.best_scratch);
    return indices;
  };
  std::vector<int64_t> expected;
  for (int64_t row = 0; row < rows; row++) {
    std::vector<int64_t> order(size);
    for (int64_t i = 0; i < size; i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.get(row * size + a) > x.get(row * size + b); });
    expected.insert(expected.end(), order.begin(), order.begin() + count);
  }
  for_ranges(random, int(rows), [&](int first, int many, int threads) {
    const std::vector<int64_t> found = run(first, many, threads);
    for (size_t i = 0; i < found.size(); i++)
      if (found[i] != expected[first * count + i]) return fail(what, "another index", double(found[i]), double(expected[first * count + i]));
  });
}

}  // namespace

int main(int count, char** arguments) {
  if (!kernels.permitted()) {
    std::printf("the system does not permit the instructions of this set\n");
    return 1;
  }
  const int cases = count > 1 ? std::atoi(arguments[1]) : 20;
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  for (int each = 0; each < cases; each++) {
    Random random{mix64(seed + uint64_t(each))};
    test_linear(random);
    test_int4(random);
    test_coded(random);
    test_attention(random);
    test_shared_pages(random);
    test_norm(random);
    test_rotary(random);
    test_sample(random);
    test_best(random);
    test_bounds(random);
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures > 0;
}
