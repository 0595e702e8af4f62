// CUDA C++ on the CPU, by g++: what csrc/cuda/runtime.h offers under nvcc, and of the language what
// kernels use. Faults end a launch, which then returns an error.
//
// Compile with -DFASTFUSE_EMULATED -fsanitize=thread, link without the sanitizer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>
#include <driver_types.h>
#include <vector_functions.h>

#include <tuple>
#include <utility>

#include "checker.h"

// The CUDA headers leave these empty but for the last, of which g++ warns, and of `inline`.
#undef __launch_bounds__
#undef __forceinline__
#undef __shared__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __shared__ static

#include "intrinsics.h"

namespace fastfuse::emulator {

constexpr size_t kMaxShared = 227 << 10;

inline bool records_only = false;  // launches are written down and not run
inline std::string launches;       // a line each: name, grid, block, shared bytes, arguments
inline char* dynamic_memory = nullptr;

UNCHECKED inline void record(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  Dl_info found{};
  dladdr(kernel, &found);
  launches += found.dli_sname ? found.dli_sname : "?";
  for (const size_t number : {size_t(grid.x), size_t(grid.y), size_t(grid.z), size_t(block.x),
                              size_t(block.y), size_t(block.z), shared_bytes})
    launches += " " + std::to_string(number);
}

template <class T>
UNCHECKED void record_argument(const T& argument) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&argument);
  launches += " ";
  for (size_t i = 0; i < sizeof(T); ++i) {
    launches += "0123456789abcdef"[bytes[i] >> 4];
    launches += "0123456789abcdef"[bytes[i] & 15];
  }
}

UNCHECKED inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes) {
  if (stacks == nullptr) make_stacks();
  gridDim = grid;
  blockDim = block;
  thread_count = block.x * block.y * block.z;
  dynamic_memory = static_cast<char*>(std::aligned_alloc(128, (shared_bytes + 255) / 128 * 128));
  add_region(dynamic_memory, shared_bytes, Space::kShared);
  launch_epoch = ++epoch;
  std::vector<int> blocks(size_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  put_in_order(blocks);
  for (const unsigned number : blocks) {
    blockIdx = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    block_epoch = ++epoch;
    clear_shared();
    run_block();
    if (!fault.empty()) break;
  }
  drop_region();
  std::free(dynamic_memory);
}

// Values that lanes of a warp exchange: what lane `from` gives.
template <class T>
UNCHECKED T exchange(uint32_t mask, T value, int from, int line) {
  offer(&value, mask, line);
  const T other = *static_cast<const T*>(offered_by(mask, from));
  release(mask, line);
  return other;
}

UNCHECKED inline uint32_t ballot(uint32_t mask, int predicate, int line) {
  offer(&predicate, mask, line);
  uint32_t lanes = 0;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) lanes |= uint32_t(*static_cast<const int*>(offered_by(mask, i)) != 0) << i;
  release(mask, line);
  return lanes;
}

UNCHECKED inline void write_copy(const Copy& copy) {
  if (copy.from != nullptr)
    std::memcpy(copy.to, copy.from, copy.bytes);
  else
    std::memset(copy.to, 0, copy.bytes);
}

}  // namespace fastfuse::emulator

namespace fastfuse::cuda {

template <class... Parameters, class... Arguments>
UNCHECKED cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             size_t shared_bytes, cudaStream_t, Arguments... given) {
  namespace emulator = fastfuse::emulator;
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  if (!emulator::fault.empty()) return cudaErrorLaunchFailure;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > emulator::kMaxThreads || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.y > 65535 || grid.z > 65535 || shared_bytes > emulator::kMaxShared) {
    emulator::stop("a launch of a grid, blocks or shared memory that no device has");
    return cudaErrorInvalidConfiguration;
  }
  Call call{kernel, {static_cast<Parameters>(given)...}};
  emulator::record(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes);
  std::apply([](const auto&... each) UNCHECKED { (emulator::record_argument(each), ...); },
             call.second);
  emulator::launches += "\n";
  if (emulator::records_only) return cudaSuccess;
  emulator::kernel_arguments = &call;
  emulator::kernel_arguments_bytes = sizeof call;
  emulator::kernel_call = [](void* made) UNCHECKED {
    std::apply(static_cast<Call*>(made)->first, static_cast<Call*>(made)->second);
  };
  emulator::run_grid(grid, block, shared_bytes);
  return emulator::fault.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

template <class T>
UNCHECKED T* dynamic_shared() {
  return reinterpret_cast<T*>(fastfuse::emulator::dynamic_memory);
}

template <int Bytes>
UNCHECKED void copy_async(void* shared, const void* global, bool there = true) {
  namespace emulator = fastfuse::emulator;
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "as cp.async has them");
  const void* code = __builtin_return_address(0);
  const emulator::Copy copy{shared, there ? global : nullptr, Bytes};
  emulator::begin_copy(copy, code);
  const emulator::Inside inside;
  if (emulator::random_engine() % 2) emulator::write_copy(copy);  // it may come at once, or late
  emulator::current->open.push_back(copy);
}

UNCHECKED inline void commit_copies() {
  const fastfuse::emulator::Inside inside;
  fastfuse::emulator::Thread& thread = *fastfuse::emulator::current;
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int N>
UNCHECKED void wait_for_copies() {
  namespace emulator = fastfuse::emulator;
  const emulator::Inside inside;
  auto& groups = emulator::current->groups;
  while (groups.size() > N) {
    for (const emulator::Copy& copy : groups.front()) {
      emulator::write_copy(copy);
      emulator::end_copy(copy);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace fastfuse::cuda

// Between threads. A call's line tells which of them wait for each other.

UNCHECKED inline void __syncthreads(int line = __builtin_LINE()) {
  fastfuse::emulator::wait_for_block(0, line);
}
UNCHECKED inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  fastfuse::emulator::wait_for_block(predicate, line);
  return fastfuse::emulator::passed_predicates;
}
UNCHECKED inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return __syncthreads_count(predicate, line) > 0;
}
UNCHECKED inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return __syncthreads_count(predicate, line) == fastfuse::emulator::passed_threads;
}
UNCHECKED inline void __syncwarp(uint32_t mask = ~0u, int line = __builtin_LINE()) {
  fastfuse::emulator::wait_for_warp(mask, line);
}

UNCHECKED inline int emulated_lane() { return fastfuse::emulator::current->rank % warpSize; }

template <class T>
UNCHECKED T __shfl_sync(uint32_t mask, T value, int from, int width = 32,
                        int line = __builtin_LINE()) {
  const int segment = emulated_lane() / width * width;
  return fastfuse::emulator::exchange(mask, value, segment + (from & (width - 1)), line);
}
template <class T>
UNCHECKED T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32,
                            int line = __builtin_LINE()) {
  const int lane = emulated_lane(), other = lane ^ lanes;
  const bool there = other / width <= lane / width;
  return fastfuse::emulator::exchange(mask, value, there ? other : lane, line);
}
template <class T>
UNCHECKED T __shfl_up_sync(uint32_t mask, T value, unsigned lanes, int width = 32,
                           int line = __builtin_LINE()) {
  const int lane = emulated_lane(), other = lane - int(lanes);
  const bool there = other >= lane / width * width;
  return fastfuse::emulator::exchange(mask, value, there ? other : lane, line);
}
template <class T>
UNCHECKED T __shfl_down_sync(uint32_t mask, T value, unsigned lanes, int width = 32,
                             int line = __builtin_LINE()) {
  const int lane = emulated_lane(), other = lane + int(lanes);
  const bool there = other < (lane / width + 1) * width;
  return fastfuse::emulator::exchange(mask, value, there ? other : lane, line);
}
UNCHECKED inline uint32_t __ballot_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return fastfuse::emulator::ballot(mask, predicate, line);
}
UNCHECKED inline int __any_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return fastfuse::emulator::ballot(mask, predicate, line) != 0;
}
UNCHECKED inline int __all_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return fastfuse::emulator::ballot(mask, predicate, line) == mask;
}

// For Python.
extern "C" {
// Forgets what was, tensors too.
__attribute__((weak)) UNCHECKED void fastfuse_emulator_begin(uint32_t seed, int records_only) {
  namespace emulator = fastfuse::emulator;
  while (emulator::region_count > 0) emulator::drop_region();
  emulator::seed = seed;
  emulator::random_engine.seed(seed);
  emulator::records_only = records_only;
  emulator::launches.clear();
  emulator::fault.clear();
}
// A tensor's storage: of each byte whether it is an element's, and whether it is written.
__attribute__((weak)) UNCHECKED void fastfuse_emulator_tensor(void* begin, size_t size,
                                                              const uint8_t* valid,
                                                              uint8_t* written) {
  using namespace fastfuse::emulator;
  add_region(begin, size, Space::kGlobal, valid, written);
}
// A __shared__ variable or its guard, by the distance from the library's begin.
__attribute__((weak)) UNCHECKED void fastfuse_emulator_variable(size_t offset, size_t size,
                                                                int is_guard) {
  using namespace fastfuse::emulator;
  add_region(&__ehdr_start + offset, size, is_guard ? Space::kGuard : Space::kShared);
}
__attribute__((weak)) UNCHECKED const char* fastfuse_emulator_launches() {
  return fastfuse::emulator::launches.c_str();
}
__attribute__((weak)) UNCHECKED const char* fastfuse_emulator_fault() {
  return fastfuse::emulator::fault.c_str();
}
// Where in the library the fault is; 0 if that is not known.
__attribute__((weak)) UNCHECKED size_t fastfuse_emulator_fault_offset() {
  const char* code = static_cast<const char*>(fastfuse::emulator::fault_code);
  return code == nullptr ? 0 : code - &__ehdr_start;
}
}
