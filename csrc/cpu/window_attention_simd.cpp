// Vector bodies of window_attention. A head's keys and values of a window are copied to caches
// once, keys transposed; logits of a few queries at a time stay there until they are weights of
// values.

#include "cpu/exp.h"
#include "cpu/panels.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"
#include "cpu/window_attention.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

constexpr int64_t kQueries = kPanelMultiple;  // at a time

// Matrices of a head, a row for each token: `stride` is its size in whole vectors, and there are
// rows for whole vectors of tokens and a multiple of kQueries.
struct Sizes {
  int64_t tokens, stride, row_stride, rows;

  template <class A>
  static FASTFUSE_INLINE Sizes of(const WindowAttention& op) {
    const int64_t tokens = op.in.tokens();
    return {tokens, round_up(op.head_size, kLanes<A>), round_up(tokens, kLanes<A>),
            round_up(round_up(tokens, kLanes<A>), kQueries)};
  }
  int64_t matrix() const { return rows * stride; }
  // Logits of a block of queries; rows of a panel are read beyond the last token.
  int64_t logits() const { return kQueries * row_stride + kQueries; }
};

// What lies one after the other in scratch memory; null: what there would be.
class Carver {
 public:
  explicit Carver(void* scratch) : scratch_(static_cast<char*>(scratch)) {}
  template <class T>
  T* take(int64_t count) {
    char* const p = scratch_ ? scratch_ + taken_ : nullptr;
    taken_ += round_up(count * static_cast<int64_t>(sizeof(T)), kVectorBytes);
    return reinterpret_cast<T*>(p);
  }
  int64_t taken() const { return taken_; }

 private:
  char* scratch_;
  int64_t taken_ = 0;
};

// The tokens of a window.
struct Tokens {
  int64_t* pixels;   // of all images; -1: padding
  int64_t* regions;  // tokens of one see each other

  FASTFUSE_INLINE void find(const WindowAttention& op, int64_t window) {
    const AttentionWindows& in = op.in;
    const int64_t n = window / in.windows(), tile = window % in.windows();
    const int64_t across = in.width / in.window_width;
    const int64_t y0 = tile / across * in.window_height, x0 = tile % across * in.window_width;
    const auto region = [&](int64_t position, int64_t extent, int64_t size) -> int64_t {
      return (position >= extent - size) + (position >= extent - op.shift);
    };
    const bool last = y0 + in.window_height == in.height || x0 + in.window_width == in.width;
    divided_ = op.shift > 0 && last;
    const auto wrapped = [](int64_t position, int64_t extent) {
      return position < extent ? position : position - extent;
    };
    int64_t t = 0;
    for (int64_t i = 0; i < in.window_height; ++i) {
      const int64_t y = wrapped(y0 + i + in.top, in.height);
      for (int64_t j = 0; j < in.window_width; ++j, ++t) {
        const int64_t x = wrapped(x0 + j + in.left, in.width);
        const bool inside = y < op.height && x < op.width;
        pixels[t] = inside ? (n * op.height + y) * op.width + x : -1;
        if (divided_)
          regions[t] = 3 * region(y0 + i, in.height, in.window_height) +
                       region(x0 + j, in.width, in.window_width);
      }
    }
  }
  // Null: all see each other.
  const int64_t* divided() const { return divided_ ? regions : nullptr; }
  int64_t region(int64_t t) const { return divided_ ? regions[t] : 0; }

  // Asks for the tokens' `size` values of rows that are a stride apart.
  template <bool Write, class S>
  FASTFUSE_INLINE void prefetch(const S* rows, int64_t stride, int64_t size, int64_t begin,
                                int64_t end) const {
    for (int64_t t = begin; t < end; ++t)
      if (pixels[t] >= 0)
        for (int64_t c = 0; c < size; c += 64 / static_cast<int64_t>(sizeof(S)))
          __builtin_prefetch(rows + pixels[t] * stride + c, Write, Write ? 3 : 2);
  }

 private:
  bool divided_ = false;
};

// The tokens of a window, and of the one after it, which is asked for ahead.
struct Windows {
  Tokens now, next;
  int64_t window = -1;
  bool has_next = false;

  Windows(Carver& carver, int64_t tokens) {
    Tokens* const both[] = {&now, &next};
    for (Tokens* of : both) {
      of->pixels = carver.take<int64_t>(tokens);
      of->regions = carver.take<int64_t>(tokens);
    }
  }

  // Moves to a window of [0, end); false: it is there.
  FASTFUSE_INLINE bool move(const WindowAttention& op, int64_t to, int64_t end) {
    if (to == window) return false;
    if (has_next && to == window + 1) {
      const Tokens old = now;
      now = next;
      next = old;
    } else {
      now.find(op, to);
    }
    window = to;
    has_next = to + 1 < end;
    if (has_next) next.find(op, to + 1);
    return true;
  }
};

template <class A>
FASTFUSE_INLINE void clear(A* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

// to[t] = factor (from(pixel of t) + bias) for the tokens [begin, end); of what is no pixel the
// same without `from`, or zeros.
template <class S, class A = compute_t<S>>
FASTFUSE_INLINE void gather(A* to, int64_t stride, const S* from, int64_t from_stride,
                            const A* bias, bool pads_with_bias, const Tokens& tokens, int64_t begin,
                            int64_t end, int64_t size, A factor) {
  for (int64_t t = begin; t < end; ++t, to += stride) {
    const S* const row = tokens.pixels[t] >= 0 ? from + tokens.pixels[t] * from_stride : nullptr;
    if (!row && !(bias && pads_with_bias)) {
      clear(to, stride);
      continue;
    }
    for_channels<A>(size, [&](auto count, int64_t c, auto load, auto) {
      for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
        Vec<A> value = bias ? load(bias + c) : Vec<A>{};
        if (row) value += load(row + c);
        fastfuse::store(to + c, value * factor);
      }
    });
  }
}

template <class A>
FASTFUSE_INLINE A largest_lane(Vec<A> v) {
  A result = v[0];
  for (int i = 1; i < kLanes<A>; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// As exponentials, of any values: as PyTorch has them.
template <class A>
A exponentials_one_by_one(A* logits, int64_t tokens) {
  constexpr A kInfinity = __builtin_inf();
  A max = -kInfinity, sum = 0;
  bool numbers = true;
  for (int64_t t = 0; t < tokens; ++t) {
    numbers &= logits[t] == logits[t];
    max = logits[t] > max ? logits[t] : max;
  }
  const bool none = numbers && max == -kInfinity;
  for (int64_t t = 0; t < tokens; ++t) sum += logits[t] = none ? A(0) : exp_of(logits[t] - max);
  return none ? A(0) : 1 / sum;
}

// exp(logits - their largest), in place; returns 1 / sum. `bias` is added to logits before, and
// kApart where a region is another one than `region`.
template <class A>
FASTFUSE_INLINE A exponentials(A* logits, const A* bias, const int64_t* regions, int64_t region,
                               int64_t tokens, int64_t stride) {
  constexpr A kApart = -100, kNone = -1e30f;
  constexpr int lanes = kLanes<A>;
  for (int64_t t = tokens; t < stride; ++t) logits[t] = kNone;
  if (regions)
    for (int64_t t = 0; t < tokens; ++t) logits[t] += regions[t] == region ? A(0) : kApart;
  Vec<A> largest = splat<A>(kNone), total = {};
  int64_t t = 0;
  const auto take = [&](int64_t t) {
    Vec<A> x = load(logits + t);
    if (bias) {
      x += load(bias + t);
      store(logits + t, x);
    }
    return x;
  };
  for (; t + 4 * lanes <= stride; t += 4 * lanes) {  // chains are what would bound it
    const Vec<A> a = take(t), b = take(t + lanes), c = take(t + 2 * lanes), d = take(t + 3 * lanes);
    total += (a + b) + (c + d);
    const Vec<A> ab = a > b ? a : b, cd = c > d ? c : d, abcd = ab > cd ? ab : cd;
    largest = abcd > largest ? abcd : largest;
  }
  for (; t < stride; t += lanes) {
    const Vec<A> x = take(t);
    total += x;
    largest = x > largest ? x : largest;
  }
  const A max = largest_lane<A>(largest), check = sum_of_lanes<A>(total);
  if (__builtin_expect(!(check - check == 0) || !(max > kNone), 0))
    return exponentials_one_by_one(logits, tokens);
  Vec<A> sum = {};
  for (int64_t t = 0; t < stride; t += lanes) {
    const Vec<A> e = exp_of_negative(load(logits + t) - max);
    store(logits + t, e);
    sum += e;
  }
  return 1 / sum_of_lanes<A>(sum);
}

// Calls tap(weights of the tap, other token) for the neighbours of a token in its window.
template <class A, class Tap>
FASTFUSE_INLINE void for_neighbours(const WindowAttention& op, int64_t t, const A* weight,
                                    Tap tap) {
  const int64_t height = op.in.window_height, width = op.in.window_width;
  const int64_t y = t / width, x = t % width;
  for (int64_t dy = -1; dy <= 1; ++dy)
    for (int64_t dx = -1; dx <= 1; ++dx, weight += op.channels)
      if (y + dy >= 0 && y + dy < height && x + dx >= 0 && x + dx < width)
        tap(weight, t + dy * width + dx);
}

template <class A>
FASTFUSE_INLINE A scale_of(const WindowAttention& op) {
  return static_cast<A>(1 / __builtin_sqrt(static_cast<double>(op.head_size)));
}

// What a part keeps between units.
template <class S>
struct Forward {
  using A = compute_t<S>;
  Windows windows;
  A *keys, *transposed, *values, *queries, *logits, *sums;
  int64_t bytes;

  Forward(const WindowAttention& op, Carver carver) : windows(carver, op.in.tokens()) {
    const Sizes s = Sizes::of<A>(op);
    keys = carver.take<A>(s.matrix());
    transposed = carver.take<A>(s.row_stride * s.stride);
    values = carver.take<A>(s.matrix());
    queries = carver.take<A>(kQueries * s.stride);
    logits = carver.take<A>(s.logits());
    sums = carver.take<A>(kQueries * s.stride);
    bytes = carver.taken();
  }
};

template <class S>
int64_t scratch(const WindowAttention& op) {
  return Forward<S>(op, Carver(nullptr)).bytes;
}

template <class S>
void forward(const WindowAttention& op, int64_t begin, int64_t end, void* memory) {
  using A = compute_t<S>;
  constexpr int lanes = kLanes<A>;
  const Sizes s = Sizes::of<A>(op);
  Forward<S> f(op, Carver(memory));
  const int64_t parts = ceil_div(s.tokens, kQueriesOfUnit), size = op.head_size;
  int64_t head = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit % parts, new_head = unit / parts % op.in.heads;
    const bool moved = f.windows.move(op, unit / parts / op.in.heads, op.batch * op.in.windows());
    const Tokens& tokens = f.windows.now;
    const int64_t channel = (op.in.first_head + new_head) * size;
    const S* const q = static_cast<const S*>(op.qkv) + channel;
    const auto bias_of = [&](int64_t i) {
      return op.qkv_bias ? static_cast<const A*>(op.qkv_bias) + i * op.channels + channel : nullptr;
    };
    const A* const local_weight =
        op.local_weight ? static_cast<const A*>(op.local_weight) + channel : nullptr;
    const A* const local_bias =
        op.local_bias ? static_cast<const A*>(op.local_bias) + channel : nullptr;
    if (moved || new_head != head) {
      head = new_head;
      gather<S>(f.keys, s.stride, q + op.channels, 3 * op.channels, bias_of(1), op.pads_with_bias,
                tokens, 0, s.tokens, size, A(1));
      clear(f.keys + s.tokens * s.stride, (s.row_stride - s.tokens) * s.stride);
      transpose_rows(f.transposed, s.row_stride, f.keys, s.stride, s.row_stride, s.stride);
      gather<S>(f.values, s.stride, q + 2 * op.channels, 3 * op.channels, bias_of(2),
                op.pads_with_bias, tokens, 0, s.tokens, size, A(1));
    }
    const int64_t last = min_of((part + 1) * kQueriesOfUnit, s.tokens);
    for (int64_t first = part * kQueriesOfUnit; first < last; first += kQueries) {
      const int64_t count = min_of(kQueries, last - first);
      S* const block_out = static_cast<S*>(op.out) + channel;
      tokens.template prefetch<true>(block_out, op.channels, size, first, first + count);
      const bool last_head = head + 1 == op.in.heads;
      if (!last_head || f.windows.has_next)
        for (int64_t i = 0; i < 3; ++i)
          (last_head ? f.windows.next : tokens)
              .template prefetch<false>(q + i * op.channels + (last_head ? -head : 1) * size,
                                        3 * op.channels, size, first, first + count);
      gather<S>(f.queries, s.stride, q, 3 * op.channels, bias_of(0), op.pads_with_bias, tokens,
                first, first + count, size, scale_of<A>(op));
      multiply<A>(f.logits, s.row_stride, {f.queries, s.stride, 1}, count, f.transposed,
                  s.row_stride, size, s.row_stride);
      A inverse[kQueries];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = first + i;
        const A* bias = op.bias ? static_cast<const A*>(op.bias) +
                                      ((op.in.first_head + head) * s.tokens + t) * s.row_stride
                                : nullptr;
        inverse[i] = exponentials(f.logits + i * s.row_stride, bias, tokens.divided(),
                                  tokens.region(t), s.tokens, s.row_stride);
      }
      multiply<A>(f.sums, s.stride, {f.logits, s.row_stride, 1}, count, f.values, s.stride,
                  s.tokens, s.stride);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = first + i;
        if (tokens.pixels[t] < 0) continue;
        const A* const sums = f.sums + i * s.stride;
        S* const out = block_out + tokens.pixels[t] * op.channels;
        for_channels<A>(size, [&](auto vectors, int64_t c, auto load, auto store) {
          constexpr int kCount = decltype(vectors)::value;
          Vec<A> y[kCount];
          for (int v = 0; v < kCount; ++v)
            y[v] = fastfuse::load(sums + c + v * lanes) * inverse[i] +
                   (local_bias ? load(local_bias + c + v * lanes) : Vec<A>{});
          if (local_weight)
            for_neighbours(op, t, local_weight, [&](const A* tap, int64_t other) {
              const A* const value = f.values + other * s.stride + c;
              for (int v = 0; v < kCount; ++v)
                y[v] += load(tap + c + v * lanes) * fastfuse::load(value + v * lanes);
            });
          for (int v = 0; v < kCount; ++v) store(out + c + v * lanes, y[v]);
        });
      }
    }
  }
}

template <class S>
struct Backward {
  using A = compute_t<S>;
  Windows windows;
  A *queries, *keys, *values, *grads;         // a row for each token
  A *grad_queries, *grad_keys, *grad_values;  // the first of a block of queries
  A *transposed_keys, *transposed_values, *weights, *grad_logits;
  int64_t bytes;

  Backward(const WindowAttention& op, Carver carver) : windows(carver, op.in.tokens()) {
    const Sizes s = Sizes::of<A>(op);
    A** const matrices[] = {&queries, &keys, &values, &grads, &grad_keys, &grad_values};
    for (A** matrix : matrices) *matrix = carver.take<A>(s.matrix());
    grad_queries = carver.take<A>(kQueries * s.stride);
    transposed_keys = carver.take<A>(s.row_stride * s.stride);
    transposed_values = carver.take<A>(s.row_stride * s.stride);
    weights = carver.take<A>(s.logits());
    grad_logits = carver.take<A>(s.logits());
    bytes = carver.taken();
  }
};

template <class S>
int64_t backward_scratch(const WindowAttention& op) {
  return Backward<S>(op, Carver(nullptr)).bytes;
}

// to(pixel of t) = factor from[t], and its sums: of pixels, and of the rest where it has a bias
// too.
template <class S, class A = compute_t<S>>
FASTFUSE_INLINE void scatter(S* to, int64_t to_stride, A* sums, bool pads_with_bias, const A* from,
                             int64_t stride, const Tokens& tokens, int64_t begin, int64_t end,
                             int64_t size, A factor) {
  for (int64_t t = begin; t < end; ++t, from += stride) {
    S* const row = tokens.pixels[t] >= 0 ? to + tokens.pixels[t] * to_stride : nullptr;
    A* const sum = row || pads_with_bias ? sums : nullptr;
    for_channels<A>(size, [&](auto count, int64_t c, auto load, auto store) {
      for (int v = 0; v < decltype(count)::value; ++v, c += kLanes<A>) {
        const Vec<A> value = fastfuse::load(from + c) * factor;
        if (row) store(row + c, value);
        if (sum) store(sum + c, load(sum + c) + value);
      }
    });
  }
}

// The gradients of the local convolution: its input's are added to those of values.
template <class A>
FASTFUSE_INLINE void local_backward(const WindowAttention& op, const Sizes& s, int64_t channel,
                                    const A* grads, const A* values, A* grad_values, A* sums) {
  constexpr int lanes = kLanes<A>;
  const A* weight = static_cast<const A*>(op.local_weight) + channel;
  A* const grad_bias = sums + 9 * op.channels;
  for (int64_t t = 0; t < s.tokens; ++t) {
    const A* const grad = grads + t * s.stride;
    for_channels<A>(op.head_size, [&](auto count, int64_t c, auto load, auto store) {
      for (int v = 0; v < decltype(count)::value; ++v, c += lanes)
        store(grad_bias + c, load(grad_bias + c) + fastfuse::load(grad + c));
    });
    for_neighbours(op, t, weight, [&](const A* tap, int64_t other) {
      A* const grad_tap = sums + (tap - weight);
      const A* const value = values + other * s.stride;
      A* const grad_value = grad_values + other * s.stride;
      for_channels<A>(op.head_size, [&](auto count, int64_t c, auto load, auto store) {
        for (int v = 0; v < decltype(count)::value; ++v, c += lanes) {
          const Vec<A> g = fastfuse::load(grad + c);
          store(grad_tap + c, load(grad_tap + c) + g * fastfuse::load(value + c));
          fastfuse::store(grad_value + c, fastfuse::load(grad_value + c) + g * load(tap + c));
        }
      });
    });
  }
}

// Of weights P and their gradients G: P (G - sum of P G), over G.
template <class A>
FASTFUSE_INLINE void softmax_backward(const A* weights, A* grads, int64_t stride) {
  Vec<A> sum = {};
  for (int64_t t = 0; t < stride; t += kLanes<A>) sum += load(weights + t) * load(grads + t);
  const A total = sum_of_lanes<A>(sum);
  for (int64_t t = 0; t < stride; t += kLanes<A>)
    store(grads + t, load(weights + t) * (load(grads + t) - total));
}

template <class S>
void backward(const WindowAttentionBackward& all, int64_t begin, int64_t end, void* memory) {
  using A = compute_t<S>;
  constexpr int lanes = kLanes<A>;
  const WindowAttention& op = all.forward;
  const Sizes s = Sizes::of<A>(op);
  Backward<S> f(op, Carver(memory));
  const int64_t size = op.head_size, windows = op.batch * op.in.windows();
  const A scale = scale_of<A>(op);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / op.in.heads, head = unit % op.in.heads;
    const int64_t channel = (op.in.first_head + head) * size;
    A* const sums = static_cast<A*>(all.sums) + block * op.sums(s.row_stride);
    A* const of_qkv_bias = sums + op.sums_of_bias(s.row_stride) + channel;
    A* const of_local = sums + op.sums_of_bias(s.row_stride) + op.sums_of_qkv_bias() + channel;
    A* const of_bias = sums + head * s.tokens * s.row_stride;
    const S* const q = static_cast<const S*>(op.qkv) + channel;
    const S* const grad = static_cast<const S*>(all.grad) + channel;
    S* const grad_q = static_cast<S*>(all.grad_qkv) + channel;
    const auto bias_of = [&](int64_t i) {
      return op.qkv_bias ? static_cast<const A*>(op.qkv_bias) + i * op.channels + channel : nullptr;
    };
    const A* const bias = op.bias ? static_cast<const A*>(op.bias) +
                                        (op.in.first_head + head) * s.tokens * s.row_stride
                                  : nullptr;
    if (op.bias) clear(of_bias, s.tokens * s.row_stride);
    if (op.qkv_bias)
      for (int64_t i = 0; i < 3; ++i) clear(of_qkv_bias + i * op.channels, size);
    if (op.local_weight)
      for (int64_t i = 0; i < 10; ++i) clear(of_local + i * op.channels, size);

    const int64_t last = (block + 1) * windows / all.blocks;
    for (int64_t window = block * windows / all.blocks; window < last; ++window) {
      f.windows.move(op, window, last);
      const Tokens& tokens = f.windows.now;
      A* const matrices[] = {f.queries, f.keys, f.values};
      for (int64_t i = 0; i < 3; ++i) {
        gather<S>(matrices[i], s.stride, q + i * op.channels, 3 * op.channels, bias_of(i),
                  op.pads_with_bias, tokens, 0, s.tokens, size, i == 0 ? scale : A(1));
        clear(matrices[i] + s.tokens * s.stride, (s.rows - s.tokens) * s.stride);
      }
      gather<S>(f.grads, s.stride, grad, op.channels, static_cast<const A*>(nullptr), false, tokens,
                0, s.tokens, size, A(1));
      clear(f.grads + s.tokens * s.stride, (s.rows - s.tokens) * s.stride);
      transpose_rows(f.transposed_keys, s.row_stride, f.keys, s.stride, s.row_stride, s.stride);
      transpose_rows(f.transposed_values, s.row_stride, f.values, s.stride, s.row_stride, s.stride);
      clear(f.grad_keys, s.matrix());
      clear(f.grad_values, s.matrix());
      for (int64_t first = 0; first < s.tokens; first += kQueries) {
        const int64_t count = min_of(kQueries, s.tokens - first);
        const A* const queries = f.queries + first * s.stride;
        const A* const grads = f.grads + first * s.stride;
        if (f.windows.has_next) {
          const auto ask = [&](const S* rows, int64_t stride) {
            f.windows.next.template prefetch<false>(rows, stride, size, first, first + count);
          };
          for (int64_t i = 0; i < 3; ++i) ask(q + i * op.channels, 3 * op.channels);
          ask(grad, op.channels);
        }
        multiply<A>(f.weights, s.row_stride, {queries, s.stride, 1}, count, f.transposed_keys,
                    s.row_stride, size, s.row_stride);
        multiply<A>(f.grad_logits, s.row_stride, {grads, s.stride, 1}, count, f.transposed_values,
                    s.row_stride, size, s.row_stride);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t t = first + i;
          A* const weights = f.weights + i * s.row_stride;
          A* const grad_logits = f.grad_logits + i * s.row_stride;
          const A inverse =
              exponentials(weights, bias ? bias + t * s.row_stride : nullptr, tokens.divided(),
                           tokens.region(t), s.tokens, s.row_stride);
          for (int64_t j = 0; j < s.row_stride; j += lanes)
            store(weights + j, load(weights + j) * inverse);
          for (int64_t j = s.tokens; j < s.row_stride; ++j) weights[j] = 0;
          softmax_backward(weights, grad_logits, s.row_stride);
          if (bias) {
            A* const sum = of_bias + t * s.row_stride;
            for (int64_t j = 0; j < s.row_stride; j += lanes)
              store(sum + j, load(sum + j) + load(grad_logits + j));
          }
        }
        multiply<A>(f.grad_queries, s.stride, {f.grad_logits, s.row_stride, 1}, count, f.keys,
                    s.stride, s.tokens, s.stride);
        scatter<S>(grad_q, 3 * op.channels, op.qkv_bias ? of_qkv_bias : nullptr, op.pads_with_bias,
                   f.grad_queries, s.stride, tokens, first, first + count, size, scale);
        multiply<A, true>(f.grad_keys, s.stride, {f.grad_logits, 1, s.row_stride}, s.tokens,
                          queries, s.stride, count, s.stride);
        multiply<A, true>(f.grad_values, s.stride, {f.weights, 1, s.row_stride}, s.tokens, grads,
                          s.stride, count, s.stride);
      }
      if (op.local_weight)
        local_backward(op, s, channel, f.grads, f.values, f.grad_values, of_local);
      A* const found[] = {f.grad_keys, f.grad_values};
      for (int64_t i = 1; i < 3; ++i)
        scatter<S>(grad_q + i * op.channels, 3 * op.channels,
                   op.qkv_bias ? of_qkv_bias + i * op.channels : nullptr, op.pads_with_bias,
                   found[i - 1], s.stride, tokens, 0, s.tokens, size, A(1));
    }
  }
}

template <class S>
constexpr WindowAttentionKernels::Kernel kernel() {
  return {kLanes<compute_t<S>>, scratch<S>, backward_scratch<S>, forward<S>, backward<S>};
}

#define FASTFUSE_KERNEL(S) kernel<S>()

}  // namespace

extern const WindowAttentionKernels window_attention_kernels = {
    {FASTFUSE_FOR_EACH_DTYPE(FASTFUSE_KERNEL)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
