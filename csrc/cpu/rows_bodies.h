// What vector bodies do with matrices whose rows are pixels.
#pragma once

#include "cpu/integers.h"
#include "cpu/rows.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

template <class S>
FASTFUSE_INLINE S* row_of(const Rows& rows, int64_t row) {
  return static_cast<S*>(rows.data) + row * rows.stride;
}

template <class A>
FASTFUSE_INLINE void clear(A* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

// Calls rows(first, last, keep of their image) for the rows [begin, end), an image at a time.
template <class A, class Do>
FASTFUSE_INLINE void for_images(const Images& images, int64_t begin, int64_t end, Do rows) {
  const A* keep = static_cast<const A*>(images.keep);
  while (begin < end) {
    const int64_t image = (images.first + begin) / images.pixels;
    const int64_t last = min_of((image + 1) * images.pixels - images.first, end);
    rows(begin, last, keep ? keep[image] : A(1));
    begin = last;
  }
}

// Calls row(i, keep of its image) for the rows [begin, end).
template <class A, class Do>
FASTFUSE_INLINE void for_kept_rows(const Images& images, int64_t begin, int64_t end, Do row) {
  for_images<A>(images, begin, end, [&](int64_t first, int64_t last, A keep) {
    for (int64_t i = first; i < last; ++i) row(i, keep);
  });
}

// Calls some(Count<n>, i) for n rows from i on, four at a time while there are so many: sums over
// rows are then loaded and stored a fourth as often.
template <class Do>
FASTFUSE_INLINE void for_row_groups(int64_t begin, int64_t end, Do some) {
  constexpr int kGroup = 4;
  for (; begin + kGroup <= end; begin += kGroup) some(Count<kGroup>{}, begin);
  for (; begin < end; ++begin) some(Count<1>{}, begin);
}

}  // namespace
}  // namespace fastfuse
