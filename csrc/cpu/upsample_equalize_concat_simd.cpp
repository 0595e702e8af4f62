// Vector bodies of upsample_equalize_concat, compiled once per instruction set (see isa_list.h).
//
// out = (UP(x) - mean) / std = UP((x - mean) / std), because the weights of UP sum to one: the
// equalizer runs on the small source, interpolation after it. docs/upsample_equalize_concat.md
// explains the four bodies.

#include "cpu/integers.h"
#include "cpu/upsample_bodies.h"
#include "cpu/upsample_equalize_concat.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

template <class A>
struct Equalizer {
  A mean, inverse_std;
  explicit Equalizer(const EqualizedLevel& level)
      : mean(static_cast<A>(level.mean)), inverse_std(static_cast<A>(level.inverse_std)) {}
  FASTFUSE_INLINE Vec<A> operator()(Vec<A> v) const { return (v - mean) * inverse_std; }
};

template <class S, bool Stream>
void forward_contiguous(const EqualizedLevel& level, int64_t begin, int64_t end, void* scratch) {
  upsample_contiguous<S, Stream>(level, begin, end, scratch, Equalizer<compute_t<S>>(level),
                                 AsIs{});
}

template <class S, bool Stream>
void forward_channels_last(const EqualizedLevel& level, int64_t begin, int64_t end, void* scratch) {
  upsample_channels_last<S, Stream>(level, begin, end, scratch, Equalizer<compute_t<S>>(level),
                                    AsIs{});
}

// ---- backward, contiguous; a unit is a row of the source -------------------------------------

int64_t source_rows(const EqualizedLevel& level) {
  return level.batch * level.channels * level.source.height;
}

// Rows are reduced kLanes at a time, transposed, so that the reduction along x runs over lanes.
int64_t backward_contiguous_scratch(const EqualizedLevel& level) {
  return (padded(level.target.width) + padded(level.source.width)) * kLanes<float>;
}

// Sum over the target rows that read source row `s`, at x .. x + lanes.
template <class S, class Load>
FASTFUSE_INLINE Vec<compute_t<S>> gather_rows(const S* from, int64_t stride_h,
                                              const AdjointSampling& y, int64_t s, Load load) {
  using A = compute_t<S>;
  const A* weights = static_cast<const A*>(y.weight) + y.offset[s];
  Vec<A> sum{};
  const S* row = from + y.first[s] * stride_h;
  for (int32_t k = 0; k < y.count[s]; ++k, row += stride_h) sum += weights[k] * load(row);
  return sum;
}

template <class S, bool Stream>
void backward_contiguous(const EqualizedLevel& level, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const Image &source = level.source, &target = level.target;
  const AdjointSampling &adjoint_y = level.adjoint_y, &adjoint_x = level.adjoint_x;
  const A inverse_std = static_cast<A>(level.inverse_std);
  const A* x_weights = static_cast<const A*>(adjoint_x.weight);
  if (same_size(level))
    return transform_rows<S, Stream>(level.channels, target, source, begin, end,
                                     Equalizer<A>(level), AsIs{});
  Vec<A>* tall = static_cast<Vec<A>*>(scratch);   // [target.width][lane = row]
  Vec<A>* reduced = tall + padded(target.width);  // [source.width][lane = row]

  struct Row {
    const S* from;
    S* to;
    int64_t s;
  };
  const auto locate = [&](int64_t unit) {
    const int64_t plane = unit / source.height, s = unit % source.height;
    const int64_t n = plane / level.channels, c = plane % level.channels;
    return Row{static_cast<const S*>(target.data) + n * target.stride_n + c * target.stride_c,
               static_cast<S*>(source.data) + n * source.stride_n + c * source.stride_c +
                   s * source.stride_h,
               s};
  };

  if (adjoint_x.identity()) {  // nothing to reduce along x
    for (int64_t unit = begin; unit < end; ++unit) {
      const Row row = locate(unit);
      for_each_vector<A, Stream>(source.width, [&](int64_t i, auto load, auto store) {
        store(row.to + i,
              gather_rows(row.from + i, target.stride_h, adjoint_y, row.s, load) * inverse_std);
      });
    }
    return;
  }
  for (int64_t unit = begin; unit < end; unit += lanes) {
    Row rows[lanes];
    const int64_t count = end - unit < lanes ? end - unit : lanes;
    for (int64_t r = 0; r < lanes; ++r) rows[r] = locate(unit + (r < count ? r : 0));

    for_each_vector<A>(target.width, [&](int64_t i, auto load, auto) {
      Vec<A> tile[lanes];
      for (int64_t r = 0; r < lanes; ++r)
        tile[r] = gather_rows(rows[r].from + i, target.stride_h, adjoint_y, rows[r].s, load);
      transpose<A>(tile);
      for (int64_t r = 0; r < lanes; ++r) tall[i + r] = tile[r];
    });

    for (int64_t s = 0; s < source.width; ++s) {
      const A* weights = x_weights + adjoint_x.offset[s];
      const Vec<A>* column = tall + adjoint_x.first[s];
      Vec<A> sum{};
      for (int32_t k = 0; k < adjoint_x.count[s]; ++k) sum += weights[k] * column[k];
      reduced[s] = sum * inverse_std;
    }

    for_each_vector<A, Stream>(source.width, [&](int64_t i, auto, auto store) {
      Vec<A> tile[lanes];
      for (int64_t r = 0; r < lanes; ++r) tile[r] = reduced[i + r];
      transpose<A>(tile);
      for (int64_t r = 0; r < count; ++r) store(rows[r].to + i, tile[r]);
    });
  }
}

// ---- backward, channels_last; a unit is a row of the source in one block of channels ---------

// Channels whose sums stay in registers: per vector one column and the two pixels it adds to.
constexpr int kVectors = kVectorBytes == 64 ? 8 : 4;
constexpr int64_t kChannelBlock = 128;
// Hardware prefetchers stop at page ends, and a pixel of many channels is a page of its own.
constexpr int64_t kPrefetchPixels = 2;

int64_t channel_blocks(const EqualizedLevel& level) {
  return ceil_div(level.channels, kChannelBlock);
}

int64_t source_row_blocks(const EqualizedLevel& level) {
  if (same_size(level)) return target_pixels(level);
  return level.batch * channel_blocks(level) * level.source.height;
}

int64_t no_scratch(const EqualizedLevel&) { return 0; }

// One row of the source in `Vectors` vectors of channels: walks along the target, sums each column
// over the rows that read source row `sy`, and adds it to the two source pixels it was read from.
template <int Vectors, class S, class Load, class Store>
FASTFUSE_INLINE void gather_line(const S* from, S* to, const EqualizedLevel& level, int64_t sy,
                                 Load load, Store store) {
  using A = compute_t<S>;
  constexpr int64_t lanes = kLanes<A>;
  const Image &source = level.source, &target = level.target;
  const AdjointSampling& y = level.adjoint_y;
  const A* y_weights = static_cast<const A*>(y.weight) + y.offset[sy];
  const A* x_weights = static_cast<const A*>(level.x.weight);
  const A inverse_std = static_cast<A>(level.inverse_std);

  Vec<A> left[Vectors] = {}, right[Vectors] = {};
  int64_t sx = 0;
  const auto emit = [&] {
    for (int v = 0; v < Vectors; ++v) {
      store(to + sx * source.stride_w + v * lanes, left[v] * inverse_std);
      left[v] = right[v];
      right[v] = Vec<A>{};
    }
    ++sx;
  };
  const S* column = from + y.first[sy] * target.stride_h;
  for (int64_t x = 0; x < target.width; ++x, column += target.stride_w) {
    while (sx < level.x.lower[x]) emit();
    Vec<A> sum[Vectors] = {};
    const S* pixel = column;
    for (int32_t k = 0; k < y.count[sy]; ++k, pixel += target.stride_h)
      for (int v = 0; v < Vectors; ++v) {
        __builtin_prefetch(pixel + kPrefetchPixels * target.stride_w + v * lanes);
        sum[v] += y_weights[k] * load(pixel + v * lanes);
      }
    const A to_right = level.x.upper[x] > level.x.lower[x] ? x_weights[x] : A(0);
    for (int v = 0; v < Vectors; ++v) {
      left[v] += (A(1) - to_right) * sum[v];
      right[v] += to_right * sum[v];
    }
  }
  while (sx < source.width) emit();
}

template <class S, bool Stream>
void backward_channels_last(const EqualizedLevel& level, int64_t begin, int64_t end, void*) {
  using A = compute_t<S>;
  const Image &source = level.source, &target = level.target;
  if (same_size(level))
    return transform_pixels<S, Stream>(level.channels, target, source, begin, end,
                                       Equalizer<A>(level), AsIs{});
  const int64_t blocks = channel_blocks(level);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t line = unit / blocks, c0 = unit % blocks * kChannelBlock;
    const int64_t n = line / source.height, sy = line % source.height;
    const int64_t c1 = level.channels < c0 + kChannelBlock ? level.channels : c0 + kChannelBlock;
    const S* from = static_cast<const S*>(target.data) + n * target.stride_n;
    S* to = static_cast<S*>(source.data) + n * source.stride_n + sy * source.stride_h;

    int64_t c = c0;
    const auto gather = [&](auto vectors) {
      constexpr int count = decltype(vectors)::value;
      for (; c + count * kLanes<A> <= c1; c += count * kLanes<A>)
        for_each_vector<A, Stream>(kLanes<A>, [&](int64_t, auto load, auto store) {
          gather_line<count>(from + c, to + c, level, sy, load, store);
        });
    };
    gather(Count<kVectors>{});
    gather(Count<kVectors / 2>{});
    if constexpr (kVectors > 4) gather(Count<kVectors / 4>{});
    for_each_vector<A, Stream>(c1 - c, [&](int64_t i, auto load, auto store) {
      gather_line<1>(from + c + i, to + c + i, level, sy, load, store);
    });
  }
}

}  // namespace

extern const UpsampleEqualizeConcatKernels upsample_equalize_concat_kernels = {
    {FASTFUSE_UNITS_KERNELS(forward_contiguous, target_rows, upsample_contiguous_scratch),
     FASTFUSE_UNITS_KERNELS(forward_channels_last, target_pixels, upsample_channels_last_scratch)},
    {FASTFUSE_UNITS_KERNELS(backward_contiguous, source_rows, backward_contiguous_scratch),
     FASTFUSE_UNITS_KERNELS(backward_channels_last, source_row_blocks, no_scratch)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
