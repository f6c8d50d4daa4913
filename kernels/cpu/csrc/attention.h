// Attention of ragged queries over paged keys and values.
//
// A row's slots are cut into segments of SEGMENT slots, and these into blocks of SLOTS, both counted from the first
// slot of the row's page list. A block is multiplied with all queries of the row, of all heads that share its keys and
// values: two small matrix products with a softmax between. Within a segment the softmax is computed online (Milakov &
// Gimelshein, arXiv 1805.02867). Segments, which may go to different threads, are merged in ascending order.
//
// A query's result therefore depends on its own slots alone, not on other queries, other rows, or the number of
// threads. Slots that a query must not see get a weight of exactly zero. Where queries see a window, a piece of work begins
// at the block in which the window of its first query does; pages before that window are not read.
#pragma once

#include <type_traits>

#include "attention_amx.h"
#include "attention_vectors.h"

namespace magicdec {

// Calls f with the method that computes attention of these types and sizes, which do not change with the number of queries.
template <class F>
void with_attention_method(const AttentionArgs& args, F&& f) {
  with_type(args.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, bf16>) {
#if defined(MAGICDEC_TILES)
      if (args.head_dim % TILE_DIMS == 0 && args.scale >= 0) {  // so that the largest score remains it when scaled
        if (args.head_dim == 64) return f(ByTiles<64>{});
        if (args.head_dim == 128) return f(ByTiles<128>{});
        return f(ByTiles<0>{});
      }
#else
      if (args.head_dim == 64) return f(ByVectors<T, 64>{});
      if (args.head_dim == 128) return f(ByVectors<T, 128>{});
#endif
    }
    f(ByVectors<T, 0>{});
  });
}

inline size_t attention_scratch(const AttentionArgs& args) {
  size_t bytes = 0;
  with_attention_method(args, [&](auto method) { bytes = pieces_scratch<decltype(method)>(args); });
  return bytes;
}

inline void attention(const AttentionArgs& args) {
  with_attention_method(args, [&](auto method) { attend_pieces<decltype(method)>(args); });
}

}  // namespace magicdec
