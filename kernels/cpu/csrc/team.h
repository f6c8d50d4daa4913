// Division of a kernel's work over threads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace magicdec {

constexpr int SERIAL = 1 << 14;  // elements that one thread finishes before a second one has woken up

// Calls f(piece, thread) once for each piece in [0, pieces), on the threads of the team. thread: below team.threads; two
// pieces that run at the same time have different ones. Returns when all pieces are done.
template <class F>
void for_pieces(const Team& team, int64_t pieces, F&& f) {
  if (team.threads == 1 || pieces <= 1) {
    for (int64_t piece = 0; piece < pieces; piece++) f(piece, 0);
    return;
  }
  using Work = std::remove_reference_t<F>;
  team.run(team.threads, pieces, [](void* work, int64_t piece, int thread) { (*static_cast<Work*>(work))(piece, thread); }, &f);
}

// Calls f(row) for each row, in pieces of about SERIAL elements. elements: of one row.
template <class F>
void for_rows(const Team& team, int64_t rows, int64_t elements, F&& f) {
  const int64_t height = std::max<int64_t>(1, SERIAL / std::max<int64_t>(1, elements));
  for_pieces(team, (rows + height - 1) / height, [&](int64_t piece, int) {
    const int64_t end = std::min(rows, (piece + 1) * height);
    for (int64_t row = piece * height; row < end; row++) f(row);
  });
}

}  // namespace magicdec
