// Vector bodies of upsample_equalize_concat, compiled once per instruction set (see isa_list.h).
//
// out = (UP(x) - mean) / std = UP((x - mean) / std), because the weights of UP sum to one: the
// equalizer runs on the small source, interpolation after it. docs/upsample_equalize_concat.md
// explains the four bodies.

#include "cpu/interpolate.h"
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

bool same_size(const EqualizedLevel& level) {
  return level.source.height == level.target.height && level.source.width == level.target.width;
}

// to[0, n) = equalized from[0, n)
template <bool Stream = false, class S, class To>
FASTFUSE_INLINE void equalize(const S* from, To* to, int64_t n, Equalizer<compute_t<S>> equalizer) {
  for_each_vector<compute_t<S>, Stream>(
      n, [&](int64_t i, auto load, auto store) { store(to + i, equalizer(load(from + i))); });
}

// Levels that already have the target's size are only equalized, from one image to another of the
// same size. Units are rows of planes (contiguous) or pixels (channels_last).
template <class S, bool Stream>
void equalize_rows(const EqualizedLevel& level, const Image& from, const Image& to, int64_t begin,
                   int64_t end, Equalizer<compute_t<S>> equalizer) {
  const int64_t height = to.height, width = to.width;
  const bool dense = from.stride_h == width && to.stride_h == width;  // rows follow each other
  for (int64_t unit = begin; unit < end;) {
    const int64_t plane = unit / height, y = unit % height;
    const int64_t n = plane / level.channels, c = plane % level.channels;
    const int64_t rest = height - y < end - unit ? height - y : end - unit;
    const int64_t rows = dense ? rest : 1;
    equalize<Stream>(static_cast<const S*>(from.data) + n * from.stride_n + c * from.stride_c +
                         y * from.stride_h,
                     static_cast<S*>(to.data) + n * to.stride_n + c * to.stride_c + y * to.stride_h,
                     rows * width, equalizer);
    unit += rows;
  }
}

template <class S, bool Stream>
void equalize_pixels(const EqualizedLevel& level, const Image& from, const Image& to, int64_t begin,
                     int64_t end, Equalizer<compute_t<S>> equalizer) {
  for (int64_t unit = begin; unit < end;) {
    const int64_t line = unit / to.width, x0 = unit % to.width;
    const int64_t x1 = to.width < x0 + end - unit ? to.width : x0 + end - unit;
    const int64_t n = line / to.height, y = line % to.height;
    const S* row = static_cast<const S*>(from.data) + n * from.stride_n + y * from.stride_h;
    S* to_row = static_cast<S*>(to.data) + n * to.stride_n + y * to.stride_h;
    for (int64_t x = x0; x < x1; ++x)
      equalize<Stream>(row + x * from.stride_w, to_row + x * to.stride_w, level.channels,
                       equalizer);
    unit += x1 - x0;
  }
}

// to[0, n) = a and b interpolated
template <bool Stream, class S, class A>
FASTFUSE_INLINE void interpolate_to(const A* a, const A* b, A weight, S* to, int64_t n) {
  for_each_vector<A, Stream>(n, [&](int64_t i, auto load, auto store) {
    store(to + i, interpolate<A>(load(a + i), load(b + i), splat(weight)));
  });
}

// The two neighbouring rows (or columns) an output lies between. Neighbours differ in parity, so
// two slots suffice; walking down an image, each is computed once.
template <class A>
class Neighbours {
 public:
  Neighbours(void* scratch, int64_t length) : slots_{(A*)scratch, (A*)scratch + length} {}
  void forget() { held_[0] = held_[1] = -1; }

  template <class Compute>
  FASTFUSE_INLINE const A* get(int64_t index, Compute compute) {
    const int slot = index & 1;
    if (held_[slot] != index) {
      compute(slots_[slot]);
      held_[slot] = index;
    }
    return slots_[slot];
  }

 private:
  A* slots_[2];
  int64_t held_[2] = {-1, -1};
};

// ---- forward, contiguous; a unit is a row of the target --------------------------------------

int64_t target_rows(const EqualizedLevel& level) {
  return level.batch * level.channels * level.target.height;
}

int64_t forward_contiguous_scratch(const EqualizedLevel& level) {
  return 2 * padded(level.target.width) + padded(level.source.width);
}

template <class S, bool Stream>
void forward_contiguous(const EqualizedLevel& level, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const Image &source = level.source, &target = level.target;
  const Equalizer<A> equalizer(level);
  const A* weights = static_cast<const A*>(level.y.weight);
  if (same_size(level))
    return equalize_rows<S, Stream>(level, source, target, begin, end, equalizer);
  Neighbours<A> rows(scratch, padded(target.width));
  A* line = static_cast<A*>(scratch) + 2 * padded(target.width);

  for (int64_t unit = begin; unit < end;) {
    const int64_t plane = unit / target.height, y0 = unit % target.height;
    const int64_t y1 = target.height < y0 + end - unit ? target.height : y0 + end - unit;
    const int64_t n = plane / level.channels, c = plane % level.channels;
    const S* from = static_cast<const S*>(source.data) + n * source.stride_n + c * source.stride_c;
    S* to = static_cast<S*>(target.data) + n * target.stride_n + c * target.stride_c;
    unit += y1 - y0;

    rows.forget();
    const auto row = [&](int64_t index) {
      return rows.get(index, [&](A* wide) {
        const S* narrow = from + index * source.stride_h;
        if (level.x.identity()) {
          equalize(narrow, wide, source.width, equalizer);
        } else {
          equalize(narrow, line, source.width, equalizer);
          widen_row(line, level.x, wide);
        }
      });
    };
    for (int64_t y = y0; y < y1; ++y) {
      const A* lower = row(level.y.lower[y]);
      const A* upper = row(level.y.upper[y]);
      interpolate_to<Stream>(lower, upper, weights[y], to + y * target.stride_h, target.width);
    }
  }
}

// ---- forward, channels_last; a unit is a pixel of the target ---------------------------------

int64_t target_pixels(const EqualizedLevel& level) {
  return level.batch * level.target.height * level.target.width;
}

int64_t forward_channels_last_scratch(const EqualizedLevel& level) {
  return 2 * padded(level.channels);
}

template <class S, bool Stream>
void forward_channels_last(const EqualizedLevel& level, int64_t begin, int64_t end, void* scratch) {
  using A = compute_t<S>;
  const Image &source = level.source, &target = level.target;
  const Equalizer<A> equalizer(level);
  const A* y_weights = static_cast<const A*>(level.y.weight);
  const A* x_weights = static_cast<const A*>(level.x.weight);
  if (same_size(level))
    return equalize_pixels<S, Stream>(level, source, target, begin, end, equalizer);
  Neighbours<A> columns(scratch, padded(level.channels));

  for (int64_t unit = begin; unit < end;) {
    const int64_t line = unit / target.width, x0 = unit % target.width;
    const int64_t x1 = target.width < x0 + end - unit ? target.width : x0 + end - unit;
    const int64_t n = line / target.height, y = line % target.height;
    const S* from = static_cast<const S*>(source.data) + n * source.stride_n;
    S* to = static_cast<S*>(target.data) + n * target.stride_n + y * target.stride_h;
    unit += x1 - x0;

    const S* lower_row = from + level.y.lower[y] * source.stride_h;
    const S* upper_row = from + level.y.upper[y] * source.stride_h;
    const Vec<A> y_weight = splat(y_weights[y]);
    columns.forget();
    const auto column = [&](int64_t index) {
      return columns.get(index, [&](A* result) {
        const S* a = lower_row + index * source.stride_w;
        const S* b = upper_row + index * source.stride_w;
        for_each_vector<A>(level.channels, [&](int64_t i, auto load, auto store) {
          store(result + i, equalizer(interpolate<A>(load(a + i), load(b + i), y_weight)));
        });
      });
    };
    for (int64_t x = x0; x < x1; ++x) {
      const A* lower = column(level.x.lower[x]);
      const A* upper = column(level.x.upper[x]);
      interpolate_to<Stream>(lower, upper, x_weights[x], to + x * target.stride_w, level.channels);
    }
  }
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
    return equalize_rows<S, Stream>(level, target, source, begin, end, Equalizer<A>(level));
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
  return (level.channels + kChannelBlock - 1) / kChannelBlock;
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
    return equalize_pixels<S, Stream>(level, target, source, begin, end, Equalizer<A>(level));
  const int64_t blocks = channel_blocks(level);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t line = unit / blocks, c0 = unit % blocks * kChannelBlock;
    const int64_t n = line / source.height, sy = line % source.height;
    const int64_t c1 = level.channels < c0 + kChannelBlock ? level.channels : c0 + kChannelBlock;
    const S* from = static_cast<const S*>(target.data) + n * target.stride_n;
    S* to = static_cast<S*>(source.data) + n * source.stride_n + sy * source.stride_h;

    constexpr int64_t step = kVectors * kLanes<A>;
    int64_t c = c0;
    for (; c + step <= c1; c += step)
      for_each_vector<A, Stream>(kLanes<A>, [&](int64_t, auto load, auto store) {
        gather_line<kVectors>(from + c, to + c, level, sy, load, store);
      });
    for_each_vector<A, Stream>(c1 - c, [&](int64_t i, auto load, auto store) {
      gather_line<1>(from + c + i, to + c + i, level, sy, load, store);
    });
  }
}

template <class S, void (*Plain)(const EqualizedLevel&, int64_t, int64_t, void*),
          void (*Streaming)(const EqualizedLevel&, int64_t, int64_t, void*)>
void choose_stores(const EqualizedLevel& level, int64_t begin, int64_t end, void* scratch) {
  if (!level.stream) return Plain(level, begin, end, scratch);
  Streaming(level, begin, end, scratch);
  finish_streaming();
}

#define FASTFUSE_KERNEL(S, body, units, scratch) \
  {choose_stores<S, body<S, false>, body<S, true>>, units, scratch}
#define FASTFUSE_FOR_DTYPES(body, units, scratch)      \
  {                                                    \
      FASTFUSE_KERNEL(double, body, units, scratch),   \
      FASTFUSE_KERNEL(float, body, units, scratch),    \
      FASTFUSE_KERNEL(bfloat16, body, units, scratch), \
      FASTFUSE_KERNEL(float16, body, units, scratch),  \
  }

}  // namespace

extern const UpsampleEqualizeConcatKernels upsample_equalize_concat_kernels = {
    {FASTFUSE_FOR_DTYPES(forward_contiguous, target_rows, forward_contiguous_scratch),
     FASTFUSE_FOR_DTYPES(forward_channels_last, target_pixels, forward_channels_last_scratch)},
    {FASTFUSE_FOR_DTYPES(backward_contiguous, source_rows, backward_contiguous_scratch),
     FASTFUSE_FOR_DTYPES(backward_channels_last, source_row_blocks, no_scratch)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
