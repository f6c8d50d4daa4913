// Indices of the largest numbers of each row, in descending order of the numbers, equal ones by index.
//
// A threshold that few more than the wanted numbers reach is found by bisection over the bits of floats, which are in the
// order of the numbers. Those that reach it are sorted, by radix if they are many.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "dispatch.h"
#include "team.h"

namespace magicdec {

constexpr float LEAST = -std::numeric_limits<float>::infinity();

// Maps the bits of a float to an integer, so that integers are in the order of the floats, and back.
inline int32_t in_order(int32_t word) { return word ^ (word >> 31 & 0x7fffffff); }

// Scratch memory of one thread.
struct BestSpace {
  float* x;              // a row, filled up to whole vectors by LEAST
  uint64_t* candidates;  // [size + 1]: the number, as an integer in descending order, above its index
  uint64_t* aside;       // [size + 1]

  static int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }
  static size_t bytes(int64_t size) { return to_whole_lines(padded(size) * sizeof(float) + 2 * (size + 1) * sizeof(uint64_t)); }
  BestSpace(char* memory, int64_t size)
      : x(reinterpret_cast<float*>(memory)), candidates(reinterpret_cast<uint64_t*>(x + padded(size))), aside(candidates + size + 1) {}
};

// Returns a number that at least `count` of x [size] reach, and not many more unless they are equal. size: of whole vectors.
inline float find_threshold(const float* x, int64_t size, int64_t count) {
  f32x16 most = load<f32x16>(x);
  for (int64_t i = LANES; i < size; i += LANES) most = maximum(most, load<f32x16>(x + i));
  int64_t low = in_order(bits<int32_t>(LEAST)), high = in_order(bits<int32_t>(largest(most)));
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    const float threshold = bits<float>(in_order(int32_t(middle)));
    i32x16 reach = lane_numbers() * 0;  // negative
    for (int64_t i = 0; i < size; i += LANES) reach += load<f32x16>(x + i) >= threshold;
    int64_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found -= reach[lane];
    if (found < count) {
      high = middle - 1;
    } else {
      low = middle;
      if (found <= count + count / 4) break;
    }
  }
  return bits<float>(in_order(int32_t(low)));
}

// Sorts candidates, which are in the order of their indices.
inline void sort_candidates(const BestSpace& space, int64_t count) {
  uint64_t *from = space.candidates, *to = space.aside;
  if (count < 128) return std::sort(from, from + count);  // faster than to clear the tables
  for (int shift = 32; shift < 64; shift += 8, std::swap(from, to)) {  // an even number of times
    uint32_t starts[256] = {};
    for (int64_t i = 0; i < count; i++) starts[from[i] >> shift & 255]++;
    for (uint32_t digit = 0, sum = 0; digit < 256; digit++) sum += std::exchange(starts[digit], sum);
    for (int64_t i = 0; i < count; i++) to[starts[from[i] >> shift & 255]++] = from[i];
  }
}

inline void best_of_row(const float* row, int64_t size, int64_t count, const BestSpace& space, int64_t* indices) {
  const int64_t padded = space.padded(size);
  for (int64_t i = 0; i < size; i++) space.x[i] = row[i] + 0.0f;  // makes 0.0 of -0.0, which is equal
  std::fill(space.x + size, space.x + padded, LEAST);
  const float threshold = find_threshold(space.x, padded, count);
  int64_t found = 0;
  for (int64_t start = 0; start < padded; start += LANES) {
    if (largest(load<f32x16>(space.x + start)) < threshold) continue;
    for (int64_t i = start; i < std::min(size, start + LANES); i++) {
      const uint32_t order = uint32_t(in_order(bits<int32_t>(space.x[i]))) ^ 0x7fffffff;
      space.candidates[found] = uint64_t(order) << 32 | uint64_t(i);
      found += space.x[i] >= threshold;
    }
  }
  sort_candidates(space, found);
  for (int64_t i = 0; i < count; i++) indices[i] = int64_t(uint32_t(space.candidates[i]));
}

inline size_t best_scratch(const BestArgs& args) { return args.team.threads * BestSpace::bytes(args.size); }

inline void best(const BestArgs& args) {
  const int64_t height = std::max<int64_t>(1, SERIAL / args.size);
  for_pieces(args.team, (args.rows + height - 1) / height, [&](int64_t piece, int thread) {
    const BestSpace space(static_cast<char*>(args.scratch) + thread * BestSpace::bytes(args.size), args.size);
    for (int64_t row = piece * height; row < std::min(args.rows, (piece + 1) * height); row++)
      best_of_row(args.x + row * args.size, args.size, args.count, space, args.indices + row * args.count);
  });
}

}  // namespace magicdec
