// The operators of the library: schemas, autograd nodes and what happens at each dispatch key.
//
//   margin_softmax         public operation: checks, forward, autograd node. Called by ltkernels.functional.
//   margin_softmax_fwd     statistics of each row and the reduced loss; with_grad: also the gradient for upstream 1.
//   margin_softmax_bwd     gradients recomputed from the logits and the row statistics.
//   margin_softmax_fwd_    fwd with the gradient in place of the logits: for logits that nobody else can see.
//   margin_softmax_scale_  gradient *= upstream gradient, in place.
//   margin_softmax_check   the argument checks alone, for the plain-torch definition.
//   log_prior              tau * log of the shares of the classes: cpu/log_prior.cpp.
//   linear_margin_softmax  linear classifier and margin_softmax in row chunks, with _fwd and _bwd: linear_ops.cpp.
//
// fwd, bwd and scale_ have a kernel per device: C++ for CPU (cpu/), Triton for CUDA and shapes for tracing
// (ltkernels/_ops.py). Under vmap each has a batching rule (ltkernels/_vmap.py).
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>

#include "autograd_node.h"
#include "cpu/new_tensors.h"
#include "margin_options.h"
#include "precomputed_gradient.h"

namespace ltkernels {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

TORCH_LIBRARY(ltkernels, m) {
  m.set_python_module("ltkernels._ops");
  m.def(
      "margin_softmax(" LTK_MARGIN_SCHEMA ", bool return_lse) -> (Tensor loss, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "margin_softmax_fwd(" LTK_MARGIN_SCHEMA ", bool with_grad) -> (Tensor loss, Tensor stats, Tensor grad)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "margin_softmax_bwd(Tensor grad_loss, Tensor? grad_lse, Tensor stats, " LTK_MARGIN_SCHEMA
      ", int grads) -> (Tensor grad_logits, Tensor grad_class, Tensor grad_pairwise)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "margin_softmax_fwd_(Tensor(a!) logits, " LTK_MARGIN_OPTION_SCHEMA ") -> (Tensor loss, Tensor stats)",
      {at::Tag::pt2_compliant_tag});
  m.def("margin_softmax_scale_(Tensor(a!) grad, Tensor grad_output) -> ()", {at::Tag::pt2_compliant_tag});
  m.def("margin_softmax_check(" LTK_MARGIN_SCHEMA ") -> ()");
  m.def(
      "linear_margin_softmax(" LTK_LINEAR_SCHEMA
      ", bool return_lse, int predict) -> "
      "(Tensor loss, Tensor lse, Tensor row_loss, Tensor predicted)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_margin_softmax_fwd(" LTK_LINEAR_SCHEMA
      ", int predict, int grads) -> (Tensor loss, Tensor stats, "
      "Tensor predicted, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_margin_softmax_bwd(Tensor grad_loss, Tensor? grad_lse, Tensor stats, " LTK_LINEAR_SCHEMA
      ", int grads) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_class, "
      "Tensor grad_pairwise)",
      {at::Tag::pt2_compliant_tag});
}

ThreeTensors call_fwd(LTK_MARGIN_PARAMETERS, bool with_grad) {
  static const auto op = typed_operator<ThreeTensors(LTK_MARGIN_PARAMETERS, bool)>("ltkernels::margin_softmax_fwd");
  return op.call(LTK_MARGIN_ARGUMENTS, with_grad);
}

ThreeTensors call_bwd(
    const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& stats, LTK_MARGIN_PARAMETERS,
    int64_t grads) {
  static const auto op =
      typed_operator<ThreeTensors(const Tensor&, const OptionalTensor&, const Tensor&, LTK_MARGIN_PARAMETERS, int64_t)>(
          "ltkernels::margin_softmax_bwd");
  return op.call(grad_loss, grad_lse, stats, LTK_MARGIN_ARGUMENTS, grads);
}

// ------------------------------------------------------------------------------------------------------ autograd node

// Inputs: the upstream gradients of loss and, if it was returned, lse. Outputs, in this order: gradients to logits,
// logit_scale, logit_bias, target_margin, pairwise_margin, sample_weight.
//
// For a scalar loss that needs only the gradient to the logits, the forward pass has written that gradient for an
// upstream gradient of 1, and it is scaled here; in all other cases it is recomputed from the logits.
struct MarginSoftmaxBackward : public torch::autograd::Node {
  enum Output { kLogits, kLogitScale, kLogitBias, kTargetMargin, kPairwiseMargin, kSampleWeight, kOutputs };

  std::optional<SavedMarginOptions> options_;  // unless the gradient to the logits is all there is
  SavedVariable logits_, stats_, loss_;        // as far as the options say
  SavedVariable grad_;                         // if precomputed_
  bool precomputed_ = false;

  std::string name() const override { return "MarginSoftmaxBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    options_.reset();
    for (SavedVariable* saved : {&logits_, &stats_, &loss_, &grad_}) saved->reset_data();
    released_ = true;
  }

  variable_list apply(variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list grads(kOutputs);
    const bool lse_used = upstream.size() > 1 && upstream[1].defined();
    if (!upstream[0].defined() && !lse_used) return grads;
    const bool sample_weight_wanted = task_should_compute_output(kSampleWeight) && upstream[0].defined();
    if (precomputed_ && task_should_compute_output(kLogits)) grads[kLogits] = times_upstream(grad_, upstream[0]);
    if (!precomputed_ || sample_weight_wanted) {
      const MarginOptions options = options_->unpack();
      const Tensor stats = stats_.unpack();
      if (!precomputed_) {
        recompute(options, stats, upstream[0], lse_used ? OptionalTensor(upstream[1]) : std::nullopt, grads);
      }
      if (sample_weight_wanted) {
        grads[kSampleWeight] = sample_weight_gradient(options, stats.select(0, 2), loss_.unpack(), upstream[0]);
      }
    }
    differentiable_once("margin_cross_entropy", grads, *this, upstream);
    return grads;
  }

 private:
  bool released_ = false;

  void recompute(
      const MarginOptions& options, const Tensor& stats, const Tensor& upstream, const OptionalTensor& upstream_lse,
      variable_list& grads) {
    const bool scale = task_should_compute_output(kLogitScale), bias = task_should_compute_output(kLogitBias),
               margin = task_should_compute_output(kTargetMargin);
    int64_t wanted = 0;
    if (task_should_compute_output(kLogits)) wanted |= kGradLogits;
    if (scale || bias || margin) wanted |= kGradClass;
    if (task_should_compute_output(kPairwiseMargin)) wanted |= kGradPairwise;
    if (wanted == 0) return;
    const Tensor grad_loss = upstream.defined() ? upstream : at::zeros_symint({}, stats.options());
    const auto [grad_logits, sums, pairwise] =
        call_bwd(grad_loss, upstream_lse, stats, logits_.unpack(), LTK_OPTIONS_OF(options), wanted);
    if (wanted & kGradLogits) grads[kLogits] = grad_logits;
    ClassGradients of_class =
        class_gradients(options, sums, wanted & kGradPairwise ? pairwise : Tensor(), scale, bias, margin);
    grads[kLogitScale] = std::move(of_class.logit_scale);
    grads[kLogitBias] = std::move(of_class.logit_bias);
    grads[kTargetMargin] = std::move(of_class.target_margin);
    grads[kPairwiseMargin] = std::move(of_class.pairwise_margin);
  }
};

Tensor lse_of(const Tensor& stats, bool return_lse) {
  if (return_lse) return stats.select(0, 0) + stats.select(0, 1);
  // Without the dispatcher, where that makes no difference: a small batch would feel it.
  if (stats.is_cpu() && !at::isTensorSubclassLike(stats)) return empty_tensor({0}, stats.scalar_type());
  return at::empty_symint({0}, stats.options());
}

// Below autograd, and for tensors that never record a graph.
std::tuple<Tensor, Tensor> margin_softmax_plain(LTK_MARGIN_PARAMETERS, bool return_lse) {
  check_margin_softmax(LTK_MARGIN_ARGUMENTS);
  const auto [loss, stats, grad] = call_fwd(LTK_MARGIN_ARGUMENTS, /*with_grad=*/false);
  return {loss, lse_of(stats, return_lse)};
}

std::tuple<Tensor, Tensor> margin_softmax_autograd(LTK_MARGIN_PARAMETERS, bool return_lse) {
  check_margin_softmax(LTK_MARGIN_ARGUMENTS);
  const Tensor a = value_or_undefined(logit_scale), b = value_or_undefined(logit_bias),
               m = value_or_undefined(target_margin), delta = value_or_undefined(pairwise_margin),
               u = value_or_undefined(sample_weight);
  forbid_forward_mode("margin_cross_entropy", {logits, target, value_or_undefined(weight), a, b, m, delta, u});
  const bool needs_graph = torch::autograd::compute_requires_grad(logits, a, b, m, delta, u);
  const bool class_grads = requires_grad(logit_scale) || requires_grad(logit_bias) || requires_grad(target_margin) ||
                           requires_grad(pairwise_margin);
  // Not for float16: gradients below its smallest numbers would be gone before a loss scale multiplies them.
  const bool precompute = needs_graph && logits.requires_grad() && reduction != kNone && !return_lse && !class_grads &&
                          logits.scalar_type() != at::kHalf;

  Tensor loss, stats, grad;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, stats, grad) = call_fwd(LTK_MARGIN_ARGUMENTS, precompute);
  }
  if (!needs_graph) return {loss, lse_of(stats, return_lse)};

  auto node = make_node<MarginSoftmaxBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(logits, a, b, m, delta, u));
  node->precomputed_ = precompute;
  if (precompute) node->grad_ = SavedVariable(grad, false);
  const bool u_requires_grad = requires_grad(sample_weight);
  if (!precompute || u_requires_grad) {
    node->options_.emplace(MarginOptions{LTK_MARGIN_OPTION_ARGUMENTS});
    node->stats_ = SavedVariable(stats, false);
    // The logits may be modified after a precomputed gradient: do not hold on to them.
    if (!precompute) node->logits_ = SavedVariable(logits, false);
    if (u_requires_grad && reduction == kMean) node->loss_ = SavedVariable(loss.detach().clone(), false);
  }
  Tensor lse;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    lse = lse_of(stats, return_lse);
  }
  torch::autograd::set_history(loss, node);
  if (return_lse) torch::autograd::set_history(lse, node);
  return {loss, lse};
}

// ------------------------------------------------------- fwd and bwd called with a graph: right once, never silently

template <typename... Inputs>
ThreeTensors mark_differentiable_once(const char* name, ThreeTensors results, const Inputs&... inputs) {
  forbid_forward_mode("margin_cross_entropy", {inputs...});
  if (torch::autograd::compute_requires_grad(inputs...)) {
    const auto& [first, second, third] = results;
    differentiable_once(name, {first, second, third}, torch::autograd::collect_next_edges(inputs...));
  }
  return results;
}

ThreeTensors margin_softmax_fwd_autograd(LTK_MARGIN_PARAMETERS, bool with_grad) {
  ThreeTensors results;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = call_fwd(LTK_MARGIN_ARGUMENTS, with_grad);
  }
  return mark_differentiable_once(
      "margin_softmax_fwd", std::move(results), logits, value_or_undefined(logit_scale), value_or_undefined(logit_bias),
      value_or_undefined(target_margin), value_or_undefined(pairwise_margin), value_or_undefined(sample_weight));
}

ThreeTensors margin_softmax_bwd_autograd(
    const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& stats, LTK_MARGIN_PARAMETERS,
    int64_t grads) {
  ThreeTensors results;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = call_bwd(grad_loss, grad_lse, stats, LTK_MARGIN_ARGUMENTS, grads);
  }
  return mark_differentiable_once(
      "margin_softmax_bwd", std::move(results), grad_loss, value_or_undefined(grad_lse), logits,
      value_or_undefined(logit_scale), value_or_undefined(logit_bias), value_or_undefined(target_margin),
      value_or_undefined(pairwise_margin), value_or_undefined(sample_weight));
}

void margin_softmax_check(LTK_MARGIN_PARAMETERS) { check_margin_softmax(LTK_MARGIN_ARGUMENTS); }

TORCH_LIBRARY_IMPL(ltkernels, Autograd, m) {
  m.impl("margin_softmax", &margin_softmax_autograd);
  m.impl("margin_softmax_fwd", &margin_softmax_fwd_autograd);
  m.impl("margin_softmax_bwd", &margin_softmax_bwd_autograd);
}

TORCH_LIBRARY_IMPL(ltkernels, CompositeExplicitAutograd, m) { m.impl("margin_softmax", &margin_softmax_plain); }

TORCH_LIBRARY_IMPL(ltkernels, CompositeImplicitAutograd, m) { m.impl("margin_softmax_check", &margin_softmax_check); }

}  // namespace
}  // namespace ltkernels
