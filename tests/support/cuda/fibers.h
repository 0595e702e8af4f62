// A block on the CPU: every thread is a fiber that runs until it waits for others. Orders are
// random, by a seed. The first fault ends the launch; Python fetches what it was.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

// Of the emulator's own functions: the checker looks at kernels' accesses alone.
#define UNCHECKED __attribute__((no_sanitize("thread")))

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace fastfuse::emulator {

constexpr int kWarp = 32, kMaxThreads = 1024, kPage = 4096;
constexpr size_t kStack = 128 << 10;

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
};

enum class State { kRuns, kAtBarrier, kAtWarp, kEnded };

struct Thread {
  jmp_buf context;
  bool started = false;
  int rank = 0;
  State state = State::kEnded;
  int line = 0;                   // of the source, where it waits
  uint32_t mask = 0;              // lanes it waits for
  int predicate = 0;              // what it brings to a barrier
  const void* offered = nullptr;  // values that other lanes of its warp may read
  std::vector<Copy> open;         // copies not committed
  std::vector<std::vector<Copy>> groups;
  const char* stack() const;
};

inline Thread threads[kMaxThreads];
inline Thread* current = nullptr;  // null: the host runs
inline int thread_count = 0;
inline char* stacks = nullptr;
inline jmp_buf scheduler;
inline void (*kernel_call)(void*) = nullptr;  // by a thread, of the launch's arguments
inline void* kernel_arguments = nullptr;
inline size_t kernel_arguments_bytes = 0;

inline std::mt19937 random_engine;
inline uint32_t seed = 0;  // 0: all in order, 1: all in reverse, else at random
inline int passed_predicates = 0, passed_threads = 0;  // of the last barrier

// Numbers of what orders accesses. No two blocks have an epoch in common.
inline uint32_t epoch = 1, block_epoch = 1, launch_epoch = 1;
inline uint32_t phases[kMaxThreads / kWarp];  // of a warp: times that all its lanes have met

inline std::string fault;      // empty: none
inline bool is_inside = true;  // the emulator itself runs: its accesses are not looked at
inline const void* fault_code = nullptr;

UNCHECKED inline const char* Thread::stack() const {
  return stacks + (this - threads) * (kStack + kPage) + kPage;
}

// While one lives the emulator runs.
class Inside {
 public:
  UNCHECKED Inside() : outer_(is_inside) { is_inside = true; }
  UNCHECKED ~Inside() { is_inside = outer_; }
  Inside(const Inside&) = delete;

 private:
  const bool outer_;
};

// Gives the processor to the scheduler.
UNCHECKED inline void yield() {
  const Inside inside;
  Thread* self = current;
  if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
}

UNCHECKED inline std::string thread_name() {
  char name[96];
  std::snprintf(name, sizeof name, "thread (%u, %u, %u) of block (%u, %u, %u)", threadIdx.x,
                threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
  return name;
}

// Keeps the first fault. A thread never returns from it.
UNCHECKED inline void stop(const char* what, const void* code = nullptr) {
  const Inside inside;
  if (fault.empty()) {
    fault = current ? thread_name() + " " + what : what;
    fault_code = code;
  }
  if (current) yield();
}

UNCHECKED inline void thread_main() {
  for (;;) {
    is_inside = false;
    kernel_call(kernel_arguments);
    is_inside = true;
    current->state = State::kEnded;
    yield();
  }
}

UNCHECKED inline void make_stacks() {
  const size_t bytes = kMaxThreads * (kStack + kPage);
  void* made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) std::abort();
  stacks = static_cast<char*>(made);
  // A page that nobody may touch, below each warp's: below each thread's they would be more pieces
  // of memory than a process may have that loads dozens of programs.
  for (int i = 0; i < kMaxThreads; i += kWarp)
    mprotect(const_cast<char*>(threads[i].stack()) - kPage, kPage, PROT_NONE);
}

UNCHECKED inline void resume(Thread& thread) {
  current = &thread;
  const unsigned rank = thread.rank;
  threadIdx = {rank % blockDim.x, rank / blockDim.x % blockDim.y, rank / (blockDim.x * blockDim.y)};
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    static ucontext_t begin;
    getcontext(&begin);
    begin.uc_stack.ss_sp = const_cast<char*>(thread.stack());
    begin.uc_stack.ss_size = kStack;
    begin.uc_link = nullptr;
    makecontext(&begin, thread_main, 0);
    setcontext(&begin);
  }
  current = nullptr;
}

UNCHECKED inline void put_in_order(std::vector<int>& items) {
  if (seed == 1) std::reverse(items.begin(), items.end());
  if (seed > 1) std::shuffle(items.begin(), items.end(), random_engine);
}

UNCHECKED inline std::string where_threads_wait() {
  std::string text;
  for (int i = 0; i < thread_count; ++i) {
    const Thread& thread = threads[i];
    if (i > 0 && threads[i - 1].line == thread.line && threads[i - 1].state == thread.state)
      continue;
    char entry[96];
    std::snprintf(entry, sizeof entry, "; thread %d %s", i,
                  thread.state == State::kEnded ? "has ended" : "waits at line ");
    text += entry;
    if (thread.state != State::kEnded) text += std::to_string(thread.line);
  }
  return text;
}

// All threads that have not ended are at the barrier: lets them go on.
UNCHECKED inline void pass_barrier() {
  passed_predicates = passed_threads = 0;
  int line = 0;
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    if (thread.state == State::kEnded) continue;
    if (line != 0 && line != thread.line)
      return stop(("threads of a block wait at different barriers" + where_threads_wait()).c_str());
    line = thread.line;
    passed_predicates += thread.predicate != 0;
    ++passed_threads;
    thread.state = State::kRuns;
  }
  ++epoch;
}

UNCHECKED inline void run_block() {
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    thread.rank = i;
    thread.state = State::kRuns;
    thread.offered = nullptr;
    thread.open.clear();
    thread.groups.clear();
  }
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    int alive = 0, at_barrier = 0;
    for (int i = 0; i < thread_count; ++i) {
      alive += threads[i].state != State::kEnded;
      at_barrier += threads[i].state == State::kAtBarrier;
      if (threads[i].state == State::kRuns) ready.push_back(i);
    }
    if (alive == 0) break;
    if (ready.empty() && at_barrier < alive)
      stop(("threads wait for each other for ever" + where_threads_wait()).c_str());
    else if (ready.empty())
      pass_barrier();
    put_in_order(ready);
    for (const int i : ready) {
      resume(threads[i]);
      if (!fault.empty()) break;
    }
    if (fault.empty()) continue;
    for (Thread& thread : threads) thread.started = false;  // left where they were
    break;
  }
}

// A barrier of the block.
UNCHECKED inline void wait_for_block(int predicate, int line) {
  const Inside inside;
  current->state = State::kAtBarrier;
  current->line = line;
  current->predicate = predicate;
  yield();
}

// Lanes of a mask meet: the last to come lets the others go on. True for that one.
UNCHECKED inline bool meet(uint32_t mask, int line) {
  const Inside inside;
  const int lane = current->rank % kWarp, first = current->rank - lane;
  if (!(mask >> lane & 1)) stop("is not in the mask of lanes that it gives");
  current->state = State::kAtWarp;
  current->mask = mask;
  current->line = line;
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= thread_count || threads[first + i].state == State::kEnded)
      stop(("waits for a lane that has ended, at line " + std::to_string(line)).c_str());
    const Thread& other = threads[first + i];
    if (other.state != State::kAtWarp) {
      yield();
      return false;
    }
    if (other.mask != mask || other.line != line)
      stop(("meets lanes that wait elsewhere, at line " + std::to_string(line) + " and " +
            std::to_string(other.line))
               .c_str());
  }
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) threads[first + i].state = State::kRuns;
  return true;
}

// Orders the accesses of a warp's lanes. The checker takes masks of some lanes to order nothing.
UNCHECKED inline void wait_for_warp(uint32_t mask, int line) {
  const Inside inside;
  const int warp = current->rank / kWarp;
  const int lanes = std::min(thread_count - warp * kWarp, kWarp);
  const uint32_t all = lanes == kWarp ? ~0u : (1u << lanes) - 1;
  uint32_t alive = 0;
  for (int i = 0; i < lanes; ++i)
    alive |= uint32_t(threads[warp * kWarp + i].state != State::kEnded) << i;
  // Lanes of a mask that are not in the block, or have ended, are not waited for.
  if (meet(mask & alive, line) && (mask & alive) == (all & alive)) ++phases[warp];
}

// What every lane of a mask offers can be read until `release`.
UNCHECKED inline void offer(const void* values, uint32_t mask, int line) {
  current->offered = values;
  meet(mask, line);
}
UNCHECKED inline const void* offered_by(uint32_t mask, int lane) {
  const Inside inside;
  if (!(mask >> lane & 1)) stop("reads from a lane outside of its mask");
  return threads[current->rank / kWarp * kWarp + lane].offered;
}
UNCHECKED inline void release(uint32_t mask, int line) { meet(mask, line); }

}  // namespace fastfuse::emulator
