// Tests of products with weights of 4 bits.
#pragma once

#include "kernels_harness.h"

inline void test_int4(Random& random) {
  const Type in = any_type(random), out = random.below(2) ? Type::f32 : in;
  const int size = random.of({8, 16, 24, 32, 64, 128, 264}), features = random.near({16, 64, 128, 202, 577});
  const int columns = random.near({1, 5, 16, 32, 48, 100}), rows = random.near({1, 4, 12, 24, 48, 100});
  const int x_stride = features + random.of({0, 0, 1, 6}), groups = (features + size - 1) / size, words = groups * size / 8;
  const auto zeros = Zeros(random.below(4));
  const bool half_scales = random.below(2), half_minima = zeros == Zeros::halves, with_bias = random.below(2);
  const int blocks = (columns + BLOCK - 1) / BLOCK, held = blocks * BLOCK;
  const std::string what = describe("int4", int(in), int(out), rows, features, size, columns, x_stride, int(zeros), half_scales, with_bias);

  Tensor x = normal(random, in, size_t(rows - 1) * x_stride + features);
  if (random.below(3) == 0)  // a row of zeros
    for (int i = 0; i < features; i++) x.set(i, 0);
  // Numbers of groups are [blocks][groups][BLOCK].
  Tensor scales(half_scales ? Type::f16 : Type::f32, size_t(groups) * held), minima(half_minima ? Type::f16 : Type::f32, scales.size());
  std::vector<uint8_t> points(scales.size()), packed(size_t(words) * held * 4);
  std::vector<float> bias(held);
  const auto at = [&](int column, int group) { return (size_t(column / BLOCK) * groups + group) * BLOCK + column % BLOCK; };
  for (size_t i = 0; i < scales.size(); i++) {
    scales.set(i, 0.01 + 0.1 * random.uniform());
    minima.set(i, -random.uniform());
    points[i] = uint8_t(random.below(16));
  }
  std::vector<int> codes(size_t(held) * words * 8);
  for (int column = 0; column < held; column++) {
    bias[column] = float(random.normal());
    for (int i = 0; i < words * 8; i++) {  // codes of features that are not there, too
      const int code = codes[size_t(column) * words * 8 + i] = int(random.below(16));
      const size_t word = (size_t(column / BLOCK) * words + i / 8) * BLOCK + column % BLOCK;
      packed[word * 4 + i % 4] |= uint8_t(code << (i % 8 / 4 * 4));
    }
  }
  Int4Args args{};
  args.packed = reinterpret_cast<const uint32_t*>(packed.data()), args.words = words, args.groups = groups;
  args.group_scales = scales.at(0), args.half_scales = half_scales, args.zeros = zeros;
  if (zeros == Zeros::points) args.group_zeros = points.data();
  if (zeros >= Zeros::halves) args.group_zeros = minima.at(0);
  if (with_bias) args.bias = bias.data();
  args.columns = columns, args.in = in, args.out = out, args.features = features, args.x_stride = x_stride, args.y_stride = columns;
  const auto run = [&](int first, int count, int threads) {
    Tensor y(out, size_t(count) * columns);
    args.x = x.at(size_t(first) * x_stride), args.rows = count, args.y = y.at(0);
    call(threads, args, kernels.linear_int4, kernels.linear_int4_scratch);
    return y;
  };
  const Tensor y = run(0, rows, 1);
  for (int row = 0; row < rows; row++) {
    for (int column = 0; column < columns; column++) {
      double expected = with_bias ? bias[column] : 0, error = 0;
      for (int group = 0; group < groups; group++) {
        const double scale = scales.get(at(column, group));
        const double minimum = zeros == Zeros::eight    ? -8 * scale
                               : zeros == Zeros::points ? -points[at(column, group)] * scale
                                                        : minima.get(at(column, group));
        double peak = 0, weights = 0, parts = 0;
        for (int i = group * size; i < std::min(features, (group + 1) * size); i++) {
          const double input = x.get(size_t(row) * x_stride + i), part = scale * codes[size_t(column) * words * 8 + i];
          expected += input * (part + minimum);
          peak = std::max(peak, std::abs(input)), weights += std::abs(part + minimum), parts += part + std::abs(minimum);
        }
        error += peak / 127 * 0.5001 * weights + 1e-6 * peak * parts;  // inputs are off by half of their scale
      }
      check(what, y.get(size_t(row) * columns + column), expected, error + rounding(out) * (std::abs(expected) + error) + 1e-6);
    }
  }
  for_ranges(random, rows, [&](int first, int count, int threads) {
    check_same(what, run(first, count, threads), y, size_t(first) * columns, size_t(count) * columns);
  });
}
