// Operations between the matrix products of a layer: norms and rotation.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "team.h"
#include "vec.h"

namespace magicdec {

template <class T>
MAGICDEC_INLINE float mean_square(const T* x, int size) {
  f32x16 squares{};
  int i = 0;
  for (; i + LANES <= size; i += LANES) {
    const f32x16 v = load_floats(x + i);
    squares += v * v;
  }
  if (i < size) {
    const f32x16 v = load_some(x + i, size - i);
    squares += v * v;
  }
  return sum(squares) / float(size);
}

template <class T>
MAGICDEC_INLINE void scale_row(const T* x, float factor, const T* weight, T* out, int size) {
  int i = 0;
  for (; i + LANES <= size; i += LANES) store_floats(out + i, load_floats(x + i) * factor * load_floats(weight + i));
  if (i < size) store_some(out + i, load_some(x + i, size - i) * factor * load_some(weight + i, size - i), size - i);
}

template <class T>
void norm(const NormArgs& args) {
  const int size = args.size;
  for_rows(args.team, args.rows, size, [&](int64_t row) {
    T* x = static_cast<T*>(args.x) + size_t(row) * size;
    if (args.delta) {
      const T* delta = static_cast<const T*>(args.delta) + size_t(row) * size;
      int i = 0;
      for (; i + LANES <= size; i += LANES) store_floats(x + i, load_floats(x + i) + load_floats(delta + i));
      if (i < size) store_some(x + i, load_some(x + i, size - i) + load_some(delta + i, size - i), size - i);
    }
    const float factor = 1.0f / std::sqrt(mean_square(x, size) + args.eps);
    scale_row(x, factor, static_cast<const T*>(args.weight), static_cast<T*>(args.out) + size_t(row) * size, size);
  });
}

// Half-rotation: element i pairs with element i + head_dim / 2.
template <class T>
MAGICDEC_INLINE void rotate(T* x, const float* cos, const float* sin, int half) {
  int i = 0;
  for (; i + LANES <= half; i += LANES) {
    const f32x16 a = load_floats(x + i), b = load_floats(x + half + i);
    const f32x16 c = load<f32x16>(cos + i), s = load<f32x16>(sin + i);
    store_floats(x + i, a * c - b * s);
    store_floats(x + half + i, b * c + a * s);
  }
  if (const int n = half - i; n > 0) {
    const f32x16 a = load_some(x + i, n), b = load_some(x + half + i, n);
    const f32x16 c = load_some(cos + i, n), s = load_some(sin + i, n);
    store_some(x + i, a * c - b * s, n);
    store_some(x + half + i, b * c + a * s, n);
  }
}

template <class T>
void rotary(const RotaryArgs& args) {
  const int half = args.head_dim / 2;
  const size_t bytes = args.head_dim * sizeof(T);
  for_rows(args.team, args.tokens, int64_t(args.heads) * args.head_dim, [&](int64_t token) {
    const float* cos = args.cos + args.positions[token] * half;
    const float* sin = args.sin + args.positions[token] * half;
    T* head = static_cast<T*>(args.qkv) + size_t(token) * (args.heads + 2 * args.kv_heads) * args.head_dim;
    const auto turn = [&](const void* weight) {
      if (weight) scale_row(head, 1.0f / std::sqrt(mean_square(head, args.head_dim) + args.eps), static_cast<const T*>(weight), head, args.head_dim);
      rotate(head, cos, sin, half);
    };
    for (int h = 0; h < args.heads; h++, head += args.head_dim) turn(args.q_norm);
    const size_t page = args.slots[token] / args.page_size, offset = args.slots[token] % args.page_size;
    const auto slot = [&](void* pool, int h) {
      return static_cast<T*>(pool) + page * args.page_stride + (size_t(h) * args.page_size + offset) * args.head_dim;
    };
    for (int h = 0; h < args.kv_heads; h++, head += args.head_dim) {
      turn(args.k_norm);
      std::memcpy(slot(args.k, h), head, bytes);
    }
    for (int h = 0; h < args.kv_heads; h++, head += args.head_dim) std::memcpy(slot(args.v, h), head, bytes);
  });
}

}  // namespace magicdec
