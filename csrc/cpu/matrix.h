// Matrices of pixels as host functions see them: checks, threads, sums over rows.
#pragma once

#include <algorithm>
#include <optional>

#include "cpu/host.h"
#include "cpu/rows.h"

namespace fastfuse {

// An op's first matrix, which the others and the vectors have to fit.
class Matrix {
 public:
  Matrix(const char* op, const char* argument, const Tensor& tensor) : op_(op) {
    check(tensor.is_cpu() && tensor.dim() == 2, op, argument, " must be a CPU matrix");
    dtype_ = dtype_of(op, argument, tensor);
    rows_ = tensor.size(0);
    channels_ = tensor.size(1);
  }
  const char* op() const { return op_; }
  Dtype dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t channels() const { return channels_; }

  Rows matrix(const char* argument, const Tensor& tensor) const {
    check(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == rows_ &&
              tensor.size(1) == channels_ && dtype_of(op_, argument, tensor) == dtype_,
          op_, argument, " must be a matrix of ", rows_, " rows and ", channels_,
          " channels in the input's dtype");
    check(tensor.stride(1) == 1 || channels_ <= 1 || rows_ == 0, op_, argument,
          " must have unit stride along channels");
    return {tensor.data_ptr(), tensor.stride(0)};
  }
  Rows matrix(const char* argument, const std::optional<Tensor>& tensor) const {
    return tensor ? matrix(argument, *tensor) : Rows{};
  }
  void* vector(const char* argument, const Tensor& tensor, int64_t length) const {
    check(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == length &&
              (tensor.stride(0) == 1 || length <= 1) &&
              tensor.scalar_type() == compute_type(dtype_),
          op_, argument, " must be a contiguous vector of ", length,
          " values in the accumulation dtype");
    return tensor.data_ptr();
  }
  void* vector(const char* argument, const Tensor& tensor) const {
    return vector(argument, tensor, channels_);
  }
  void* vector(const char* argument, const std::optional<Tensor>& tensor) const {
    return tensor ? vector(argument, *tensor) : nullptr;
  }

  // The images of the rows: `first` and those after it, `pixels` rows each.
  Images images(const std::optional<Tensor>& keep, int64_t pixels, int64_t first) const {
    check_at_least(op_, "pixels", 1, pixels);
    check_at_least(op_, "first", 0, first);
    if (!keep) return {nullptr, std::max<int64_t>(rows_, 1), 0};  // all alike
    check(rows_ == 0 || keep->dim() != 1 || (first + rows_ - 1) / pixels < keep->size(0), op_,
          "keep must have a value for every image");
    return {vector("keep", *keep, keep->dim() == 1 ? keep->size(0) : -1), pixels, first};
  }

  // Bytes of two rows of whole vectors, whatever the instruction set.
  int64_t two_rows() const {
    constexpr int64_t kVector = 64;
    return 2 * (channels_ * compute_size(dtype_) + kVector);
  }

  // body(begin, end) over the rows, or body(begin, end, scratch) with so many bytes.
  template <class... Arguments>
  void for_rows(Arguments... bytes_and_body) const {
    if (channels_ > 0) for_units(rows_, grain_of(channels_), bytes_and_body...);
  }

  // body(sums, begin, end) over blocks of rows, each with `count` vectors of sums; these are added
  // in order to `totals`.
  template <class Body>
  void for_blocks(int count, void* const* totals, Body body) const {
    if (rows_ == 0 || channels_ == 0) return;
    const int64_t blocks = ceil_div(rows_, kRowBlock);
    const Scratch sums(blocks * count * channels_ * compute_size(dtype_));
    for_units(blocks, 1, [&](int64_t begin, int64_t end) { body(sums.get(), begin, end); });
    const auto add = [&](auto* partial, auto zero) {
      for (int64_t b = 0; b < blocks; ++b)
        for (int i = 0; i < count; ++i, partial += channels_) {
          auto* total = static_cast<decltype(zero)*>(totals[i]);
          for (int64_t c = 0; c < channels_; ++c) total[c] += partial[c];
        }
    };
    if (dtype_ == kFloat64)
      add(static_cast<const double*>(sums.get()), 0.0);
    else
      add(static_cast<const float*>(sums.get()), 0.0f);
  }

 private:
  const char* op_;
  Dtype dtype_;
  int64_t rows_, channels_;
};

}  // namespace fastfuse
