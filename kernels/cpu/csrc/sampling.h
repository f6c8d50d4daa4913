// The coupled sampling rule over a slice of the vocabulary, in one pass: argmax of logit / T + G(seed, position, token).
// Its integers equal those of kernels/noise.py.
#pragma once

#include "kernels.h"
#include "team.h"
#include "vec.h"

namespace magicdec {

MAGICDEC_INLINE uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

MAGICDEC_INLINE u32x16 mix32(u32x16 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

struct NoiseKey {
  uint32_t low, high;
  NoiseKey(int64_t seed, int64_t position) {
    const uint64_t key = mix64(mix64(uint64_t(position) + 0x9E3779B97F4A7C15u) + uint64_t(seed));
    low = uint32_t(key), high = uint32_t(key >> 32);
  }
  MAGICDEC_INLINE u32x16 operator()(u32x16 tokens) const { return mix32(mix32((tokens * 0x9E3779B1u) ^ low) + high); }
};

// -ln(-ln(1 - u)) with u = (bits + 1/2) / 2^32.
MAGICDEC_INLINE f32x16 gumbel(u32x16 random) {
  const f32x16 u = minimum((convert<f32x16>(random) + 0.5f) * 0x1p-32f, splat(1.0f - 0x1p-24f));
  // ln(1 - u): the factor u / (1 - (1 - u)) corrects for the rounding of 1 - u.
  const f32x16 rest = 1.0f - u, lost = 1.0f - rest;
  const i32x16 tiny = lost == f32x16{};
  const f32x16 exact = logarithm(rest) * (u / select(tiny, splat(1.0f), lost));
  return -logarithm(-select(tiny, -u, exact));
}

constexpr int64_t SAMPLE_PART = 4096;  // tokens per piece of work

// Largest value of some tokens of a row: lanes of tokens first + lane, + LANES …; NaN if any value is.
struct Best {
  float value;
  int64_t token;  // -1: none is possible
};

inline int64_t sample_parts(const SampleArgs& args) { return (args.size + SAMPLE_PART - 1) / SAMPLE_PART; }
inline size_t sample_scratch(const SampleArgs& args) { return args.rows * sample_parts(args) * sizeof(Best); }

inline Best best_of(const SampleArgs& args, int row, int64_t begin, int64_t end) {
  const i32x16 lanes = lane_numbers();
  const float temperature = args.temperature[row];
  const NoiseKey noise(args.seeds[row], args.positions[row]);
  const float* logits = args.logits + row * args.stride;
  f32x16 best = splat(-INFINITY);
  i32x16 where = lanes * 0 - 1, unordered = lanes * 0;
  for (int64_t t = begin; t < end; t += LANES) {
    const int n = int(std::min<int64_t>(LANES, end - t));
    const i32x16 token = lanes + int32_t(t);
    f32x16 v = n == LANES ? load<f32x16>(logits + t) : load_some(logits + t, n);
    if (temperature > 0) v = v / temperature + gumbel(noise(bits<u32x16>(token + int32_t(args.first))));
    if (n < LANES) v = select(lanes < n, v, splat(-INFINITY));
    unordered |= v != v;
    const i32x16 better = v > best;
    best = select(better, v, best);
    where = (better & token) | (~better & where);
  }
  Best found{-INFINITY, -1};
  for (int lane = 0; lane < LANES; lane++) {
    if (unordered[lane]) return {NAN, -1};
    const int64_t token = where[lane] < 0 ? -1 : where[lane] + args.first;
    if (token >= 0 && (found.token < 0 || best[lane] > found.value || (best[lane] == found.value && token < found.token)))
      found = {best[lane], token};
  }
  return found;
}

inline void sample(const SampleArgs& args) {
  const int64_t parts = sample_parts(args);
  auto* found = static_cast<Best*>(args.scratch);
  for_pieces(args.team, args.rows * parts, [&](int64_t piece, int) {
    const int64_t begin = piece % parts * SAMPLE_PART;
    found[piece] = best_of(args, int(piece / parts), begin, std::min(args.size, begin + SAMPLE_PART));
  });
  // The caller sets each row to -inf at token `first`, which stays if all tokens are impossible. A NaN stays too: no
  // comparison with it is true. Parts are in ascending order, so the lowest of equal tokens comes first.
  for (int row = 0; row < args.rows; row++) {
    for (int64_t part = 0; part < parts; part++) {
      const Best& each = found[row * parts + part];
      if (each.value > args.values[row]) args.tokens[row] = each.token;
      if (each.value > args.values[row] || each.value != each.value) args.values[row] = each.value;
    }
  }
}

}  // namespace magicdec
