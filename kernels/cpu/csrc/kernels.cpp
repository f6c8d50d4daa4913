// A library of kernels for one instruction set, which the compiler's flags select (kernels/cpu/compiler.py).
#include "amx.h"
#include "attention.h"
#include "best.h"
#include "bounds.h"
#include "coded.h"
#include "dispatch.h"
#include "int4.h"
#include "kernels.h"
#include "linear.h"
#include "pointwise.h"
#include "sampling.h"

namespace magicdec {

static bool permitted() {
#if defined(MAGICDEC_TILES)
  return tiles_permitted();
#else
  return true;
#endif
}

static void norm_any(const NormArgs& args) {
  with_type(args.type, [&](auto zero) { norm<decltype(zero)>(args); });
}

static void rotary_any(const RotaryArgs& args) {
  with_type(args.type, [&](auto zero) { rotary<decltype(zero)>(args); });
}

static void summarise_any(const SummariseArgs& args) {
  with_type(args.type, [&](auto zero) { summarise<decltype(zero)>(args); });
}

static void bounds_any(const BoundsArgs& args) {
  with_type(args.type, [&](auto zero) { bounds<decltype(zero)>(args); });
}

}  // namespace magicdec

extern "C" __attribute__((visibility("default"))) const magicdec::Kernels* magicdec_kernels() {
  using namespace magicdec;
  static const Kernels kernels = {
      permitted,      linear_scratch, linear_any,   linear_int4_scratch, linear_int4,   coded_scratch,  coded_any,  attention_scratch,
      attention,      norm_any,       rotary_any,   sample_scratch,      sample,        best_scratch,   best,       summarise_any,
      bounds_scratch, bounds_any,
  };
  return &kernels;
}
