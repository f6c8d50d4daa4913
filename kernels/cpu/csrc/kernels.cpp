// A library of kernels for one instruction set: the compiler's flags say which (kernels/cpu/build.py).
#include "attention.h"
#include "kernels.h"
#include "linear.h"
#include "pointwise.h"
#include "sampling.h"

namespace magicdec {

static void norm_any(const NormArgs& args) {
  switch (args.type) {
    case Type::f32:
      return norm<float>(args);
    case Type::bf16:
      return norm<bf16>(args);
    case Type::f16:
      return norm<f16>(args);
  }
}

static void rotary_any(const RotaryArgs& args) {
  switch (args.type) {
    case Type::f32:
      return rotary<float>(args);
    case Type::bf16:
      return rotary<bf16>(args);
    case Type::f16:
      return rotary<f16>(args);
  }
}

}  // namespace magicdec

extern "C" __attribute__((visibility("default"))) const magicdec::Kernels* magicdec_kernels() {
  using namespace magicdec;
  static const Kernels kernels = {
      linear_scratch, linear_any, attention_scratch, attention_any, norm_any, rotary_any, sample,
  };
  return &kernels;
}
