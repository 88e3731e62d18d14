// Memory for results of several MB, kept between calls: fresh memory comes from the kernel page by page at the first write,
// and on two cores the page faults of a 4 MB result take 1 ms, twice what computing its content takes. Blocks are aligned to
// huge pages, which need 512 times fewer faults the first time.
#pragma once
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace erdfast {

class Pool {
 public:
  static constexpr size_t HUGE_PAGE = size_t{2} << 20;
  static constexpr size_t LIMIT = size_t{256} << 20;  // of unused memory that is kept

  // The pool of this process; never destroyed, because tensors may outlive the module.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::vector<void*>& free = free_[bytes];
      if (!free.empty()) {
        void* memory = free.back();
        free.pop_back();
        unused_ -= bytes;
        return memory;
      }
    }
    void* memory = std::aligned_alloc(HUGE_PAGE, bytes);
    if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);  // advice only
#endif
    return memory;
  }

  void give_back(void* memory, size_t bytes) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (unused_ + bytes > LIMIT) {
      std::free(memory);
      return;
    }
    free_[bytes].push_back(memory);
    unused_ += bytes;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> free_;
  size_t unused_ = 0;
};

// Memory that goes back to the pool with its last reference.
class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : bytes_(bytes),
        capacity_((bytes + Pool::HUGE_PAGE - 1) / Pool::HUGE_PAGE * Pool::HUGE_PAGE),
        data_(Pool::instance().take(capacity_)) {}
  ~Buffer() { Pool::instance().give_back(data_, capacity_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, capacity_;
  void* data_;
};

}  // namespace erdfast
