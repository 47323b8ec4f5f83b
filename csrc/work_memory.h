// Memory and threads of the files that cut work into tasks. Internal to csrc/, and only for files that are compiled for
// every machine: what is inline here must not carry instructions that some lack.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "thread_pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Starts at a multiple of `alignment`, so that vectors do not reach from one line of the cache into the next. NULL when
// there is none.
inline void* allocate_aligned(size_t bytes, size_t alignment) {
#if defined(_WIN32)
  return _aligned_malloc(bytes, alignment);
#else
  void* data = nullptr;
  return posix_memalign(&data, alignment, bytes) ? nullptr : data;
#endif
}

inline void free_aligned(void* data) {
#if defined(_WIN32)
  _aligned_free(data);
#else
  std::free(data);
#endif
}

// Memory that is kept from call to call, so that it need not be faulted in again.
class Buffer {
 public:
  // NULL only when there is no memory: there is always room for one.
  float* room_for(int64_t floats) {
    floats = std::max<int64_t>(floats, 1);
    if (floats > capacity_) {
      constexpr size_t page = 2 << 20;
      const size_t bytes = (size_t(floats) * sizeof(float) + page - 1) / page * page;
      data_.reset(static_cast<float*>(allocate(bytes, page)));
      capacity_ = data_ ? int64_t(bytes / sizeof(float)) : 0;
    }
    return data_.get();
  }

 private:
  static void* allocate(size_t bytes, size_t page) {
    void* const data = allocate_aligned(bytes, page);
#if defined(__linux__)
    if (data) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
  }

  std::unique_ptr<float, void (*)(void*)> data_{nullptr, free_aligned};
  int64_t capacity_ = 0;
};

// Of the tasks that a thread runs, one after another.
inline thread_local Buffer scratch_of_thread;

template <class Task>
void parallel(int threads, int64_t num_tasks, const Task& task) {
  moesaic_parallel(
      threads, num_tasks,
      [](void* data, int64_t index, int worker) { (*static_cast<const Task*>(data))(index, worker); },
      const_cast<Task*>(&task));
}

// Runs task(index, scratch) for each index, with so many floats of scratch; whether there was memory for all of them.
template <class Task>
bool parallel_with_scratch(int threads, int64_t num_tasks, int64_t scratch_size, const Task& task) {
  std::atomic<bool> complete{true};
  parallel(threads, num_tasks, [&](int64_t index, int) {
    float* const scratch = scratch_of_thread.room_for(scratch_size);
    if (scratch) {
      task(index, scratch);
    } else {
      complete = false;
    }
  });
  return complete;
}

// Memory of one call, or NULL.
using Temporary = std::unique_ptr<float[], void (*)(void*)>;
inline Temporary temporary(int64_t floats) {
  constexpr size_t line = 64;
  return {static_cast<float*>(allocate_aligned(size_t(std::max<int64_t>(floats, 1)) * sizeof(float), line)), free_aligned};
}
