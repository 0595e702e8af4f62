// Tiles of depthwise_conv2d and their rows: from images to small dense buffers, and back.
//
// Whatever the layout and the type, rows are brought into buffers [column][lane] in the compute
// type, or, paired, in bfloat16 with the row below in the upper halves of the lanes: from there on
// a vector is a pixel's channels, and dilation along x a step between pixels.
#pragma once

#include "cpu/depthwise_conv2d.h"
#include "cpu/depthwise_conv2d_elements.h"
#include "cpu/integers.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

struct DepthwiseTile {
  int64_t n, phase;
  int64_t group, c0, channels;
  int64_t row0, row1, rows;  // of a phase's rows
  int64_t x0, x1;            // columns of the output
  int64_t in0, in1;          // those it reads

  int64_t width() const { return x1 - x0; }
};

// Of all groups' tiles, in order of group, image, phase, row and column.
FASTFUSE_INLINE DepthwiseTile tile_of(const DepthwiseTiles& t, int64_t index) {
  DepthwiseTile tile;
  const auto next = [&](int64_t count) {  // digit of the index
    const int64_t digit = index % count;
    index /= count;
    return digit;
  };
  const int64_t column = next(t.column_tiles), row = next(t.row_tiles);
  tile.phase = next(t.phases);
  tile.n = next(t.batch);
  tile.group = index;
  tile.c0 = tile.group * t.group_channels;
  tile.channels = min_of(t.group_channels, t.channels - tile.c0);
  tile.rows = ceil_div(t.height - tile.phase, t.dilation);
  tile.row0 = tile.rows * row / t.row_tiles;
  tile.row1 = tile.rows * (row + 1) / t.row_tiles;
  const int64_t units = ceil_div(t.width, t.column_unit);
  tile.x0 = units * column / t.column_tiles * t.column_unit;
  tile.x1 = min_of(units * (column + 1) / t.column_tiles * t.column_unit, t.width);
  const int64_t reach = t.kernel_size / 2 * t.dilation;
  tile.in0 = max_of(tile.x0 - reach, 0);
  tile.in1 = min_of(tile.x1 + reach, t.width);
  return tile;
}

// `width` columns of an image's row from x on, and `channels` channels from c on.
struct RowPart {
  int64_t n, c, channels, y, x, width;
};

// Where it starts, or a further channel does.
template <class S>
FASTFUSE_INLINE S* at(const Image& image, const RowPart& part, int64_t channel = 0) {
  return static_cast<S*>(image.data) + part.n * image.stride_n +
         (part.c + channel) * image.stride_c + part.y * image.stride_h + part.x * image.stride_w;
}

// The elements of part of a row, to a buffer [column][lane] for each vector of channels, which are
// `distance` apart; lanes without a channel become 0.
template <class Elements, bool ChannelsLast, class A = typename Elements::Compute>
FASTFUSE_INLINE void read_row(const typename Elements::Reader& elements, const Image& image,
                              const RowPart& part, A* buffer, int64_t distance) {
  using S = typename Elements::Storage;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t width = part.width;
  if (ChannelsLast && part.channels == 2 * lanes) {  // at once, for they share cache lines
    const S* from = at<const S>(image, part);
    for (int64_t x = 0; x < width; ++x, from += image.stride_w, buffer += lanes) {
      store(buffer, elements(from));
      store(buffer + distance, elements(from + lanes));
    }
    return;
  }
  for (int64_t v = 0; v * lanes < part.channels; ++v) {
    const int64_t count = min_of(part.channels - v * lanes, lanes);
    const S* from = at<const S>(image, part, v * lanes);
    A* to = buffer + v * distance;
    if constexpr (ChannelsLast) {
      if (count == lanes) {
        for (int64_t x = 0; x < width; ++x, from += image.stride_w, to += lanes)
          store(to, elements(from));
      } else {
        for (int64_t x = 0; x < width; ++x, from += image.stride_w, to += lanes)
          store(to, elements(from, count));
      }
    } else {
      for (int64_t x = 0; x < width; x += lanes, from += lanes, to += lanes * lanes) {
        const int64_t columns = min_of(width - x, lanes);
        Vec<A> square[lanes];
        if (columns == lanes && count == lanes) {
          unrolled<0, lanes>([&](auto i) __attribute__((always_inline)) {
            square[i.value] = elements(from + i.value * image.stride_c);
          });
        } else {
          for (int64_t i = 0; i < lanes; ++i) {
            const S* row = from + i * image.stride_c;
            square[i] = i >= count        ? Vec<A>{}
                        : columns < lanes ? elements(row, columns)
                                          : elements(row);
          }
        }
        transpose<A>(square);
        if (columns == lanes) {
          unrolled<0, lanes>([&](auto i) __attribute__((always_inline)) {
            store(to + i.value * lanes, square[i.value]);
          });
        } else {
          for (int64_t i = 0; i < columns; ++i) store(to + i * lanes, square[i]);
        }
      }
    }
  }
}

// Into the second-level cache: hardware does not foresee rows.
template <class S, bool ChannelsLast, int Write>
FASTFUSE_INLINE void prefetch_row(const Image& image, const RowPart& part) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  const S* p = at<const S>(image, part);
  if constexpr (ChannelsLast) {
    for (int64_t x = 0; x < part.width; ++x, p += image.stride_w)
      for (int64_t i = 0; i < part.channels; i += kLine) __builtin_prefetch(p + i, Write, 2);
  } else {
    for (int64_t i = 0; i < part.channels; ++i, p += image.stride_c)
      for (int64_t x = 0; x < part.width; x += kLine) __builtin_prefetch(p + x, Write, 2);
  }
}

// The way back for vector `v` of the channels, with an addend where there is one.
template <class S, bool ChannelsLast, class A>
FASTFUSE_INLINE void write_vectors(const Image& image, const Image& addend, const RowPart& part,
                                   int64_t v, const A* buffer) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t width = part.width, count = min_of(lanes, part.channels - v * lanes);
  S* to = at<S>(image, part, v * lanes);
  const S* plus = addend.data ? at<const S>(addend, part, v * lanes) : nullptr;
  if constexpr (ChannelsLast) {
    const auto pixels = [&](auto load_some, auto store_some) {
      if (plus) {
        for (int64_t x = 0; x < width; ++x, buffer += lanes, to += image.stride_w) {
          store_some(to, load(buffer) + load_some(plus));
          plus += addend.stride_w;
        }
      } else {
        for (int64_t x = 0; x < width; ++x, buffer += lanes, to += image.stride_w)
          store_some(to, load(buffer));
      }
    };
    if (count == lanes)
      pixels([](const S* p) { return load(p); }, [](S* p, Vec<A> v) { store(p, v); });
    else
      pixels([count](const S* p) { return load_partial(p, count); },
             [count](S* p, Vec<A> v) { store_partial(p, v, count); });
  } else {
    for (int64_t x = 0; x < width; x += lanes, buffer += lanes * lanes) {
      const int64_t columns = min_of(width - x, lanes);
      if (columns == lanes && count == lanes && !plus) {
        Vec<A> square[lanes];
        unrolled<0, lanes>([&](auto i) __attribute__((always_inline)) {
          square[i.value] = load(buffer + i.value * lanes);
        });
        transpose<A>(square);
        unrolled<0, lanes>([&](auto i) __attribute__((always_inline)) {
          store(to + i.value * image.stride_c + x, square[i.value]);
        });
        continue;
      }
      Vec<A> square[lanes] = {};
      for (int64_t i = 0; i < columns; ++i) square[i] = load(buffer + i * lanes);
      transpose<A>(square);
      for (int64_t i = 0; i < count; ++i) {
        S* row = to + i * image.stride_c + x;
        const S* more = plus ? plus + i * addend.stride_c + x : nullptr;
        if (columns == lanes)
          store(row, more ? square[i] + load(more) : square[i]);
        else
          store_partial(row, more ? square[i] + load_partial(more, columns) : square[i], columns);
      }
    }
  }
}

// The way back, with an addend where there is one.
template <class S, bool ChannelsLast, class A>
FASTFUSE_INLINE void write_row(const Image& image, const Image& addend, const RowPart& part,
                               const A* buffer, int64_t distance) {
  constexpr int64_t lanes = kLanes<A>;
  if (ChannelsLast && part.channels == 2 * lanes && !addend.data) {
    S* to = at<S>(image, part);
    for (int64_t x = 0; x < part.width; ++x, buffer += lanes, to += image.stride_w) {
      store(to, load(buffer));
      store(to + lanes, load(buffer + distance));
    }
    return;
  }
  for (int64_t v = 0; v * lanes < part.channels; ++v)
    write_vectors<S, ChannelsLast>(image, addend, part, v, buffer + v * distance);
}

// `count` dense rows (taps) for the channels of a vector, to or from [tap][lane].
template <class S, class A>
FASTFUSE_INLINE void read_taps(const S* from, int64_t taps, int64_t count, bool flip, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t t = 0; t < taps; t += lanes) {
    const int64_t here = min_of(taps - t, lanes);
    Vec<A> square[lanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const S* p = from + i * taps + t;
      square[i] = here == lanes ? load(p) : load_partial(p, here);
    }
    transpose<A>(square);
    for (int64_t i = 0; i < here; ++i)
      store(to + (flip ? taps - 1 - (t + i) : t + i) * lanes, square[i]);
  }
}

template <class S, class A>
FASTFUSE_INLINE void write_taps(const A* from, int64_t taps, int64_t count, S* to) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t t = 0; t < taps; t += lanes) {
    const int64_t here = min_of(taps - t, lanes);
    Vec<A> square[lanes] = {};
    for (int64_t i = 0; i < here; ++i) square[i] = load(from + (t + i) * lanes);
    transpose<A>(square);
    for (int64_t i = 0; i < count; ++i) {
      S* p = to + i * taps + t;
      here == lanes ? store(p, square[i]) : store_partial(p, square[i], here);
    }
  }
}

}  // namespace
}  // namespace fastfuse
