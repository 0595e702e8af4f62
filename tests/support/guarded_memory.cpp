// Memory of tensors and of kernels between pages that nobody may touch: an access behind it, or
// after it was given back, ends the process. Preloaded, and on where guarded_memory.py turns it on.
//
// Memory ends where a page ends, and so begins anywhere. What lies before it on its page is NaN to
// who reads it, and looked at when the memory is given back.
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
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

bool guards(size_t alignment, size_t size) {
  return on && size > 0 && size < kPages / 2 * kPage && alignment >= kTensors && alignment <= kPage;
}

// Null where there is no place.
void* guarded(size_t alignment, size_t size) {
  const std::lock_guard<std::mutex> held(mutex);
  if (arena == nullptr) {
    void* reserved = mmap(nullptr, kPages * kPage, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return nullptr;
    arena = static_cast<char*>(reserved);
  }
  const size_t pages = (size + kPage - 1) / kPage;
  const size_t first = place(pages + 1);  // the last one is the guard
  char* begin = arena + first * kPage;
  if (first == 0 || mprotect(begin, pages * kPage, PROT_READ | PROT_WRITE) != 0) return nullptr;
  blocks[first] = static_cast<uint32_t>(pages + 1);
  std::memset(begin, kFresh, pages * kPage);
  size_t before = pages * kPage - size;
  if (alignment > kTensors) before -= before % alignment;
  return begin + before;
}

void end(const char* why) {
  if (write(STDERR_FILENO, why, std::strlen(why)) < 0) std::abort();
  std::abort();
}

// A child has the threads of none but the one that forked.
__attribute__((constructor)) void stay_usable_in_children() {
  pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void fastfuse_guard_memory(int wanted) {
  on = wanted != 0;
}

extern "C" void* aligned_alloc(size_t alignment, size_t size) noexcept {
  void* memory = guards(alignment, size) ? guarded(alignment, size) : nullptr;
  return memory != nullptr ? memory : __libc_memalign(alignment, size);
}

extern "C" int posix_memalign(void** result, size_t alignment, size_t size) noexcept {
  const bool is_power = alignment > 0 && (alignment & (alignment - 1)) == 0;
  if (!is_power || alignment % sizeof(void*) != 0) return EINVAL;
  void* memory = aligned_alloc(alignment, size);
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
  if (blocks[first] == 0) end("guarded memory: given back twice, or not where it begins\n");
  char* begin = arena + first * kPage;
  for (const char* before = begin; before < address; ++before) {
    if (*before != static_cast<char>(kFresh)) end("guarded memory: written before it begins\n");
  }
  const size_t bytes = (blocks[first] - 1) * kPage;
  blocks[first] = 0;
  madvise(begin, bytes, MADV_DONTNEED);
  mprotect(begin, bytes, PROT_NONE);
}

#endif
