// What the host functions of ops on upsampled logits share.
#pragma once

#include "cpu/host.h"
#include "cpu/logits.h"

namespace fastfuse {

// Fresh (N, height, width) memory for a value of each target pixel.
inline Tensor pixels(const char* op, const Tensor& logits, int64_t height, int64_t width,
                     ScalarType type) {
  check_image(op, "logits", logits);
  check(logits.size(1) >= 1, op, "logits must have at least 1 class");
  check_axes(op, "size", height, width);
  return torch::stable::empty({logits.size(0), height, width}, type, std::nullopt, logits.device(),
                              std::nullopt, std::nullopt);
}

// Logits as bodies see them, in the layout that has unit stride.
struct LogitsOf {
  LogitsOf(const char* op, const Tensor& given, int64_t height, int64_t width, bool align_corners)
      : dtype(dtype_of(op, "logits", given)), tables(dtype) {
    check_axes(op, "logits", given.size(2), given.size(3));
    view.channels_last = !has_unit_stride(given, false) && has_unit_stride(given, true);
    tensor = with_unit_stride(given, view.channels_last);
    view.batch = given.size(0);
    view.classes = given.size(1);
    view.image = image(tensor);
    view.y = tables.axis(view.image.height, height, align_corners);
    view.x = tables.axis(view.image.width, width, align_corners);
    for (Sampling* axis : {&view.y, &view.x})  // no neighbour counts, not even by 0 of an infinity
      if (axis->identity()) axis->upper = axis->lower;
  }

  // body(begin, end, scratch) over the target rows of all images.
  template <class Body>
  void for_target_rows(int64_t bytes, Body body) const {
    for_units(view.batch * view.y.out, grain_of(view.x.out * view.classes), bytes, body);
  }

  Dtype dtype;
  Tables tables;
  Tensor tensor;
  Logits view{};
};

}  // namespace fastfuse
