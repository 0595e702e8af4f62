// Upsampling of whole images, for vector bodies.
//
// A walk takes two functions. `prepare(v)` is applied to source values, once for each: before rows
// are widened, and after columns are interpolated along y. `finish.at(n, c, y, x)` gives for a run
// of the target (a row, or the channels of a pixel) a function `(v, i, load)` that is applied to
// the interpolated values at i before they are stored. docs/upsample_equalize_concat.md explains
// the walks.
#pragma once

#include "cpu/interpolate.h"
#include "cpu/upsample.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace {

// A `prepare` or a `finish` that changes nothing.
struct AsIs {
  template <class V, class... More>
  FASTFUSE_INLINE V operator()(V v, More...) const {
    return v;
  }
  FASTFUSE_INLINE AsIs at(int64_t, int64_t, int64_t, int64_t) const { return {}; }
  bool rows_follow_each_other() const { return true; }
};

template <class Work>
bool same_size(const Work& work) {
  return work.source.height == work.target.height && work.source.width == work.target.width;
}

// to[0, n) = finish(prepare(from[0, n)))
template <bool Stream, class S, class To, class Prepare, class Finish>
FASTFUSE_INLINE void transform(const S* from, To* to, int64_t n, Prepare prepare, Finish finish) {
  for_each_vector<compute_t<S>, Stream>(n, [&](int64_t i, auto load, auto store) {
    store(to + i, finish(prepare(load(from + i)), i, load));
  });
}

// Images of the target's size are not interpolated. Units are rows of planes (contiguous) or
// pixels (channels_last).
template <class S, bool Stream, class Prepare, class Finish>
void transform_rows(int64_t channels, const Image& from, const Image& to, int64_t begin,
                    int64_t end, Prepare prepare, Finish finish) {
  const int64_t height = to.height, width = to.width;
  const bool dense =
      from.stride_h == width && to.stride_h == width && finish.rows_follow_each_other();
  for (int64_t unit = begin; unit < end;) {
    const int64_t plane = unit / height, y = unit % height;
    const int64_t n = plane / channels, c = plane % channels;
    const int64_t rest = height - y < end - unit ? height - y : end - unit;
    const int64_t rows = dense ? rest : 1;
    transform<Stream>(
        static_cast<const S*>(from.data) + n * from.stride_n + c * from.stride_c +
            y * from.stride_h,
        static_cast<S*>(to.data) + n * to.stride_n + c * to.stride_c + y * to.stride_h,
        rows * width, prepare, finish.at(n, c, y, 0));
    unit += rows;
  }
}

template <class S, bool Stream, class Prepare, class Finish>
void transform_pixels(int64_t channels, const Image& from, const Image& to, int64_t begin,
                      int64_t end, Prepare prepare, Finish finish) {
  for (int64_t unit = begin; unit < end;) {
    const int64_t line = unit / to.width, x0 = unit % to.width;
    const int64_t x1 = to.width < x0 + end - unit ? to.width : x0 + end - unit;
    const int64_t n = line / to.height, y = line % to.height;
    const S* row = static_cast<const S*>(from.data) + n * from.stride_n + y * from.stride_h;
    S* to_row = static_cast<S*>(to.data) + n * to.stride_n + y * to.stride_h;
    for (int64_t x = x0; x < x1; ++x)
      transform<Stream>(row + x * from.stride_w, to_row + x * to.stride_w, channels, prepare,
                        finish.at(n, 0, y, x));
    unit += x1 - x0;
  }
}

// to[0, n) = finish(a and b interpolated)
template <bool Stream, class S, class A, class Finish>
FASTFUSE_INLINE void interpolate_to(const A* a, const A* b, A weight, S* to, int64_t n,
                                    Finish finish) {
  for_each_vector<A, Stream>(n, [&](int64_t i, auto load, auto store) {
    store(to + i, finish(interpolate<A>(load(a + i), load(b + i), splat(weight)), i, load));
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

// ---- contiguous; a unit is a row of the target -----------------------------------------------

template <class Work>
int64_t target_rows(const Work& work) {
  return work.batch * work.channels * work.target.height;
}

template <class Work>
int64_t upsample_contiguous_scratch(const Work& work) {
  return 2 * padded(work.target.width) + padded(work.source.width);
}

template <class S, bool Stream, class Prepare, class Finish>
FASTFUSE_INLINE void upsample_contiguous(const Upsampling& work, int64_t begin, int64_t end,
                                         void* scratch, Prepare prepare, Finish finish) {
  using A = compute_t<S>;
  const Image &source = work.source, &target = work.target;
  const A* weights = static_cast<const A*>(work.y.weight);
  if (same_size(work))
    return transform_rows<S, Stream>(work.channels, source, target, begin, end, prepare, finish);
  Neighbours<A> rows(scratch, padded(target.width));
  A* line = static_cast<A*>(scratch) + 2 * padded(target.width);

  for (int64_t unit = begin; unit < end;) {
    const int64_t plane = unit / target.height, y0 = unit % target.height;
    const int64_t y1 = target.height < y0 + end - unit ? target.height : y0 + end - unit;
    const int64_t n = plane / work.channels, c = plane % work.channels;
    const S* from = static_cast<const S*>(source.data) + n * source.stride_n + c * source.stride_c;
    S* to = static_cast<S*>(target.data) + n * target.stride_n + c * target.stride_c;
    unit += y1 - y0;

    rows.forget();
    const auto row = [&](int64_t index) {
      return rows.get(index, [&](A* wide) {
        const S* narrow = from + index * source.stride_h;
        if (work.x.identity()) {
          transform<false>(narrow, wide, source.width, prepare, AsIs{});
        } else {
          transform<false>(narrow, line, source.width, prepare, AsIs{});
          widen_row(line, work.x, wide);
        }
      });
    };
    for (int64_t y = y0; y < y1; ++y) {
      const A* lower = row(work.y.lower[y]);
      const A* upper = row(work.y.upper[y]);
      interpolate_to<Stream>(lower, upper, weights[y], to + y * target.stride_h, target.width,
                             finish.at(n, c, y, 0));
    }
  }
}

// ---- channels_last; a unit is a pixel of the target ------------------------------------------

template <class Work>
int64_t target_pixels(const Work& work) {
  return work.batch * work.target.height * work.target.width;
}

template <class Work>
int64_t upsample_channels_last_scratch(const Work& work) {
  return 2 * padded(work.channels);
}

template <class S, bool Stream, class Prepare, class Finish>
FASTFUSE_INLINE void upsample_channels_last(const Upsampling& work, int64_t begin, int64_t end,
                                            void* scratch, Prepare prepare, Finish finish) {
  using A = compute_t<S>;
  const Image &source = work.source, &target = work.target;
  const A* y_weights = static_cast<const A*>(work.y.weight);
  const A* x_weights = static_cast<const A*>(work.x.weight);
  if (same_size(work))
    return transform_pixels<S, Stream>(work.channels, source, target, begin, end, prepare, finish);
  Neighbours<A> columns(scratch, padded(work.channels));

  for (int64_t unit = begin; unit < end;) {
    const int64_t line = unit / target.width, x0 = unit % target.width;
    const int64_t x1 = target.width < x0 + end - unit ? target.width : x0 + end - unit;
    const int64_t n = line / target.height, y = line % target.height;
    const S* from = static_cast<const S*>(source.data) + n * source.stride_n;
    S* to = static_cast<S*>(target.data) + n * target.stride_n + y * target.stride_h;
    unit += x1 - x0;

    const S* lower_row = from + work.y.lower[y] * source.stride_h;
    const S* upper_row = from + work.y.upper[y] * source.stride_h;
    const Vec<A> y_weight = splat(y_weights[y]);
    columns.forget();
    const auto column = [&](int64_t index) {
      return columns.get(index, [&](A* result) {
        const S* a = lower_row + index * source.stride_w;
        const S* b = upper_row + index * source.stride_w;
        for_each_vector<A>(work.channels, [&](int64_t i, auto load, auto store) {
          store(result + i, prepare(interpolate<A>(load(a + i), load(b + i), y_weight)));
        });
      });
    };
    for (int64_t x = x0; x < x1; ++x) {
      const A* lower = column(work.x.lower[x]);
      const A* upper = column(work.x.upper[x]);
      interpolate_to<Stream>(lower, upper, x_weights[x], to + x * target.stride_w, work.channels,
                             finish.at(n, 0, y, x));
    }
  }
}

// The body with ordinary or with streaming stores.
template <auto Plain, auto Streaming, class Work>
void choose_stores(const Work& work, int64_t begin, int64_t end, void* scratch) {
  if (!work.stream) return Plain(work, begin, end, scratch);
  Streaming(work, begin, end, scratch);
  finish_streaming();
}

#define FASTFUSE_UNITS_KERNEL(S, body, units, scratch) \
  {choose_stores<body<S, false>, body<S, kCanStream>>, units, scratch}
#define FASTFUSE_UNITS_KERNELS(body, units, scratch) \
  {FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_UNITS_KERNEL, body, units, scratch)}

}  // namespace
}  // namespace fastfuse
