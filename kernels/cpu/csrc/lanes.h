// Vectors of sixteen lanes, with the operators of the compiler's own vectors. Where a register holds sixteen lanes they
// are such vectors. Elsewhere they are the registers that hold them together: a compiler keeps a vector that is wider
// than its registers in memory, sums of inner loops included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace magicdec {

#define MAGICDEC_INLINE inline __attribute__((always_inline))

constexpr int LANES = 16;

#if defined(__AVX512F__)

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class To, class From>
MAGICDEC_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class V>
MAGICDEC_INLINE V load(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class V>
MAGICDEC_INLINE void store(void* to, V x) {
  std::memcpy(to, &x, sizeof x);
}

// Converts each lane's value, as a cast does.
template <class To, class From>
MAGICDEC_INLINE To convert(From x) {
  return __builtin_convertvector(x, To);
}

// Subtracts zero, which takes no instruction: to add it would change -0.
MAGICDEC_INLINE f32x16 splat(float x) { return x - f32x16{}; }
MAGICDEC_INLINE u32x16 splat_bits(uint32_t x) { return x - u32x16{}; }
MAGICDEC_INLINE f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) {
  return bits<f32x16>((mask & bits<i32x16>(yes)) | (~mask & bits<i32x16>(no)));
}

#else

#if defined(__AVX2__)
constexpr int PARTS = 2;
#else
constexpr int PARTS = 4;
#endif

template <class T>
struct Lanes {
  static constexpr int WIDTH = LANES / PARTS;
  typedef T Part __attribute__((vector_size(WIDTH * sizeof(T))));
  Part part[PARTS];

  // Returns the vector of the parts f(0), f(1) …; without a loop, which optimizers may unroll too late.
  template <class F>
  static MAGICDEC_INLINE Lanes of(F&& f) {
    return of(f, std::make_index_sequence<PARTS>{});
  }
  template <class F, size_t... I>
  static MAGICDEC_INLINE Lanes of(F& f, std::index_sequence<I...>) {
    return {{f(I)...}};
  }

  MAGICDEC_INLINE T operator[](int lane) const { return part[lane / WIDTH][lane % WIDTH]; }
  MAGICDEC_INLINE Lanes operator-() const {
    return of([&](int i) __attribute__((always_inline)) { return -part[i]; });
  }
  MAGICDEC_INLINE Lanes operator~() const {
    return of([&](int i) __attribute__((always_inline)) { return ~part[i]; });
  }
  MAGICDEC_INLINE Lanes& operator+=(Lanes b) { return *this = *this + b; }
  MAGICDEC_INLINE Lanes& operator|=(Lanes b) { return *this = *this | b; }

#define MAGICDEC_OPERATOR(RESULT, OP)                                                                    \
  friend MAGICDEC_INLINE Lanes<RESULT> operator OP(Lanes a, Lanes b) {                                   \
    return Lanes<RESULT>::of([&](int i) __attribute__((always_inline)) { return a.part[i] OP b.part[i]; }); \
  }                                                                                                      \
  friend MAGICDEC_INLINE Lanes<RESULT> operator OP(Lanes a, T b) {                                       \
    return Lanes<RESULT>::of([&](int i) __attribute__((always_inline)) { return a.part[i] OP b; });      \
  }                                                                                                      \
  friend MAGICDEC_INLINE Lanes<RESULT> operator OP(T a, Lanes b) {                                       \
    return Lanes<RESULT>::of([&](int i) __attribute__((always_inline)) { return a OP b.part[i]; });      \
  }
  MAGICDEC_OPERATOR(T, +)
  MAGICDEC_OPERATOR(T, -)
  MAGICDEC_OPERATOR(T, *)
  MAGICDEC_OPERATOR(T, /)
  MAGICDEC_OPERATOR(T, &)
  MAGICDEC_OPERATOR(T, |)
  MAGICDEC_OPERATOR(T, ^)
  MAGICDEC_OPERATOR(T, <<)
  MAGICDEC_OPERATOR(T, >>)
  MAGICDEC_OPERATOR(int32_t, <)
  MAGICDEC_OPERATOR(int32_t, >)
  MAGICDEC_OPERATOR(int32_t, >=)
  MAGICDEC_OPERATOR(int32_t, ==)
  MAGICDEC_OPERATOR(int32_t, !=)
#undef MAGICDEC_OPERATOR
};

using f32x16 = Lanes<float>;
using i32x16 = Lanes<int32_t>;
using u32x16 = Lanes<uint32_t>;
using u16x16 = Lanes<uint16_t>;

template <class V>
struct IsLanes : std::false_type {};
template <class T>
struct IsLanes<Lanes<T>> : std::true_type {};

template <class To, class From>
MAGICDEC_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  if constexpr (IsLanes<To>::value) {
    return To::of([&](int i) __attribute__((always_inline)) { return (typename To::Part)x.part[i]; });
  } else {
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
  }
}

template <class V>
MAGICDEC_INLINE V load(const void* from) {
  return V::of([&](int i) __attribute__((always_inline)) {
    typename V::Part part;
    std::memcpy(&part, static_cast<const char*>(from) + i * sizeof part, sizeof part);
    return part;
  });
}

template <class T>
MAGICDEC_INLINE void store(void* to, Lanes<T> x) {
#pragma GCC unroll 4
  for (int i = 0; i < PARTS; i++) std::memcpy(static_cast<char*>(to) + i * sizeof x.part[i], &x.part[i], sizeof x.part[i]);
}

template <class To, class From>
MAGICDEC_INLINE To convert(From x) {
  return To::of([&](int i) __attribute__((always_inline)) { return __builtin_convertvector(x.part[i], typename To::Part); });
}

MAGICDEC_INLINE f32x16 splat(float x) { return x - f32x16{}; }
MAGICDEC_INLINE u32x16 splat_bits(uint32_t x) { return x - u32x16{}; }
MAGICDEC_INLINE f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) {
  return f32x16::of([&](int i) __attribute__((always_inline)) { return mask.part[i] ? yes.part[i] : no.part[i]; });
}

#endif

}  // namespace magicdec
