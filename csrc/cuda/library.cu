// What the library has besides the ops.

#include "cuda/runtime.h"

namespace {
__global__ void nothing() {}
}  // namespace

// Whether the current device and its driver run what the library is compiled to: 0, or an error.
FASTFUSE_API int fastfuse_check_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  cudaGetLastError();  // is not another call's
  return error;
}

FASTFUSE_API const char* fastfuse_error_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}
