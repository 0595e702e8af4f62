// What the library has besides the ops.

#include "cuda/runtime.h"

FASTFUSE_API const char* fastfuse_error_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}
