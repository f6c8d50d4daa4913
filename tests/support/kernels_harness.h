// What tests of the CPU kernels without torch share: calls, random contents, tensors, checks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"

using namespace magicdec;

inline const Kernels& kernels = *magicdec_kernels();
inline int failures = 0;
inline int64_t pieces = 0;  // of the first work that the last call divided over threads

// Calls a kernel. scratch: the function that tells how much memory it needs, if it does.
template <class Args>
void call(int threads, Args args, void (*kernel)(const Args&), size_t (*scratch)(const Args&) = nullptr) {
  pieces = 0;
  args.team = {threads, [](int threads, int64_t count, Pool::Work work, void* context) {
                 if (pieces == 0) pieces = count;
                 Pool::instance().run(threads, count, work, context);
               }};
  std::unique_ptr<void, void (*)(void*)> memory(nullptr, std::free);
  if constexpr (!std::is_same_v<Args, NormArgs> && !std::is_same_v<Args, RotaryArgs> && !std::is_same_v<Args, SummariseArgs>) {
    memory.reset(std::aligned_alloc(64, (scratch(args) + 63) / 64 * 64));
    args.scratch = memory.get();
  }
  kernel(args);
}

// -- random numbers and tensors ---------------------------------------------------------------------------------------

inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}
inline uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
// See kernels/noise.py.
inline double noise(int64_t seed, int64_t position, int64_t token) {
  const uint64_t key = mix64(mix64(uint64_t(position) + 0x9E3779B97F4A7C15u) + uint64_t(seed));
  const uint32_t random = mix32(mix32((uint32_t(token) * 0x9E3779B1u) ^ uint32_t(key)) + uint32_t(key >> 32));
  const float u = std::min((float(random) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -std::log(-std::log1p(-double(u)));
}

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    return mix64(state += 0x9E3779B97F4A7C15u);
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
  template <class T>
  T of(std::initializer_list<T> choices) { return choices.begin()[below(int64_t(choices.size()))]; }
  // One of the sizes, or one beside it: loops over vectors, tiles and chunks end there.
  int near(std::initializer_list<int> sizes) { return std::max(1, of(sizes) + int(below(3)) - 1); }
};

inline size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }
// Largest relative error of a rounded number.
inline double rounding(Type type) { return type == Type::f32 ? 0x1p-24 : type == Type::bf16 ? 0x1p-8 : 0x1p-11; }

// A gate and a value, joined. error: added to, from the largest errors of both.
inline double join(Gate gate, double g, double value, double of_gate, double of_value, double& error) {
  constexpr double ROOT = 0.7978845608028654;  // sqrt(2 / pi)
  if (gate == Gate::clamped_silu) g = std::min(g, 7.0), value = std::clamp(value, -7.0, 7.0) + 1;
  const double active = gate == Gate::silu        ? g / (1 + std::exp(-g))
                        : gate == Gate::gelu_tanh ? g / 2 * (1 + std::tanh(ROOT * (g + 0.044715 * g * g * g)))
                                                  : g / (1 + std::exp(-1.702 * g));
  const double joined = active * value;
  error += 1.13 * of_gate * std::abs(value) + (of_value + 1e-7) * std::abs(active) + 2e-6 * std::abs(joined) + 1e-30;
  return joined;
}

// An array of exactly the bytes that it needs, so that sanitizers see every access past its end.
struct Tensor {
  Type type;
  std::vector<uint8_t> bytes;
  Tensor(Type type, size_t size) : type(type), bytes(size * size_of(type)) {}
  size_t size() const { return bytes.size() / size_of(type); }
  void* at(size_t i) { return bytes.data() + i * size_of(type); }
  double get(size_t i) const {
    const uint8_t* from = bytes.data() + i * size_of(type);
    if (type == Type::f16) {
      uint16_t half;
      std::memcpy(&half, from, sizeof half);
      const int exponent = half >> 10 & 31, fraction = half & 1023;
      const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                         : std::ldexp(exponent ? 1024 + fraction : fraction, std::max(exponent, 1) - 25);
      return half >> 15 ? -size : size;
    }
    uint32_t word = 0;
    std::memcpy(reinterpret_cast<uint8_t*>(&word) + 4 - size_of(type), from, size_of(type));
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
  }
  void set(size_t i, double value) {
    if (type == Type::f16) {  // finite values only
      const int exponent = std::max(value == 0 ? -14 : std::ilogb(value), -14);
      const int size = int(std::nearbyint(std::ldexp(std::abs(value), 10 - exponent))) + ((exponent + 14) << 10);
      const auto half = uint16_t((std::signbit(value) ? 0x8000 : 0) + std::min(size, 0x7c00));
      std::memcpy(at(i), &half, sizeof half);
      return;
    }
    const float x = float(value);
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    if (type == Type::bf16) word += 0x7fff + ((word >> 16) & 1);
    std::memcpy(at(i), reinterpret_cast<uint8_t*>(&word) + 4 - size_of(type), size_of(type));
  }
};

inline Tensor normal(Random& random, Type type, size_t size, double scale = 1) {
  Tensor x(type, size);
  // Later numbers repeat earlier ones: drawing those of a pool would take most of the time.
  constexpr size_t DRAWN = 4099;
  for (size_t i = 0; i < std::min(size, DRAWN); i++) x.set(i, random.normal() * scale);
  for (size_t i = DRAWN; i < size; i++) std::memcpy(x.at(i), x.at(i - DRAWN), size_of(type));
  return x;
}

inline Type any_type(Random& random) { return Type(random.below(3)); }

inline void fail(const std::string& what, const char* why, double got, double expected) {
  if (failures++ < 20) std::printf("%s: %s: %.9g, expected %.9g\n", what.c_str(), why, got, expected);
}
inline void check(const std::string& what, double got, double expected, double tolerance) {
  if (!(std::abs(got - expected) <= tolerance)) fail(what, "inexact", got, expected);
}
// Checks that elements [first, first + count) of `whole` are `part`.
inline void check_same(const std::string& what, const Tensor& part, const Tensor& whole, size_t first, size_t count) {
  const size_t size = size_of(part.type);
  for (size_t i = 0; i < count; i++)
    if (std::memcmp(part.bytes.data() + i * size, whole.bytes.data() + (first + i) * size, size) != 0)
      return fail(what, "depends on what stands beside it", part.get(i), whole.get(first + i));
}

template <class... Numbers>
std::string describe(const char* kernel, Numbers... numbers) {
  std::string text = kernel;
  ((text += ' ' + std::to_string(numbers)), ...);
  return text;
}

// Calls f(first, count, threads) for some ranges of `rows` rows.
template <class F>
void for_ranges(Random& random, int rows, F&& f) {
  for (int i = 0; i < 6; i++) {
    const int count = i == 0 ? 1 : 1 + int(random.below(std::min(rows, i < 4 ? 16 : 40)));
    f(int(random.below(rows - count + 1)), count, 1 + i % 2);
  }
  f(rows - 1, 1, 2);
  f(0, rows, 2);
  f(0, rows, 3);
}
