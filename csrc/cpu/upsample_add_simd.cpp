// Vector bodies of upsample_add, compiled once per instruction set (see isa_list.h): the walks of
// upsample_bodies.h, which add the skip connection where they store.

#include "cpu/upsample_add.h"
#include "cpu/upsample_bodies.h"
#include "cpu/vec.h"

namespace fastfuse {
namespace FASTFUSE_ISA {
namespace {

template <class S>
struct AddRun {
  const S* skip;
  template <class Load>
  FASTFUSE_INLINE Vec<compute_t<S>> operator()(Vec<compute_t<S>> v, int64_t i, Load load) const {
    return v + load(skip + i);
  }
};

template <class S>
struct AddSkip {
  Image skip;
  FASTFUSE_INLINE AddRun<S> at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return {static_cast<const S*>(skip.data) + n * skip.stride_n + c * skip.stride_c +
            y * skip.stride_h + x * skip.stride_w};
  }
  bool rows_follow_each_other() const { return skip.stride_h == skip.width; }
};

template <class S, bool Stream>
void forward_contiguous(const UpsampleAdd& work, int64_t begin, int64_t end, void* scratch) {
  upsample_contiguous<S, Stream>(work, begin, end, scratch, AsIs{}, AddSkip<S>{work.skip});
}

template <class S, bool Stream>
void forward_channels_last(const UpsampleAdd& work, int64_t begin, int64_t end, void* scratch) {
  upsample_channels_last<S, Stream>(work, begin, end, scratch, AsIs{}, AddSkip<S>{work.skip});
}

}  // namespace

extern const UpsampleAddKernels upsample_add_kernels = {
    {FASTFUSE_UNITS_KERNELS(forward_contiguous, target_rows, upsample_contiguous_scratch),
     FASTFUSE_UNITS_KERNELS(forward_channels_last, target_pixels, upsample_channels_last_scratch)}};

}  // namespace FASTFUSE_ISA
}  // namespace fastfuse
