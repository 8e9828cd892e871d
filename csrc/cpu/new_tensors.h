// Uninitialised tensors that a CPU kernel is about to fill.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <mutex>

namespace ltkernels {

// at::empty without the dispatcher, whose trip costs as much as a small kernel's row.
inline at::Tensor empty_tensor(at::IntArrayRef sizes, at::ScalarType type) {
  return at::Tensor(at::detail::empty_cpu(sizes, type));
}

// Asks for huge pages under memory that has just been allocated and not been written. Large tensors come straight from
// the system, where the first write to each 4 KiB page is a fault that costs more than a kernel's own work on it.
inline void advise_huge_pages(const at::Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + x.nbytes()) / kHugePage * kHugePage;
  if (last >= first + 2 * kHugePage) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: failure changes nothing
  }
#endif
}

// A contiguous (rows, classes) gradient, to be written once, front to back.
inline at::Tensor empty_gradient(int64_t rows, int64_t classes, at::ScalarType type) {
  at::Tensor grad = empty_tensor({rows, classes}, type);
  advise_huge_pages(grad);
  return grad;
}

// Memory that outlives a call. On virtual machines the first write to a page may cost ten times the work on it, huge
// pages included, so that memory taken anew by each call would cost more than it saves. One call at a time has it.
class Workspace {
 public:
  static constexpr int64_t kMost = int64_t(40) << 20;  // what may stay; larger memory is for the call that needs it

  void* data() const { return memory().mutable_data_ptr(); }

  // False if another thread's call has it.
  bool acquire(int64_t bytes) {
    static std::mutex& busy = *new std::mutex;  // never destroyed: threads may outlive main
    lock_ = std::unique_lock<std::mutex>(busy, std::try_to_lock);
    if (!lock_.owns_lock()) return false;
    if (memory().defined() && memory().numel() >= bytes) return true;
    memory() = at::Tensor();
    memory() = empty_tensor({bytes}, at::kByte);
    advise_huge_pages(memory());
    return true;
  }

 private:
  std::unique_lock<std::mutex> lock_;

  static at::Tensor& memory() {
    static at::Tensor& memory = *new at::Tensor;
    return memory;
  }
};

}  // namespace ltkernels
