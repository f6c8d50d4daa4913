// Checks of the operators' arguments, and what their kernels take of them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "kernels.h"
#include "pool.h"

namespace {

using at::Tensor;
using namespace magicdec;

const Kernels& table(int64_t kernels) { return *reinterpret_cast<const Kernels*>(kernels); }

// As many threads as torch's own operators have: torch.set_num_threads.
Team team() {
  return {at::get_num_threads(), [](int threads, int64_t pieces, Pool::Work work, void* context) {
            Pool::instance().run(threads, pieces, work, context);
          }};
}

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Type::f32;
    case at::kBFloat16:
      return Type::bf16;
    case at::kHalf:
      return Type::f16;
    default:
      TORCH_CHECK(false, "no kernel for ", x.scalar_type());
  }
}

Tensor scratch_of(size_t bytes) { return at::empty({int64_t(bytes)}, at::kByte); }

void check_ints(const Tensor& x, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kLong && x.is_contiguous(), name, ": expected contiguous int64");
}

// Fails unless the last `dims` dimensions of x are contiguous.
void check_rows(const Tensor& x, int dims, const char* name) {
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i >= x.dim() - dims; i--) {
    TORCH_CHECK(x.stride(i) == expected || x.size(i) == 1, name, ": rows must be contiguous");
    expected *= x.size(i);
  }
}

// Fails unless all of x, contiguous int64, are in [0, limit).
void check_range(const Tensor& x, int64_t limit, const char* name) {
  const int64_t* values = x.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < x.numel(); i++)
    TORCH_CHECK(values[i] >= 0 && values[i] < limit, name, ": ", values[i], " is not below ", limit);
}

const float* floats(const std::optional<Tensor>& x) { return x ? x->const_data_ptr<float>() : nullptr; }

}  // namespace
