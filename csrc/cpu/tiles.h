// Tiles of channels_last images whose working rows fit the second-level cache, for vector bodies.
#pragma once

#include "cpu/integers.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

constexpr int64_t kMaxChannels = 512, kMinChannels = 64;  // of a tile
constexpr int64_t kMinColumns = 32;  // of the output, unless there are very many channels

struct Tile {
  int64_t n, c0, channels, x0, x1;
  int64_t stride;  // of the buffers: channels in whole vectors
};

// Images cut into tiles whose every column takes `column_bytes` per channel.
struct Tiling {
  int64_t all_channels, all_columns;
  int64_t channels, columns, channel_blocks, column_blocks;

  // Tiles take at most `ring_bytes` where that gives columns enough; they are a multiple of columns
  // wide, and of kMinChannels channels, which are whole cache lines.
  Tiling(int64_t ring_bytes, int64_t all_channels, int64_t all_columns, int64_t column_bytes,
         int64_t min_columns, int64_t multiple)
      : all_channels(all_channels), all_columns(all_columns) {
    channels = min_of(all_channels, kMaxChannels);
    const auto fitting = [&] { return ring_bytes / (channels * column_bytes); };
    while (fitting() < min_of(min_columns, all_columns) && channels > kMinChannels)
      channels = max_of(channels / 2 / kMinChannels * kMinChannels, kMinChannels);
    column_blocks = ceil_div(all_columns, max_of(min_of(fitting(), all_columns), 1));
    columns = round_up(ceil_div(all_columns, column_blocks), multiple);
    column_blocks = ceil_div(all_columns, columns);
    channel_blocks = ceil_div(all_channels, channels);
  }

  int64_t tiles() const { return channel_blocks * column_blocks; }  // of an image

  template <class A>
  FASTFUSE_INLINE Tile tile(int64_t n, int64_t index) const {
    const int64_t c0 = index / column_blocks * channels;
    const int64_t x0 = min_of(index % column_blocks * columns, all_columns);
    const int64_t here = min_of(channels, all_channels - c0);
    return {n, c0, here, x0, min_of(x0 + columns, all_columns), round_up(here, kLanes<A>)};
  }
};

// Calls row(tile, y, whether it did y - 1 of the tile just before) for the units [begin, end):
// `height` rows a tile, tile after tile.
template <class A, class Do>
FASTFUSE_INLINE void for_rows(const Tiling& tiling, int64_t height, int64_t begin, int64_t end,
                              Do row) {
  while (begin < end) {
    const int64_t line = begin / height, first = begin % height;
    const int64_t last = min_of(first + end - begin, height);
    const Tile tile = tiling.tile<A>(line / tiling.tiles(), line % tiling.tiles());
    for (int64_t y = first; y < last; ++y) row(tile, y, y > first);
    begin += last - first;
  }
}

// Calls part(Count<vectors>, first channel, load, store) over n channels, each of them once:
// outputs may be added to. With Stream, stores bypass the caches: then n must be whole vectors.
template <class A, bool Stream = false, class Part>
FASTFUSE_INLINE void for_channels(int64_t n, Part part) {
  constexpr int kVectors = 4;
  constexpr int64_t lanes = kLanes<A>;
  const auto whole_load = [](const auto* p) { return load(p); };
  const auto whole_store = [](auto* p, auto v) {
    if constexpr (Stream)
      stream(p, v);
    else
      store(p, v);
  };
  int64_t c = 0;
  for (; c + kVectors * lanes <= n; c += kVectors * lanes)
    part(Count<kVectors>{}, c, whole_load, whole_store);
  for (; c + lanes <= n; c += lanes) part(Count<1>{}, c, whole_load, whole_store);
  if (Stream || c == n) return;
  part(
      Count<1>{}, c, [m = n - c](const auto* p) { return load_partial(p, m); },
      [m = n - c](auto* p, auto v) { store_partial(p, v, m); });
}

// Hardware prefetchers stop at page ends, and a pixel of all taps is more than a page: the pixels
// of the next row that correspond to position `x` of `size`, into the second-level cache.
template <class S>
FASTFUSE_INLINE void prefetch_below(const S* row, int64_t stride, int64_t pixels, int64_t x,
                                    int64_t size, int64_t channels) {
  for (int64_t i = x * pixels / size; i < (x + 1) * pixels / size; ++i)
    for (int64_t c = 0; c < channels; c += 64 / static_cast<int64_t>(sizeof(S)))
      __builtin_prefetch(row + i * stride + c, 0, 2);
}

// The same address, of which the compiler knows nothing: what is at constant distances from it is
// addressed so, and not by an index register for each.
template <class P>
FASTFUSE_INLINE P opaque(P p) {
  asm("" : "+r"(p));
  return p;
}

}  // namespace
}  // namespace fastfuse
