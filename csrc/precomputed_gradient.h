// Gradients that a forward pass has computed for an upstream gradient of 1.
#pragma once

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "margin_options.h"

namespace ltkernels {

// The saved gradient times the 0-d upstream gradient. In place if nobody can see the memory again: the graph is not
// retained and holds the only reference.
inline at::Tensor times_upstream(torch::autograd::SavedVariable& saved, const at::Tensor& upstream) {
  static const auto scale_ = typed_operator<void(at::Tensor, const at::Tensor&)>("ltkernels::margin_softmax_scale_");
  at::Tensor grad = saved.unpack();
  const bool last_use = !torch::autograd::get_current_graph_task_keep_graph();
  if (last_use && !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grad) &&
      !at::isTensorSubclassLike(upstream)) {
    saved.reset_data();
    if (grad.use_count() == 1 && grad.storage().use_count() == 1) {
      const at::AutoDispatchBelowADInplaceOrView guard;  // not through autograd's boxed fallback
      scale_.call(grad, upstream);
      return grad;
    }
  }
  // Removed classes and ignored rows stay at 0, whatever the upstream gradient.
  return at::where(grad.eq(0), grad, grad.mul(upstream));
}

}  // namespace ltkernels
