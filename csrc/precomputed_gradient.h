// Gradients that a forward pass has computed for an upstream gradient of 1.
#pragma once

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "cpu/new_tensors.h"
#include "margin_options.h"

namespace ltkernels {

// The saved gradient times the 0-d upstream gradient; removed classes and ignored rows stay at 0, whatever the upstream
// gradient. In place if nobody can see the memory again: the graph is not retained and holds the only reference.
// Otherwise in a copy, the gradient to be returned: there is no other temporary of its size.
inline at::Tensor times_upstream(torch::autograd::SavedVariable& saved, const at::Tensor& upstream) {
  static const auto scale_ = typed_operator<void(at::Tensor, const at::Tensor&)>("ltkernels::margin_softmax_scale_");
  at::Tensor grad = saved.unpack();
  if (at::isTensorSubclassLike(grad) || at::isTensorSubclassLike(upstream)) {
    // Traced or batched: operators that every transform knows, and that a compiler fuses.
    at::Tensor scaled = grad.mul(upstream);
    return scaled.masked_fill_(grad.eq(0), 0);
  }
  const bool last_use = !torch::autograd::get_current_graph_task_keep_graph() && !at::GradMode::is_enabled();
  const at::AutoDispatchBelowADInplaceOrView guard;  // not through autograd's boxed fallback
  if (last_use) saved.reset_data();
  // A gradient that was made in Python, as those of the Triton kernels are, has a wrapper that counts as a reference.
  const bool only_here = torch::autograd::impl::is_tensor_stealable(grad) && grad.storage().use_count() == 1;
  if (!last_use || !only_here) {
    at::Tensor copy = at::empty_like(grad);
    if (copy.is_cpu()) advise_huge_pages(copy);
    grad = copy.copy_(grad);
  }
  scale_.call(grad, upstream);
  return grad;
}

}  // namespace ltkernels
