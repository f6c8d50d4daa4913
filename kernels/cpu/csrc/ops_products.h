// The operators of matrix products.
#pragma once

#include <optional>

#include "ops_arguments.h"

namespace {

// Sets what all products have in common, and returns their result's memory. blocks: of the weights.
Tensor prepare(ProductArgs& args, const Tensor& x, int64_t blocks, const std::optional<Tensor>& bias, int64_t features, int64_t columns,
               int64_t gate, bool float_out) {
  check_rows(x, 1, "x");
  TORCH_CHECK(x.size(1) == features, "linear: x has ", x.size(1), " features, the weights ", features);
  TORCH_CHECK(gate >= 0 && gate <= 3, "linear: gate ", gate);
  TORCH_CHECK(columns * (gate ? 2 : 1) <= blocks * BLOCK, "linear: more columns than weights");
  TORCH_CHECK(!bias || (bias->numel() == blocks * BLOCK && bias->is_contiguous()), "linear: one number per packed column");
  args.team = team();
  args.bias = floats(bias);
  args.columns = int(columns);
  args.gate = Gate(int(gate));
  args.in = type_of(x);
  args.x = x.const_data_ptr();
  args.features = int(features);
  args.x_stride = x.stride(0);
  args.rows = int(x.size(0));
  Tensor y = at::empty({x.size(0), columns}, x.options().dtype(float_out ? at::kFloat : x.scalar_type()));
  args.out = type_of(y);
  args.y = y.mutable_data_ptr();
  args.y_stride = columns;
  return y;
}

template <class Args>
void run(const Args& args, void (*kernel)(const Args&), size_t (*scratch_size)(const Args&)) {
  Args with_scratch = args;
  Tensor scratch;
  if (const size_t bytes = scratch_size(args)) {
    scratch = scratch_of(bytes);
    with_scratch.scratch = scratch.mutable_data_ptr();
  }
  kernel(with_scratch);
}

Tensor linear(int64_t kernels, const Tensor& x, const Tensor& packed, const std::optional<Tensor>& scales,
              const std::optional<Tensor>& offsets, const std::optional<Tensor>& bias, int64_t features, int64_t columns, int64_t gate,
              bool float_out, int64_t tiles_from) {
  TORCH_CHECK(x.dim() == 2 && packed.dim() == 4 && packed.size(2) == BLOCK && packed.is_contiguous(), "linear: shapes");
  LinearArgs args{};
  const bool bytes = packed.scalar_type() == at::kChar;
  args.format = bytes ? Weights::i8 : Weights(int(type_of(packed)));
  TORCH_CHECK(bytes || int(args.format) == int(type_of(x)), "linear: weights are ", packed.scalar_type(), ", x is ", x.scalar_type());
  TORCH_CHECK(!bytes || (scales && offsets), "linear: bytes need scales and offsets");
  args.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  args.scales = floats(scales);
  args.offsets = offsets ? offsets->const_data_ptr<int32_t>() : nullptr;
  args.words = int(packed.size(1));
  args.tiles_from = int(tiles_from);
  TORCH_CHECK(packed.size(1) % 16 == 0 && features <= packed.size(1) * packed.size(3), "linear: ", features, " features");
  for (const auto* each : {&scales, &offsets})
    TORCH_CHECK(!*each || ((*each)->numel() == packed.size(0) * BLOCK && (*each)->is_contiguous()), "linear: one number per packed column");
  Tensor y = prepare(args, x, packed.size(0), bias, features, columns, gate, float_out);
  if (y.numel()) run(args, table(kernels).linear, table(kernels).linear_scratch);
  return y;
}

Tensor linear_coded(int64_t kernels, const Tensor& x, const Tensor& packed, bool e4m3, const Tensor& scales,
                    const std::optional<Tensor>& bias, int64_t features, int64_t columns, int64_t gate, bool float_out) {
  TORCH_CHECK(x.dim() == 2 && packed.dim() == 4 && packed.size(2) == BLOCK && packed.size(3) == 2 && packed.scalar_type() == at::kByte &&
              packed.is_contiguous(), "linear_coded: codes");
  TORCH_CHECK(scales.dim() == 3 && scales.size(0) == packed.size(0) && scales.size(2) == BLOCK && scales.is_contiguous(), "linear_coded: scales");
  CodedArgs args{};
  args.format = e4m3 ? Codes::e4m3 : Codes::i8;
  args.packed = packed.const_data_ptr<uint8_t>();
  args.scales = scales.const_data_ptr<float>();
  args.groups = int(scales.size(1));
  TORCH_CHECK(args.groups > 0 && packed.size(1) % args.groups == 0 && packed.size(1) > 0, "linear_coded: groups");
  args.group_size = int(packed.size(1) / args.groups * 2);
  TORCH_CHECK(features <= packed.size(1) * 2, "linear_coded: ", features, " features");
  Tensor y = prepare(args, x, packed.size(0), bias, features, columns, gate, float_out);
  if (y.numel()) run(args, table(kernels).coded, table(kernels).coded_scratch);
  return y;
}

// zeros: bytes, or minima as scales are; none: 8.
Tensor linear_int4(int64_t kernels, const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                   const std::optional<Tensor>& bias, int64_t features, int64_t columns, int64_t gate, bool float_out) {
  TORCH_CHECK(x.dim() == 2 && codes.dim() == 4 && codes.size(2) == BLOCK && codes.size(3) == 4 && codes.is_contiguous() &&
              codes.scalar_type() == at::kByte, "linear_int4: codes");
  const int64_t blocks = codes.size(0), words = codes.size(1), groups = scales.size(1);
  const auto is_number = [](const Tensor& each) { return each.scalar_type() == at::kHalf || each.scalar_type() == at::kFloat; };
  TORCH_CHECK(scales.dim() == 3 && scales.size(0) == blocks && scales.size(2) == BLOCK && groups > 0 && words % groups == 0 &&
              is_number(scales) && scales.is_contiguous(), "linear_int4: scales");
  TORCH_CHECK(!zeros || (zeros->sizes() == scales.sizes() && zeros->is_contiguous() && (is_number(*zeros) || zeros->scalar_type() == at::kByte)), "linear_int4: zeros");
  TORCH_CHECK(features <= words * 8 && features > (words - words / groups) * 8 && words / groups * 8 <= 1 << 17, "linear_int4: ", features, " features");
  Int4Args args{};
  args.packed = static_cast<const uint32_t*>(codes.const_data_ptr());
  args.words = int(words);
  args.groups = int(groups);
  args.group_scales = scales.const_data_ptr();
  args.half_scales = scales.scalar_type() == at::kHalf;
  args.group_zeros = zeros ? zeros->const_data_ptr() : nullptr;
  args.zeros = !zeros                               ? Zeros::eight
               : zeros->scalar_type() == at::kByte ? Zeros::points
               : zeros->scalar_type() == at::kHalf ? Zeros::halves
                                                   : Zeros::floats;
  Tensor y = prepare(args, x, blocks, bias, features, columns, gate, float_out);
  if (y.numel()) run(args, table(kernels).linear_int4, table(kernels).linear_int4_scratch);
  return y;
}

}  // namespace
