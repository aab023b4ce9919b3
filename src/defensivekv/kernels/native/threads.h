// Threads of OpenMP, where there is one, and memory for them.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
#endif

// Elements on a cache line's boundary; std::bad_alloc where there is no room.
template <class Element> class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data(static_cast<Element *>(std::aligned_alloc(64, (count * sizeof(Element) + 127) / 64 * 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  Element *const data;
};
