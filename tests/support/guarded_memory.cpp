// Tensors' memory between pages that nobody may touch: an access outside of a tensor, or after its
// memory was given back, ends the process. Preloaded, and on where guarded_memory.py turns it on.
//
// Tensors end where a page ends, and so begin anywhere; every fourth begins where a page begins.
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>

#ifdef __GLIBC__  // others have no second name for what is replaced

extern "C" void __libc_free(void*);
extern "C" void* __libc_memalign(size_t, size_t);

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kPages = size_t{1} << 19;  // 2 GiB, used in turn: what was given back stays shut
constexpr size_t kTensors = 64;  // the alignment that PyTorch asks for and no kernel needs
constexpr int kFresh = 0xff;     // NaN in every floating-point dtype

std::atomic<bool> on = false;
std::mutex mutex;
char* arena = nullptr;
uint32_t blocks[kPages];  // how many pages the block has that begins here; 0: none begins
size_t next = 1;          // the arena's first page stays shut
size_t count = 0;

// The first of n pages in turn that no block has; 0 where there are none.
size_t place(size_t n) {
  for (int turn = 0; turn < 2; ++turn) {
    size_t end = next;
    while (next + n <= kPages) {
      while (end < next + n && blocks[end] == 0) ++end;
      if (end == next + n) {
        next = end;
        return end - n;
      }
      next = end += blocks[end];
    }
    next = 1;
  }
  return 0;
}

void* guarded(size_t alignment, size_t size) {
  if (arena == nullptr) {
    void* reserved = mmap(nullptr, kPages * kPage, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return nullptr;
    arena = static_cast<char*>(reserved);
  }
  const size_t pages = (size + kPage - 1) / kPage;
  const size_t first = pages < kPages ? place(pages + 1) : 0;  // the last one is the guard
  char* begin = arena + first * kPage;
  if (first == 0 || mprotect(begin, pages * kPage, PROT_READ | PROT_WRITE) != 0) return nullptr;
  blocks[first] = static_cast<uint32_t>(pages + 1);
  std::memset(begin, kFresh, pages * kPage);
  size_t before = ++count % 4 == 0 ? 0 : pages * kPage - size;
  if (alignment > kTensors) before -= before % alignment;
  return begin + before;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void fastfuse_guard_memory(int wanted) {
  on = wanted != 0;
}

extern "C" int posix_memalign(void** result, size_t alignment, size_t size) noexcept {
  void* memory = nullptr;
  if (on && size > 0 && alignment >= kTensors && alignment <= kPage) {
    const std::lock_guard<std::mutex> held(mutex);
    memory = guarded(alignment, size);
  }
  if (memory == nullptr) memory = __libc_memalign(alignment, size);
  if (memory == nullptr) return ENOMEM;
  *result = memory;
  return 0;
}

extern "C" void free(void* memory) noexcept {
  char* address = static_cast<char*>(memory);
  if (arena == nullptr || address < arena || address >= arena + kPages * kPage) {
    __libc_free(memory);
    return;
  }
  const size_t first = static_cast<size_t>(address - arena) / kPage;
  const std::lock_guard<std::mutex> held(mutex);
  const size_t bytes = (blocks[first] - 1) * kPage;
  blocks[first] = 0;
  madvise(arena + first * kPage, bytes, MADV_DONTNEED);
  mprotect(arena + first * kPage, bytes, PROT_NONE);
}

#endif
