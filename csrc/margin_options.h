// The options of a margin softmax (everything but the logits) as a value that autograd nodes save and chunks slice.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "margin_softmax_op.h"

namespace ltkernels {

template <typename Signature>
auto typed_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline bool requires_grad(const OptionalTensor& x) { return x.has_value() && x->defined() && x->requires_grad(); }

inline at::Tensor value_or_undefined(const OptionalTensor& x) { return x.has_value() ? *x : at::Tensor(); }

inline void forbid_forward_mode(const char* what, std::initializer_list<at::Tensor> inputs) {
  for (const at::Tensor& x : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !torch::autograd::isFwGradDefined(x), what,
        " does not implement forward-mode differentiation; use reverse mode, or LTKERNELS_BACKEND=reference.");
  }
}

struct MarginOptions {
  at::Tensor target;
  OptionalTensor weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
      neighbor_offsets, neighbor_classes;
  double scale = 1, neighbor_weight = 1;
  int64_t back_from = -1, reduction = kMean, ignore_index = -100;
  double label_smoothing = 0;
};

// The options of `o` as arguments of an operator.
#define LTK_OPTIONS_OF(o)                                                                                           \
  (o).target, (o).weight, (o).logit_scale, (o).logit_bias, (o).target_margin, (o).pairwise_margin, (o).mask,        \
      (o).sample_weight, (o).row_class, (o).neighbor_offsets, (o).neighbor_classes, (o).scale, (o).neighbor_weight, \
      (o).back_from, (o).reduction, (o).ignore_index, (o).label_smoothing

class SavedMarginOptions {
 public:
  explicit SavedMarginOptions(const MarginOptions& o) : options_(o), target_(o.target, false) {
    options_.target = at::Tensor();
    for (size_t k = 0; k < kTensors; ++k) {
      OptionalTensor& x = options_.*kMembers[k];
      tensors_[k] = torch::autograd::SavedVariable(value_or_undefined(x), false);
      x.reset();
    }
  }

  // Once a backward pass: hooks may recompute what they unpack, and torch.utils.checkpoint forbids a second time.
  MarginOptions unpack() const {
    MarginOptions o = options_;
    o.target = target_.unpack();
    for (size_t k = 0; k < kTensors; ++k) {
      at::Tensor x = tensors_[k].unpack();
      if (x.defined()) o.*kMembers[k] = std::move(x);
    }
    return o;
  }

 private:
  static constexpr size_t kTensors = 10;
  static constexpr OptionalTensor MarginOptions::* kMembers[kTensors] = {
      &MarginOptions::weight,           &MarginOptions::logit_scale,     &MarginOptions::logit_bias,
      &MarginOptions::target_margin,    &MarginOptions::pairwise_margin, &MarginOptions::mask,
      &MarginOptions::sample_weight,    &MarginOptions::row_class,       &MarginOptions::neighbor_offsets,
      &MarginOptions::neighbor_classes,
  };

  MarginOptions options_;  // the numbers
  torch::autograd::SavedVariable target_, tensors_[kTensors];
};

// Which class vectors a backward pass is asked for, and where their gradients go.
struct ClassGradients {
  at::Tensor logit_scale, logit_bias, target_margin, pairwise_margin;
};

// From what margin_softmax_bwd returns: (3, C) sums for a, b and m, and the gradient of Delta.
inline ClassGradients class_gradients(
    const MarginOptions& o, const at::Tensor& sums, const at::Tensor& pairwise, bool scale, bool bias, bool margin) {
  ClassGradients grads;
  if (scale) {
    const at::Tensor da = sums.select(0, 0);
    grads.logit_scale = (o.logit_scale->dim() == 0 ? da.sum() : da).to(o.logit_scale->scalar_type());
  }
  if (bias) grads.logit_bias = sums.select(0, 1).to(o.logit_bias->scalar_type());
  if (margin) grads.target_margin = sums.select(0, 2).to(o.target_margin->scalar_type());
  if (pairwise.defined()) grads.pairwise_margin = pairwise.to(o.pairwise_margin->scalar_type());
  return grads;
}

// k_i, 0 for ignored rows: what u_i counts in the normaliser Z = sum_i u_i k_i. w[y_i] for class indices, else 1.
inline at::Tensor row_counts(const MarginOptions& o, const at::Tensor& like) {
  at::Tensor k = at::ones_like(like);
  if (o.target.is_floating_point()) return k;
  const at::Tensor index = o.target.to(at::kLong);  // -100 does not fit every integer dtype
  const at::Tensor kept = index.ne(o.ignore_index);
  if (o.weight.has_value()) {
    // An index out of range is for the kernel to report, which may not have run yet.
    const at::Tensor known = index.mul(kept).remainder(c10::Scalar(o.weight->sym_size(0)));
    k = o.weight->to(k.scalar_type()).index_select(0, known);
  }
  return k * kept;
}

// x of each row, 0 for ignored rows, whatever they hold.
inline at::Tensor of_kept_rows(const MarginOptions& o, const at::Tensor& x) {
  if (o.target.is_floating_point()) return x;
  return at::where(o.target.to(at::kLong).ne(o.ignore_index), x, 0);  // not a product: x may be NaN
}

// Z = sum_i u_i k_i.
inline at::Tensor normalizer_of(const MarginOptions& o, const at::Tensor& u) {
  return of_kept_rows(o, u * row_counts(o, u)).sum();
}

// du_i = upstream_i * r_i, or upstream * (r_i - k_i * loss) / Z under a mean; 0 if ignored.
inline at::Tensor sample_weight_gradient(
    const MarginOptions& o, const at::Tensor& row_loss, const at::Tensor& loss, const at::Tensor& upstream) {
  const at::Tensor& u = *o.sample_weight;
  at::Tensor grad = upstream * row_loss;
  if (o.reduction == kMean) {
    const at::Tensor k = row_counts(o, row_loss);
    grad = upstream * (row_loss - k * loss) / normalizer_of(o, u.to(k.scalar_type()));
  }
  return of_kept_rows(o, grad).to(u.scalar_type());
}

}  // namespace ltkernels
