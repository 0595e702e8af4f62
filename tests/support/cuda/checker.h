// Looks at every access of a kernel: g++ -fsanitize=thread calls the hooks below, which stand in
// the place of the sanitizer's own library.
//
// An access lies in elements of the tensors that the launch was given or in shared memory, is
// aligned, reads nothing that nobody wrote or that an asynchronous copy still brings, and races
// with no other: barriers order a block's, __syncwarp a warp's, nothing those of several blocks.
#pragma once

#include <cstring>

#include "fibers.h"

// Where this library begins, and its variables; shared ones are among them.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, __bss_start;

namespace fastfuse::emulator {

constexpr int kSeveral = -1;  // threads of a warp, or warps

// Who accessed a byte last, and when.
struct Access {
  uint32_t epoch = 0, phase = 0;
  int warp = 0, thread = 0;
};

struct Byte {
  Access write, read;
  uint32_t earlier_read = 0;  // the epoch of the last block but one that read it
  bool pending = false;       // an asynchronous copy is to write it
};

enum class Space { kGlobal, kShared, kGuard };  // a guard tells whether a variable is initialised

// Memory of a kernel; of each of its bytes one of `valid`, `written` and `bytes`.
struct Region {
  char* begin;
  size_t size;
  Space space;
  const uint8_t* valid;  // null: all
  uint8_t* written;      // of shared memory the region's own, as are `bytes`
  Byte* bytes;
};

constexpr int kMaxRegions = 256;
inline Region regions[kMaxRegions];
inline int region_count = 0;

UNCHECKED inline bool is_within(const char* address, const void* begin, size_t size) {
  return size_t(address - static_cast<const char*>(begin)) < size;
}

UNCHECKED inline Region* region_of(const char* address) {
  static int last = 0;
  if (last < region_count && is_within(address, regions[last].begin, regions[last].size))
    return &regions[last];
  for (last = 0; last < region_count; ++last)
    if (is_within(address, regions[last].begin, regions[last].size)) return &regions[last];
  return nullptr;
}

UNCHECKED inline void add_region(void* begin, size_t size, Space space,
                                 const uint8_t* valid = nullptr, uint8_t* written = nullptr) {
  if (region_count == kMaxRegions) return stop("too many tensors or shared variables");
  regions[region_count++] = {static_cast<char*>(begin),
                             size,
                             space,
                             valid,
                             space == Space::kShared ? new uint8_t[size] : written,
                             new Byte[size]};
}

UNCHECKED inline void drop_region() {
  const Region& region = regions[--region_count];
  delete[] region.bytes;
  if (region.space == Space::kShared) delete[] region.written;
}

UNCHECKED inline Access access_of_current() {
  const int warp = current->rank / kWarp;
  return {epoch, phases[warp], warp, current->rank};
}

// Whether nothing orders an earlier access of this block and one of now.
UNCHECKED inline bool races(const Access& earlier, const Access& now) {
  if (earlier.epoch != now.epoch || earlier.thread == now.thread) return false;
  return earlier.warp != now.warp || earlier.phase == now.phase;
}

UNCHECKED inline bool is_of_other_block(uint32_t at) {
  return at >= launch_epoch && at < block_epoch;
}

UNCHECKED inline void note_read(Byte& byte, const Access& now) {
  Access& read = byte.read;
  if (read.epoch < block_epoch) byte.earlier_read = read.epoch;
  const bool joins = races(read, now);
  const bool same_warp = read.warp == now.warp;
  if (joins && same_warp)
    read.thread = kSeveral;
  else if (joins)
    read.thread = read.warp = kSeveral;
  else if (read.epoch != now.epoch || same_warp)
    read = now;
}

UNCHECKED inline const char* fault_of(const Byte& byte, bool written, bool writes,
                                      const Access& now) {
  if (byte.pending)
    return writes ? "writes where an asynchronous copy does"
                  : "reads what an asynchronous copy still brings";
  if (!writes && !written) return "reads what nobody wrote";
  if (races(byte.write, now))
    return writes ? "writes in a race with a write" : "reads in a race with a write";
  if (is_of_other_block(byte.write.epoch))
    return writes ? "writes what another block wrote" : "reads what another block wrote";
  if (!writes) return nullptr;
  if (races(byte.read, now)) return "writes in a race with a read";
  if (is_of_other_block(byte.read.epoch) || is_of_other_block(byte.earlier_read))
    return "writes what another block read";
  return nullptr;
}

UNCHECKED inline void report(const char* what, const char* address, size_t size,
                             const Region* region, const void* code) {
  char place[96];
  if (region == nullptr)
    std::snprintf(place, sizeof place, "%zu bytes at no tensor's address", size);
  else
    std::snprintf(place, sizeof place, "%zu bytes at %s address %#zx of %#zx", size,
                  region->space == Space::kShared ? "shared" : "global",
                  size_t(address - region->begin), region->size);
  stop((std::string(what) + ", " + place).c_str(), code);
}

// Of a kernel's own variables, constants, arguments, and what the language has.
UNCHECKED inline bool is_private(const char* address) {
  return is_within(address, current->stack(), kStack) ||
         is_within(address, &__ehdr_start, &__bss_start - &__ehdr_start) ||
         is_within(address, kernel_arguments, kernel_arguments_bytes) ||
         is_within(address, &threadIdx, sizeof threadIdx) ||
         is_within(address, &blockIdx, sizeof blockIdx) ||
         is_within(address, &blockDim, sizeof blockDim) ||
         is_within(address, &gridDim, sizeof gridDim);
}

UNCHECKED inline void check(const void* at, size_t size, bool writes, const void* code,
                            bool is_aligned = true) {
  if (is_inside) return;
  const Inside inside;
  const char* address = static_cast<const char*>(at);
  Region* region = region_of(address);
  if (region == nullptr) {
    if (!is_private(address)) report("is out of bounds", address, size, nullptr, code);
    return;
  }
  if (region->space == Space::kGuard) return;
  const size_t first = address - region->begin;
  if (first + size > region->size) report("is out of bounds", address, size, region, code);
  if (is_aligned && size <= 16 && (size & (size - 1)) == 0 && size_t(address) % size != 0)
    report("is misaligned", address, size, region, code);
  const Access now = access_of_current();
  for (size_t i = first; i < first + size; ++i) {
    if (region->valid != nullptr && !region->valid[i])
      report("is out of bounds", address, size, region, code);
    Byte& byte = region->bytes[i];
    if (const char* what = fault_of(byte, region->written[i], writes, now))
      report(what, address, size, region, code);
    if (writes) {
      byte.write = now;
      region->written[i] = 1;
    } else {
      note_read(byte, now);
    }
  }
}

// An asynchronous copy begins: nobody may access its bytes until the thread has waited for it.
UNCHECKED inline void begin_copy(const Copy& copy, const void* code) {
  if (copy.from != nullptr) check(copy.from, copy.bytes, false, code);
  check(copy.to, copy.bytes, true, code);
  if (Region* region = region_of(static_cast<char*>(copy.to)))
    for (int i = 0; i < copy.bytes; ++i)
      region->bytes[static_cast<char*>(copy.to) - region->begin + i].pending = true;
}

UNCHECKED inline void end_copy(const Copy& copy) {
  Region* region = region_of(static_cast<char*>(copy.to));
  if (region == nullptr) return;
  for (int i = 0; i < copy.bytes; ++i) {
    Byte& byte = region->bytes[static_cast<char*>(copy.to) - region->begin + i];
    byte.pending = false;
    byte.write = access_of_current();
  }
}

// A block finds nothing in shared memory: all ones are NaN of every type.
UNCHECKED inline void clear_shared() {
  for (int i = 0; i < region_count; ++i) {
    const Region& region = regions[i];
    if (region.space != Space::kShared) continue;
    std::fill_n(region.written, region.size, 0);
    std::fill_n(region.bytes, region.size, Byte());
    std::memset(region.begin, 0xff, region.size);
  }
}

}  // namespace fastfuse::emulator

// As gcc's -fsanitize=thread calls them.
#define FASTFUSE_HOOK(name, size, writes, is_aligned)                                     \
  extern "C" __attribute__((weak)) UNCHECKED void __tsan_##name(void* at) {               \
    fastfuse::emulator::check(at, size, writes, __builtin_return_address(0), is_aligned); \
  }
#define FASTFUSE_HOOKS(size)                              \
  FASTFUSE_HOOK(read##size, size, false, true)            \
  FASTFUSE_HOOK(write##size, size, true, true)            \
  FASTFUSE_HOOK(unaligned_read##size, size, false, false) \
  FASTFUSE_HOOK(unaligned_write##size, size, true, false)
FASTFUSE_HOOKS(1)
FASTFUSE_HOOKS(2)
FASTFUSE_HOOKS(4)
FASTFUSE_HOOKS(8)
FASTFUSE_HOOKS(16)
#undef FASTFUSE_HOOKS
#undef FASTFUSE_HOOK

extern "C" {
__attribute__((weak)) UNCHECKED void __tsan_read_range(void* at, size_t size) {
  fastfuse::emulator::check(at, size, false, __builtin_return_address(0), false);
}
__attribute__((weak)) UNCHECKED void __tsan_write_range(void* at, size_t size) {
  fastfuse::emulator::check(at, size, true, __builtin_return_address(0), false);
}
__attribute__((weak)) UNCHECKED void* __tsan_memcpy(void* to, const void* from, size_t size) {
  fastfuse::emulator::check(from, size, false, __builtin_return_address(0), false);
  fastfuse::emulator::check(to, size, true, __builtin_return_address(0), false);
  return std::memcpy(to, from, size);
}
__attribute__((weak)) UNCHECKED void* __tsan_memset(void* to, int value, size_t size) {
  fastfuse::emulator::check(to, size, true, __builtin_return_address(0), false);
  return std::memset(to, value, size);
}
__attribute__((weak)) UNCHECKED void __tsan_init() {}
__attribute__((weak)) UNCHECKED void __tsan_func_entry(void*) {}
__attribute__((weak)) UNCHECKED void __tsan_func_exit() {}
__attribute__((weak)) UNCHECKED void __tsan_vptr_update(void*, void*) {}
__attribute__((weak)) UNCHECKED void __tsan_vptr_read(void*) {}
}
