// Matrix products with weights of 8-bit codes: numbers of e4m3 (floating point), or integers in groups of features.
//
// Codes are decoded to words of the inputs' type, exactly, or to float32 where the processor does not multiply that type. A
// group's products are summed in the order of features, SPAN of them at a time from zero, and each such sum is multiplied with
// the group's scale and added to those before. So a row's result does not depend on other rows. There is no method by AMX tiles,
// which sum in another order.
//
// For few rows codes are decoded in registers, which takes longer than their products. For more rows a part of a block is decoded
// to the L1 cache and multiplied with a chunk of rows there.
#pragma once

#include <algorithm>

#include "linear_rows.h"
#include "team.h"

namespace magicdec {

constexpr int SPAN = 128;      // features whose products are summed at a time, or fewer: a group, the rest of a group
constexpr int CODED_CHUNK = 192;  // rows that a part of a block is decoded for
constexpr int SLAB_WORDS = 128;   // per column, that are decoded at a time
constexpr int PAIR = 2 * BLOCK;   // bytes of two features of a block
constexpr int FETCHED = 4096;     // bytes ahead that few rows fetch codes
constexpr int LONG_WORDS = 64;    // of a span, from which on a tile's totals need no registers
#if defined(__AVX512F__)
constexpr int MAX_FEW = 6;  // rows of which codes are decoded in registers: 24 of 32 hold sums, of the span and in all
constexpr int SHORT_ROWS = 6;  // per tile of short spans: likewise
#elif defined(MAGICDEC_AVX2) || defined(__aarch64__)
constexpr int MAX_FEW = 2;
#else
constexpr int MAX_FEW = 1;
#endif
#if !defined(__AVX512F__)
constexpr int SHORT_ROWS = MAX_ROWS;
#endif

// -- codes ------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
typedef int16_t i16x16 __attribute__((vector_size(32)));
#else
using i16x16 = Lanes<int16_t>;
#endif

// decode: the numbers of two features of sixteen columns, from pairs of bytes.

struct I8Codes {
  static MAGICDEC_INLINE void decode(const uint8_t* from, f32x16& even, f32x16& odd) {
    const u32x16 pairs = widen(load<u16x16>(from));
    even = convert<f32x16>(bits<i32x16>(pairs << 24) >> 24);
    odd = convert<f32x16>(bits<i32x16>(pairs << 16) >> 24);
  }

#if defined(__AVX512BF16__)
  static MAGICDEC_INLINE u32x16 decode_words(const uint8_t* from) {
    const auto floats = [](const uint8_t* bytes) __attribute__((always_inline)) {
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
    };
    return (u32x16)_mm512_cvtne2ps_pbh(floats(from + LANES), floats(from));
  }
#endif
};

// Sign, 4 bits of exponent, 3 of mantissa; divided by E4M3_SCALE. Codes of NaN become ±480: their scales are NaN.
struct E4M3Codes {
  static MAGICDEC_INLINE void decode(const uint8_t* from, f32x16& even, f32x16& odd) {
    // The bits of float16 but for the exponent's offset, which is larger by 8 there. A shift copies the sign to bit 14 too.
    const i16x16 pairs = load<i16x16>(from);
    const i16x16 kept = i16x16{} + int16_t(0xbf80);
    even = float_of_half(bits<u16x16>(((pairs << 8) >> 1) & kept));
    odd = float_of_half(bits<u16x16>((pairs >> 1) & kept));
  }

#if defined(__AVX512BF16__)
  static MAGICDEC_INLINE u32x16 decode_words(const uint8_t* from) {
    // By exponent 0: what a number has in common with a normal one of that exponent, in bits; the instruction that multiplies
    // takes no denormal ones.
    alignas(64) static constexpr uint16_t DENORMAL[2 * LANES] = {0x3800 ^ 0x0000, 0x3810 ^ 0x3700, 0x3820 ^ 0x3780, 0x3830 ^ 0x37c0,
                                                                 0x3840 ^ 0x3800, 0x3850 ^ 0x3820, 0x3860 ^ 0x3840, 0x3870 ^ 0x3860};
    const __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __m512i kept = _mm512_set1_epi16(short(0x87f0)), offset = _mm512_set1_epi16(0x3800);
    const __m512i normal = _mm512_ternarylogic_epi32(_mm512_slli_epi16(code, 4), kept, offset, 0xea);  // code & kept | offset
    const __mmask32 denormal = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78));
    return (u32x16)_mm512_xor_si512(normal, _mm512_maskz_permutexvar_epi16(denormal, code, _mm512_load_si512(DENORMAL)));
  }
#endif
};

// Decodes two features of sixteen columns to words as Dot takes them.
template <class Dot, class Code>
MAGICDEC_INLINE void decode_pair(const uint8_t* from, u32x16 (&words)[2 / Dot::ELEMENTS]) {
#if defined(__AVX512BF16__)
  if constexpr (Dot::ELEMENTS == 2) {
    words[0] = Code::decode_words(from);
    return;
  }
#endif
  f32x16 even, odd;
  Code::decode(from, even, odd);
  if constexpr (Dot::ELEMENTS == 2)
    words[0] = bits<u32x16>(even) >> 16 | (bits<u32x16>(odd) & 0xffff0000);
  else
    words[0] = bits<u32x16>(even), words[1] = bits<u32x16>(odd);
}

// -- products ---------------------------------------------------------------------------------------------------------

// a * b + c, rounded once where the processor has an instruction for that.
MAGICDEC_INLINE f32x16 add_scaled(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return multiply_add(a, b, c);
#elif defined(MAGICDEC_AVX2)
  return avx2::multiply_add(a, b, c);
#elif defined(__aarch64__)
  return f32x16::of([&](int i) __attribute__((always_inline)) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
#else
  return a * b + c;
#endif
}

// The spans of a matrix, in order.
struct Spans {
  int pairs, per_group, count;  // pairs of features of a group; spans of a group; all spans

  explicit Spans(const CodedArgs& args)
      : pairs(args.group_size / 2), per_group((args.group_size + SPAN - 1) / SPAN), count(args.groups * per_group) {}

  int group(int span) const { return span / per_group; }
  int first(int span) const { return group(span) * pairs + span % per_group * (SPAN / 2); }  // pair
  int size(int span) const { return std::min(SPAN / 2, pairs - span % per_group * (SPAN / 2)); }
};

MAGICDEC_INLINE const uint8_t* codes_of(const CodedArgs& args, int block) {
  return args.packed + size_t(block) * args.groups * (args.group_size / 2) * PAIR;
}
MAGICDEC_INLINE const float* scales_of(const CodedArgs& args, int block, int group) {
  return args.scales + (size_t(block) * args.groups + group) * BLOCK;
}

inline void finish_row(const ProductArgs& args, f32x16 (&sums)[1][2], int row, int block) {
  with_type(args.out, [&](auto zero) { finish<decltype(zero), 1>(args, sums, row, block); });
}

// Adds the sums of a span to those before.
template <int M>
MAGICDEC_INLINE void add_span(f32x16 (&totals)[M][2], const f32x16 (&sums)[M][2], const float* scales) {
#pragma GCC unroll 2
  for (int c = 0; c < 2; c++) {
    const f32x16 scale = load<f32x16>(scales + c * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) totals[m][c] = add_scaled(sums[m][c], scale, totals[m][c]);
  }
}

// M rows times one block of columns.
template <class Dot, class Code, int M>
void few_rows(const CodedArgs& args, Rows x, int row, int block) {
  constexpr int WORDS = 2 / Dot::ELEMENTS;
  const Spans spans(args);
  const uint32_t* a = x.data + size_t(row) * x.stride;
  const uint8_t* codes = codes_of(args, block);
  f32x16 totals[M][2] = {};
  for (int span = 0; span < spans.count; span++) {
    f32x16 sums[M][2] = {};
    for (int pair = spans.size(span); pair > 0; pair--, codes += PAIR, a += WORDS) {
      __builtin_prefetch(codes + FETCHED, 0, 3);
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++) {
        u32x16 words[WORDS];
        decode_pair<Dot, Code>(codes + c * PAIR / 2, words);
#pragma GCC unroll 2
        for (int w = 0; w < WORDS; w++)
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) sums[m][c] = Dot::add(sums[m][c], a[m * x.stride + w], words[w]);
      }
    }
    add_span<M>(totals, sums, scales_of(args, block, spans.group(span)));
  }
  for (int m = 0; m < M; m++) {
    f32x16 one[1][2] = {{totals[m][0], totals[m][1]}};
    finish_row(args, one, row + m, block);
  }
}

template <int M>
MAGICDEC_INLINE void load_totals(f32x16 (&totals)[M][2], const float* from) {
#pragma GCC unroll 32
  for (int i = 0; i < 2 * M; i++) totals[i / 2][i % 2] = load<f32x16>(from + i * LANES);
}
template <int M>
MAGICDEC_INLINE void store_totals(const f32x16 (&totals)[M][2], float* to) {
#pragma GCC unroll 32
  for (int i = 0; i < 2 * M; i++) store(to + i * LANES, totals[i / 2][i % 2]);
}

// Rows [row, end) times one block of columns. slab: [SLAB_WORDS, BLOCK]. totals: [end - row, BLOCK].
template <class Dot, class Code>
void many_rows(const CodedArgs& args, Rows x, int row, int end, int block, uint32_t* slab, float* totals) {
  constexpr int WORDS = 2 / Dot::ELEMENTS;
  const Spans spans(args);
  const uint8_t* codes = codes_of(args, block);
  const int rows = end - row;
  const int together = SLAB_WORDS / (std::min(SPAN / 2, spans.pairs) * WORDS);
  const int tallest = spans.size(0) * WORDS < LONG_WORDS ? SHORT_ROWS : MAX_ROWS;
  std::fill(totals, totals + size_t(rows) * BLOCK, 0.0f);
  for (int span = 0; span < spans.count; span += together) {
    const int last = std::min(spans.count, span + together) - 1, first = spans.first(span);
    const int pairs = spans.first(last) + spans.size(last) - first;
    uint32_t* to = slab;
    for (int pair = 0; pair < pairs; pair++, codes += PAIR, to += WORDS * BLOCK) {
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++) {
        u32x16 words[WORDS];
        decode_pair<Dot, Code>(codes + c * PAIR / 2, words);
#pragma GCC unroll 2
        for (int w = 0; w < WORDS; w++) store(to + w * BLOCK + c * LANES, words[w]);
      }
    }
    for (int done = 0; done < rows;) {
      const int height = tile_height(rows, done, tallest);
      with_rows<MAX_ROWS>(height, [&](auto count) {
        constexpr int M = decltype(count)::value;
        float* held = totals + size_t(done) * BLOCK;
        f32x16 tile_totals[M][2];
        load_totals<M>(tile_totals, held);
        for (int each = span; each <= last; each++) {
          const int from = spans.first(each);
          f32x16 sums[M][2] = {};
          const uint8_t* next = codes + (from - first) * PAIR;  // of the next part, fetched while this one is multiplied
          tile<Dot, M, 2>(sums, x.data + size_t(row + done) * x.stride + from * WORDS, x.stride, slab + (from - first) * WORDS * BLOCK, BLOCK,
                          spans.size(each) * WORDS, [&](int w) __attribute__((always_inline)) {
                            __builtin_prefetch(next + w * (PAIR / WORDS), 0, 3);
                          });
          add_span<M>(tile_totals, sums, scales_of(args, block, spans.group(each)));
        }
        store_totals<M>(tile_totals, held);
      });
      done += height;
    }
  }
  for (int m = 0; m < rows; m++) {
    f32x16 one[1][2] = {{load<f32x16>(totals + m * BLOCK), load<f32x16>(totals + m * BLOCK + LANES)}};
    finish_row(args, one, row + m, block);
  }
}

// -- all rows ---------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool WORDS_OF_BF16 = true;  // whether the processor multiplies them
#else
constexpr bool WORDS_OF_BF16 = false;
#endif

// How a product reads its rows, and where parts of its scratch begin.
struct CodedInput {
  bool halves;  // words of two bfloat16, not of a float32
  bool copied;
  size_t words;     // per row, and from row to row of the copy
  size_t stride;
  size_t copy_size, part_size;  // bytes of the copy, and of each thread's part behind it

  explicit CodedInput(const CodedArgs& args) {
    const int held = args.groups * args.group_size;
    halves = WORDS_OF_BF16 && args.in == Type::bf16;
    words = halves ? held / 2 : held;
    stride = (words + LANES - 1) / LANES * LANES;
    const bool in_words = args.x_stride % 2 == 0 && reinterpret_cast<uintptr_t>(args.x) % sizeof(uint32_t) == 0;
    copied = args.features != held || !(halves ? in_words : args.in == Type::f32);
    copy_size = copied ? to_whole_lines(size_t(args.rows) * stride * sizeof(uint32_t)) : 0;
    part_size = args.rows > MAX_FEW ? (SLAB_WORDS + std::min(args.rows, CODED_CHUNK)) * BLOCK * sizeof(float) : 0;
  }
};

inline size_t coded_scratch(const CodedArgs& args) {
  const CodedInput input(args);
  return input.copy_size + input.part_size * args.team.threads;
}

template <class Dot, class Code>
void coded_product(const CodedArgs& args, const CodedInput& input, Rows x) {
  const int columns = packed_columns(args);
  const int blocks = (columns + BLOCK - 1) / BLOCK;
  if (args.rows <= MAX_FEW)
    return for_pieces(args.team, blocks, [&](int64_t block, int) {
      with_rows<MAX_FEW>(args.rows, [&](auto count) { few_rows<Dot, Code, decltype(count)::value>(args, x, 0, int(block)); });
    });
  const int64_t chunks = (args.rows + CODED_CHUNK - 1) / CODED_CHUNK;
  for_pieces(args.team, chunks * blocks, [&](int64_t piece, int thread) {
    const int64_t chunk = piece / blocks;
    const int row = int(args.rows * chunk / chunks), end = int(args.rows * (chunk + 1) / chunks);
    auto* part = static_cast<char*>(args.scratch) + input.copy_size + input.part_size * thread;
    auto* slab = reinterpret_cast<uint32_t*>(part);
    many_rows<Dot, Code>(args, x, row, end, int(piece % blocks), slab, reinterpret_cast<float*>(slab + SLAB_WORDS * BLOCK));
  });
}

inline Rows rows_of(const CodedArgs& args, const CodedInput& input) {
  if (!input.copied) return {static_cast<const uint32_t*>(args.x), size_t(args.x_stride) / (input.halves ? 2 : 1)};
  auto* copy = static_cast<uint32_t*>(args.scratch);
  with_type(args.in, [&](auto zero) {
    using In = decltype(zero);
    for_rows(args.team, args.rows, args.features, [&](int64_t row) {
      const In* from = static_cast<const In*>(args.x) + row * args.x_stride;
      uint32_t* to = copy + row * input.stride;
      if (input.halves)
        copy_row(from, to, args.features, int(input.words), 2);
      else
        widen_row(from, reinterpret_cast<float*>(to), args.features, int(input.stride));
    });
  });
  return {copy, input.stride};
}

inline void coded_any(const CodedArgs& args) {
  const CodedInput input(args);
  const Rows x = rows_of(args, input);
  const auto product = [&](auto dot) {
    using Dot = decltype(dot);
    if (args.format == Codes::e4m3)
      coded_product<Dot, E4M3Codes>(args, input, x);
    else
      coded_product<Dot, I8Codes>(args, input, x);
  };
  if constexpr (WORDS_OF_BF16) {
    if (input.halves) return product(DotBF16{});
  }
  product(DotF32{});
}

}  // namespace magicdec
