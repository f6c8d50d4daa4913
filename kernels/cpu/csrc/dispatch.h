// Dispatch from types known at run time to types known at compile time.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace magicdec {

// Calls f with a zero of the type.
template <class F>
void with_type(Type type, F&& f) {
  switch (type) {
    case Type::f32:
      return f(float{});
    case Type::bf16:
      return f(bf16{});
    case Type::f16:
      return f(f16{});
  }
}

inline size_t to_whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace magicdec
