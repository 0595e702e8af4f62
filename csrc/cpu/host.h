// What host functions share: from tensors to images and back.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/bilinear.h"
#include "cpu/image.h"
#include "cpu/integers.h"
#include "cpu/memory.h"
#include "cpu/sizes.h"

namespace fastfuse {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      check(false, op, argument, " must be float64, float32, bfloat16 or float16; got ",
            torch::headeronly::toString(tensor.scalar_type()));
      return kNumDtypes;
  }
}

inline int64_t compute_size(Dtype dtype) {
  return dtype == kFloat64 ? sizeof(double) : sizeof(float);
}

// The accumulation dtype.
inline ScalarType compute_type(Dtype dtype) {
  return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Image image(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3),  tensor.size(2),   tensor.size(3)};
}

inline Image channels_from(Image image, int64_t offset, size_t element_size) {
  image.data = static_cast<char*>(image.data) + offset * image.stride_c * element_size;
  return image;
}

// Bodies walk the innermost dimension with unit stride; any other strides are as they are.
inline bool has_unit_stride(const Tensor& tensor, bool channels_last) {
  const int64_t dim = channels_last ? 1 : 3;
  return tensor.stride(dim) == 1 || tensor.size(dim) == 1 || tensor.numel() == 0;
}

inline Tensor with_unit_stride(const Tensor& tensor, bool channels_last) {
  if (has_unit_stride(tensor, channels_last)) return tensor;
  return torch::stable::contiguous(
      tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline int64_t bytes_of(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

inline Tensor empty_output(std::vector<int64_t> sizes, const Tensor& like, bool channels_last) {
  Tensor output =
      torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                           channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  advise_huge_pages(output.data_ptr(), bytes_of(output));
  return output;
}

// Whether an output is worth writing past the caches: too large to be read from them again, and
// every run of it, along `channels` with channels_last and along x otherwise, whole cache lines.
inline bool worth_streaming(const Image& output, int64_t channels, int64_t output_bytes,
                            size_t element_size, bool channels_last) {
  constexpr int64_t kCacheLine = 64;
  const auto whole_lines = [&](int64_t elements) {
    return elements * static_cast<int64_t>(element_size) % kCacheLine == 0;
  };
  return output_bytes >= sizes().stream_bytes &&
         reinterpret_cast<uintptr_t>(output.data) % kCacheLine == 0 &&
         whole_lines(channels_last ? channels : output.width) &&
         whole_lines(channels_last ? output.stride_w : output.stride_h);
}

// How many units, of `values` each, are worth waking a thread for.
inline int64_t grain_of(int64_t values) {
  return std::max<int64_t>(1, sizes().grain / std::max<int64_t>(1, values));
}

// The same of units that share so much work: no thread has less than a whole `worthwhile` of it.
inline int64_t grain_of(int64_t units, int64_t work, int64_t worthwhile) {
  return std::max<int64_t>(1, units / std::max<int64_t>(1, work / worthwhile));
}

// Calls body(begin, end) for parts of the units [0, units), `grain` of them or more, on all
// threads.
template <class Body>
void for_units(int64_t units, int64_t grain, Body body) {
  torch::stable::parallel_for(0, units, grain, body);
}

// body(begin, end, scratch), with so many bytes of memory for each part.
template <class Body>
void for_units(int64_t units, int64_t grain, int64_t bytes, Body body) {
  for_units(units, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    body(begin, end, scratch.get());
  });
}

// Sampling tables in the compute type of a dtype; views into them stay valid as it grows.
class Tables {
 public:
  explicit Tables(Dtype dtype) : double_(dtype == kFloat64) {}

  Sampling axis(int64_t in, int64_t out, bool align_corners) {
    return double_ ? axes64_.emplace_back(in, out, align_corners).view()
                   : axes32_.emplace_back(in, out, align_corners).view();
  }
  AdjointSampling adjoint_axis(int64_t in, int64_t out, bool align_corners) {
    return double_ ? adjoints64_.emplace_back(BilinearAxis<double>(in, out, align_corners)).view()
                   : adjoints32_.emplace_back(BilinearAxis<float>(in, out, align_corners)).view();
  }

 private:
  bool double_;
  std::deque<BilinearAxis<float>> axes32_;
  std::deque<BilinearAxis<double>> axes64_;
  std::deque<BilinearAdjointAxis<float>> adjoints32_;
  std::deque<BilinearAdjointAxis<double>> adjoints64_;
};

}  // namespace fastfuse
