// Products with weights of 8-bit codes, for kernels_harness.cpp.
#pragma once

#include "kernels_harness.h"

// The number of a code.
inline double value_of(Codes format, uint8_t code) {
  if (format == Codes::i8) return int8_t(code);
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double size = std::ldexp(exponent ? 8 + fraction : fraction, std::max(exponent, 1) - 10);
  return code >> 7 ? -size : size;
}

inline void test_coded(Random& random) {
  const auto format = Codes(random.below(2));
  const Type in = any_type(random), out = random.below(2) ? Type::f32 : in;
  const int group_size = random.of({2, 16, 32, 64, 128, 130, 192, 300});
  const int groups = group_size > 64 ? 1 + int(random.below(3)) : 1 + int(random.below(9)), held = groups * group_size;
  const int features = held - int(random.below(std::min(group_size, 20))), columns = random.near({1, 5, 16, 32, 48, 64, 100});
  const int rows = random.near({1, 4, 6, 12, 16, 24, 96, 200}), x_stride = features + random.of({0, 0, 1, 6});
  const auto gate = random.below(3) ? Gate::none : Gate(1 + random.below(3));
  const bool gated = gate != Gate::none, with_bias = random.below(2);
  const int blocks = gated ? (columns + 15) / 16 : (columns + BLOCK - 1) / BLOCK;
  const std::string what = describe("coded", int(format), int(in), int(out), rows, groups, group_size, features, columns, x_stride, int(gate), with_bias);

  const Tensor x = normal(random, in, size_t(rows - 1) * x_stride + features);
  // Packed columns, and as they are packed.
  std::vector<double> weights(size_t(blocks) * BLOCK * features);
  std::vector<float> scales(size_t(blocks) * groups * BLOCK), bias(size_t(blocks) * BLOCK);
  std::vector<uint8_t> packed(size_t(blocks) * held * BLOCK);
  for (float& each : bias) each = float(random.normal());
  for (float& each : scales) each = float((0.001 + 0.01 * random.uniform()) * (format == Codes::e4m3 ? E4M3_SCALE : 1));
  for (int column = 0; column < blocks * BLOCK; column++)
    for (int i = 0; i < held; i++) {
      const int block = column / BLOCK, of_block = column % BLOCK;
      uint8_t code = uint8_t(random.next());
      if (format == Codes::e4m3 && (code & 0x7f) == 0x7f) code = 0;  // NaN, which its scale would say
      packed[((size_t(block) * held + i / 2 * 2) * BLOCK) + of_block * 2 + i % 2] = code;
      const double scale = scales[(size_t(block) * groups + i / group_size) * BLOCK + of_block] / (format == Codes::e4m3 ? E4M3_SCALE : 1);
      if (i < features) weights[size_t(column) * features + i] = value_of(format, code) * scale;
    }
  CodedArgs args{};
  args.format = format, args.packed = packed.data(), args.scales = scales.data(), args.groups = groups, args.group_size = group_size;
  if (with_bias) args.bias = bias.data();
  args.columns = columns, args.gate = gate, args.in = in, args.out = out;
  args.features = features, args.x_stride = x_stride, args.y_stride = columns;
  const auto run = [&](int first, int count, int threads) {
    Tensor rows_of_x(in, size_t(count - 1) * x_stride + features), y(out, size_t(count) * columns);
    std::memcpy(rows_of_x.at(0), x.bytes.data() + size_t(first) * x_stride * size_of(in), rows_of_x.bytes.size());
    args.x = rows_of_x.at(0), args.rows = count, args.y = y.at(0);
    call(threads, args, kernels.coded, kernels.coded_scratch);
    return y;
  };
  const Tensor y = run(0, rows, 1);
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column++) {
      // Returns the product with a packed column, and sets the largest error of its sum.
      const auto product = [&](int packed_column, double& error) {
        double total = 0, size = 0;
        for (int i = 0; i < features; i++) {
          const double each = x.get(size_t(row) * x_stride + i) * weights[size_t(packed_column) * features + i];
          total += each, size += std::abs(each);
        }
        if (with_bias) total += bias[packed_column];
        error = 2e-6 * size + 4e-7 * std::abs(total);
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
      error += rounding(out) * std::abs(expected) + 0x1p-25;
      check(what, y.get(size_t(row) * columns + column), expected, error);
    }
  for_ranges(random, rows, [&](int first, int count, int threads) {
    check_same(what, run(first, count, threads), y, size_t(first) * columns, size_t(count) * columns);
  });
}
