// Tiles of depthwise_conv2d and their rows: from images to small dense buffers, and back.
//
// Whatever the layout and the type, rows are brought into buffers [column][lane] in the compute
// type, or, paired, in bfloat16 with the row below in the upper halves of the lanes: from there on
// a vector is a pixel's channels, and dilation along x a step between pixels.
#pragma once

#include "cpu/depthwise_conv2d.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

struct DepthwiseTile {
  int64_t group, n, phase;
  int64_t row0, row1, rows;  // of a phase's rows
  int64_t x0, x1;            // columns of the output
  int64_t in0, in1;          // those it reads
};

FASTFUSE_INLINE DepthwiseTile tile_of(const DepthwiseTiles& t, int64_t group, int64_t index) {
  DepthwiseTile tile;
  tile.group = group;
  const int64_t column = index % t.column_tiles;
  index /= t.column_tiles;
  const int64_t row = index % t.row_tiles;
  index /= t.row_tiles;
  tile.phase = index % t.phases;
  tile.n = index / t.phases;
  tile.rows = (t.height - tile.phase + t.dilation - 1) / t.dilation;
  tile.row0 = tile.rows * row / t.row_tiles;
  tile.row1 = tile.rows * (row + 1) / t.row_tiles;
  const int64_t units = (t.width + t.column_unit - 1) / t.column_unit;
  tile.x0 = units * column / t.column_tiles * t.column_unit;
  tile.x1 = min_of(units * (column + 1) / t.column_tiles * t.column_unit, t.width);
  const int64_t reach = t.kernel_size / 2 * t.dilation;
  tile.in0 = max_of(tile.x0 - reach, 0);
  tile.in1 = min_of(tile.x1 + reach, t.width);
  return tile;
}

template <class S>
FASTFUSE_INLINE S* at(const Image& image, int64_t n, int64_t c, int64_t y, int64_t x) {
  return static_cast<S*>(image.data) + n * image.stride_n + c * image.stride_c +
         y * image.stride_h + x * image.stride_w;
}

// What a row gives for the values at an address of it: themselves, or in pairs.
template <class S>
struct Values {
  using Storage = S;
  FASTFUSE_INLINE Vec<compute_t<S>> operator()(const S* p) const { return load(p); }
  FASTFUSE_INLINE Vec<compute_t<S>> operator()(const S* p, int64_t n) const {
    return load_partial(p, n);
  }
};

#if defined(__AVX512BF16__)
// In the lower half of every lane the value of this row and in the upper one that of a row `below`;
// 0 for a row that is outside.
struct Pairs {
  using Storage = bfloat16;
  int64_t below;
  Bits lower, upper;

  Pairs(bool inside, bool inside_below, int64_t distance)
      : below(inside_below ? distance : 0),
        lower(Bits{} + (inside ? 0x0000FFFFu : 0)),
        upper(Bits{} + (inside_below ? 0xFFFF0000u : 0)) {}
  FASTFUSE_INLINE Vec<float> operator()(const bfloat16* p) const {
    return join(load_bytes<HalfBits>(p), load_bytes<HalfBits>(p + below));
  }
  FASTFUSE_INLINE Vec<float> operator()(const bfloat16* p, int64_t n) const {
    const auto mask = (__mmask16)((1u << n) - 1);
    return join((HalfBits)_mm256_maskz_loadu_epi16(mask, p),
                (HalfBits)_mm256_maskz_loadu_epi16(mask, p + below));
  }

 private:
  FASTFUSE_INLINE Vec<float> join(HalfBits here, HalfBits there) const {
    const Bits low = __builtin_convertvector(here, Bits) & lower;
    return (Vec<float>)(low | (__builtin_convertvector(there, Bits) << 16 & upper));
  }
};
#endif

// Columns [x0, x1) of a row and `channels` channels from c on, to `vectors` buffers
// [column][lane] that are `distance` apart; lanes without a channel become 0.
template <bool ChannelsLast, class Source, class A>
FASTFUSE_INLINE void read_row(const Source& values, const Image& image, int64_t n, int64_t c,
                              int64_t channels, int64_t y, int64_t x0, int64_t x1, A* buffer,
                              int64_t distance) {
  using S = typename Source::Storage;
  constexpr int64_t lanes = kLanes<A>;
  if (ChannelsLast && channels == 2 * lanes) {  // at once, for they share cache lines
    const S* from = at<const S>(image, n, c, y, x0);
    for (int64_t x = x0; x < x1; ++x, from += image.stride_w, buffer += lanes) {
      store(buffer, values(from));
      store(buffer + distance, values(from + lanes));
    }
    return;
  }
  for (int64_t v = 0; v * lanes < channels; ++v) {
    const int64_t count = min_of(channels - v * lanes, lanes);
    const S* from = at<const S>(image, n, c + v * lanes, y, x0);
    A* to = buffer + v * distance;
    if constexpr (ChannelsLast) {
      if (count == lanes) {
        for (int64_t x = x0; x < x1; ++x, from += image.stride_w, to += lanes)
          store(to, values(from));
      } else {
        for (int64_t x = x0; x < x1; ++x, from += image.stride_w, to += lanes)
          store(to, values(from, count));
      }
    } else {
      for (int64_t x = x0; x < x1; x += lanes, from += lanes, to += lanes * lanes) {
        const int64_t columns = min_of(x1 - x, lanes);
        Vec<A> square[lanes];
        if (columns == lanes && count == lanes) {
          unrolled<0, lanes>([&](auto i) __attribute__((always_inline)) {
            square[i.value] = values(from + i.value * image.stride_c);
          });
        } else {
          for (int64_t i = 0; i < lanes; ++i) {
            const S* row = from + i * image.stride_c;
            square[i] = i >= count        ? Vec<A>{}
                        : columns < lanes ? values(row, columns)
                                          : values(row);
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

// Columns [x0, x1) of a row for `channels` channels, into the second-level cache: hardware does not
// foresee rows.
template <class S, bool ChannelsLast, int Write>
FASTFUSE_INLINE void prefetch_row(const Image& image, int64_t n, int64_t c, int64_t channels,
                                  int64_t y, int64_t x0, int64_t x1) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  const S* p = at<const S>(image, n, c, y, x0);
  if constexpr (ChannelsLast) {
    for (int64_t x = x0; x < x1; ++x, p += image.stride_w)
      for (int64_t i = 0; i < channels; i += kLine) __builtin_prefetch(p + i, Write, 2);
  } else {
    for (int64_t i = 0; i < channels; ++i, p += image.stride_c)
      for (int64_t x = 0; x < x1 - x0; x += kLine) __builtin_prefetch(p + x, Write, 2);
  }
}

// The way back for one vector of channels, with an addend where there is one.
template <class S, bool ChannelsLast, class A>
FASTFUSE_INLINE void write_vectors(const Image& image, const Image& addend, int64_t n, int64_t c,
                                   int64_t count, int64_t y, int64_t x0, int64_t x1,
                                   const A* buffer) {
  constexpr int64_t lanes = kLanes<A>;
  S* to = at<S>(image, n, c, y, x0);
  const S* plus = addend.data ? at<const S>(addend, n, c, y, x0) : nullptr;
  if constexpr (ChannelsLast) {
    const auto pixels = [&](auto load_some, auto store_some) {
      if (plus) {
        for (int64_t x = x0; x < x1; ++x, buffer += lanes, to += image.stride_w) {
          store_some(to, load(buffer) + load_some(plus));
          plus += addend.stride_w;
        }
      } else {
        for (int64_t x = x0; x < x1; ++x, buffer += lanes, to += image.stride_w)
          store_some(to, load(buffer));
      }
    };
    if (count == lanes)
      pixels([](const S* p) { return load(p); }, [](S* p, Vec<A> v) { store(p, v); });
    else
      pixels([count](const S* p) { return load_partial(p, count); },
             [count](S* p, Vec<A> v) { store_partial(p, v, count); });
  } else {
    for (int64_t x = x0; x < x1; x += lanes, buffer += lanes * lanes) {
      const int64_t columns = min_of(x1 - x, lanes);
      if (columns == lanes && count == lanes && !plus) {
        Vec<A> square[lanes];
        unrolled<0, lanes>([&](auto i) __attribute__((always_inline)) {
          square[i.value] = load(buffer + i.value * lanes);
        });
        transpose<A>(square);
        unrolled<0, lanes>([&](auto i) __attribute__((always_inline)) {
          store(to + i.value * image.stride_c + (x - x0), square[i.value]);
        });
        continue;
      }
      Vec<A> square[lanes] = {};
      for (int64_t i = 0; i < columns; ++i) square[i] = load(buffer + i * lanes);
      transpose<A>(square);
      for (int64_t i = 0; i < count; ++i) {
        S* row = to + i * image.stride_c + (x - x0);
        const S* more = plus ? plus + i * addend.stride_c + (x - x0) : nullptr;
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
FASTFUSE_INLINE void write_row(const Image& image, const Image& addend, int64_t n, int64_t c,
                               int64_t channels, int64_t y, int64_t x0, int64_t x1, const A* buffer,
                               int64_t distance) {
  constexpr int64_t lanes = kLanes<A>;
  if (ChannelsLast && channels == 2 * lanes && !addend.data) {
    S* to = at<S>(image, n, c, y, x0);
    for (int64_t x = x0; x < x1; ++x, buffer += lanes, to += image.stride_w) {
      store(to, load(buffer));
      store(to + lanes, load(buffer + distance));
    }
    return;
  }
  for (int64_t v = 0; v * lanes < channels; ++v)
    write_vectors<S, ChannelsLast>(image, addend, n, c + v * lanes,
                                   min_of(lanes, channels - v * lanes), y, x0, x1,
                                   buffer + v * distance);
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
