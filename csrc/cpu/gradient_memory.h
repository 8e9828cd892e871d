// Memory of a gradient that is about to be written once, front to back.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace ltkernels {

// An uninitialised contiguous (rows, classes) tensor. Large ones come straight from the system, where the first write
// to each 4 KiB page is a fault that costs more than the kernel's own work on it: ask for huge pages.
inline at::Tensor empty_gradient(int64_t rows, int64_t classes, const at::TensorOptions& options) {
  at::Tensor grad = at::empty({rows, classes}, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(grad.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + grad.nbytes()) / kHugePage * kHugePage;
  if (last >= first + 2 * kHugePage) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: failure changes nothing
  }
#endif
  return grad;
}

}  // namespace ltkernels
