// The operators of the library: schemas, autograd nodes and what happens at each dispatch key.
//
//   margin_softmax         public operation: checks, forward, autograd node. Called by ltkernels.functional.
//   margin_softmax_fwd     statistics of each row and the reduced loss; with_grad: also the gradient for upstream 1.
//   margin_softmax_bwd     gradients recomputed from the logits and the row statistics.
//   margin_softmax_scale_  gradient *= upstream gradient, in place.
//   margin_softmax_check   the argument checks alone, for the plain-torch definition.
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
#include "margin_softmax_op.h"

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
  m.def("margin_softmax_scale_(Tensor(a!) grad, Tensor grad_output) -> ()", {at::Tag::pt2_compliant_tag});
  m.def(
      "margin_softmax_check(Tensor logits, Tensor target, Tensor? weight, Tensor? logit_scale, Tensor? logit_bias, "
      "Tensor? target_margin, Tensor? pairwise_margin, Tensor? mask, Tensor? sample_weight, Tensor? row_class, "
      "Tensor? neighbor_offsets, Tensor? neighbor_classes, float scale, float neighbor_weight, int back_from, "
      "int ignore_index, float label_smoothing) -> ()");
}

template <typename Signature>
auto typed_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
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

void call_scale_(Tensor grad, const Tensor& grad_output) {
  static const auto op = typed_operator<void(Tensor, const Tensor&)>("ltkernels::margin_softmax_scale_");
  op.call(std::move(grad), grad_output);
}

bool requires_grad(const OptionalTensor& x) { return x.has_value() && x->defined() && x->requires_grad(); }

Tensor value_or_undefined(const OptionalTensor& x) { return x.has_value() ? *x : Tensor(); }

OptionalTensor unpack_optional(const SavedVariable& saved) {
  Tensor x = saved.unpack();
  return x.defined() ? OptionalTensor(std::move(x)) : std::nullopt;
}

// ------------------------------------------------------------------------------------------------------ autograd node

// What a gradient is recomputed from.
struct UnpackedArguments {
  Tensor logits, target, stats, loss;
  OptionalTensor weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
      neighbor_offsets, neighbor_classes;
};

struct SavedArguments {
  SavedVariable logits, target, stats, loss;
  SavedVariable weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class,
      neighbor_offsets, neighbor_classes;

  SavedArguments(LTK_MARGIN_TENSOR_PARAMETERS, const Tensor& stats, const Tensor& loss)
      : logits(logits, false),
        target(target, false),
        stats(stats, false),
        loss(loss, false),
        weight(value_or_undefined(weight), false),
        logit_scale(value_or_undefined(logit_scale), false),
        logit_bias(value_or_undefined(logit_bias), false),
        target_margin(value_or_undefined(target_margin), false),
        pairwise_margin(value_or_undefined(pairwise_margin), false),
        mask(value_or_undefined(mask), false),
        sample_weight(value_or_undefined(sample_weight), false),
        row_class(value_or_undefined(row_class), false),
        neighbor_offsets(value_or_undefined(neighbor_offsets), false),
        neighbor_classes(value_or_undefined(neighbor_classes), false) {}

  // Once a backward pass: hooks may recompute what they unpack, and torch.utils.checkpoint forbids a second time.
  UnpackedArguments unpack() const {
    return {
        .logits = logits.unpack(),
        .target = target.unpack(),
        .stats = stats.unpack(),
        .loss = loss.unpack(),
        .weight = unpack_optional(weight),
        .logit_scale = unpack_optional(logit_scale),
        .logit_bias = unpack_optional(logit_bias),
        .target_margin = unpack_optional(target_margin),
        .pairwise_margin = unpack_optional(pairwise_margin),
        .mask = unpack_optional(mask),
        .sample_weight = unpack_optional(sample_weight),
        .row_class = unpack_optional(row_class),
        .neighbor_offsets = unpack_optional(neighbor_offsets),
        .neighbor_classes = unpack_optional(neighbor_classes)};
  }
};

// Inputs: the upstream gradients of loss and, if it was returned, lse. Outputs, in this order: gradients to logits,
// logit_scale, logit_bias, target_margin, pairwise_margin, sample_weight.
//
// For a scalar loss that needs only the gradient to the logits, the forward pass has written that gradient for an
// upstream gradient of 1, and it is scaled here; in all other cases it is recomputed from the logits.
struct MarginSoftmaxBackward : public torch::autograd::Node {
  enum Output { kLogits, kLogitScale, kLogitBias, kTargetMargin, kPairwiseMargin, kSampleWeight, kOutputs };

  std::optional<SavedArguments> saved_;  // unless the gradient to the logits is all there is
  SavedVariable grad_;                   // if precomputed_
  double scale_ = 1, neighbor_weight_ = 1, label_smoothing_ = 0;
  int64_t back_from_ = 0, reduction_ = kMean, ignore_index_ = -100;
  bool precomputed_ = false;

  std::string name() const override { return "MarginSoftmaxBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_.reset();
    grad_.reset_data();
    released_ = true;
  }

  variable_list apply(variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list grads(kOutputs);
    const bool lse_used = upstream.size() > 1 && upstream[1].defined();
    if (!upstream[0].defined() && !lse_used) return grads;
    const bool sample_weight_wanted = task_should_compute_output(kSampleWeight) && upstream[0].defined();
    if (precomputed_ && task_should_compute_output(kLogits)) grads[kLogits] = scale_precomputed(upstream[0]);
    if (!precomputed_ || sample_weight_wanted) {
      const UnpackedArguments saved = saved_->unpack();
      if (!precomputed_) recompute(saved, upstream[0], lse_used ? OptionalTensor(upstream[1]) : std::nullopt, grads);
      if (sample_weight_wanted) grads[kSampleWeight] = sample_weight_gradient(saved, upstream[0]);
    }
    if (at::GradMode::is_enabled()) {
      torch::autograd::edge_list edges = next_edges();
      for (const Tensor& x : upstream) {
        if (x.defined() && x.requires_grad()) edges.push_back(torch::autograd::impl::gradient_edge(x));
      }
      differentiable_once("margin_cross_entropy", grads, std::move(edges));
    }
    return grads;
  }

 private:
  bool released_ = false;

  // In place if nobody can see the memory again: the graph is not retained and holds the only reference.
  Tensor scale_precomputed(const Tensor& upstream) {
    Tensor grad = grad_.unpack();
    const bool last_use = !torch::autograd::get_current_graph_task_keep_graph();
    if (last_use && !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grad) &&
        !at::isTensorSubclassLike(upstream)) {
      grad_.reset_data();
      if (grad.use_count() == 1 && grad.storage().use_count() == 1) {
        const at::AutoDispatchBelowADInplaceOrView guard;  // not through autograd's boxed fallback
        call_scale_(grad, upstream);
        return grad;
      }
    }
    return grad.mul(upstream);
  }

  void recompute(
      const UnpackedArguments& saved, const Tensor& upstream, const OptionalTensor& upstream_lse,
      variable_list& grads) {
    const bool class_wanted = task_should_compute_output(kLogitScale) || task_should_compute_output(kLogitBias) ||
                              task_should_compute_output(kTargetMargin);
    int64_t wanted = 0;
    if (task_should_compute_output(kLogits)) wanted |= kGradLogits;
    if (class_wanted) wanted |= kGradClass;
    if (task_should_compute_output(kPairwiseMargin)) wanted |= kGradPairwise;
    if (wanted == 0) return;
    const Tensor grad_loss = upstream.defined() ? upstream : at::zeros_symint({}, saved.stats.options());
    const auto [grad_logits, grad_class, grad_pairwise] = call_bwd(
        grad_loss, upstream_lse, saved.stats, saved.logits, saved.target, saved.weight, saved.logit_scale,
        saved.logit_bias, saved.target_margin, saved.pairwise_margin, saved.mask, saved.sample_weight, saved.row_class,
        saved.neighbor_offsets, saved.neighbor_classes, scale_, neighbor_weight_, back_from_, reduction_, ignore_index_,
        label_smoothing_, wanted);
    if (wanted & kGradLogits) grads[kLogits] = grad_logits;
    if (task_should_compute_output(kLogitScale)) {
      const Tensor da = grad_class.select(0, 0);
      grads[kLogitScale] = (saved.logit_scale->dim() == 0 ? da.sum() : da).to(saved.logit_scale->scalar_type());
    }
    if (task_should_compute_output(kLogitBias)) {
      grads[kLogitBias] = grad_class.select(0, 1).to(saved.logit_bias->scalar_type());
    }
    if (task_should_compute_output(kTargetMargin)) {
      grads[kTargetMargin] = grad_class.select(0, 2).to(saved.target_margin->scalar_type());
    }
    if (wanted & kGradPairwise) grads[kPairwiseMargin] = grad_pairwise.to(saved.pairwise_margin->scalar_type());
  }

  // du_i = upstream_i * r_i, or upstream * (r_i - k_i * loss) / Z under a mean with Z = sum_i u_i k_i; 0 if ignored.
  Tensor sample_weight_gradient(const UnpackedArguments& saved, const Tensor& upstream) const {
    const Tensor row_loss = saved.stats.select(0, 2);
    const Tensor& u = *saved.sample_weight;
    const bool indices = !saved.target.is_floating_point();
    // As int64: -100 does not fit every integer dtype.
    const Tensor index = indices ? saved.target.to(at::kLong) : Tensor();
    const Tensor kept = indices ? index.ne(ignore_index_) : Tensor();
    Tensor grad = upstream * row_loss;
    if (reduction_ == kMean) {
      Tensor k = at::ones_like(row_loss);
      if (indices && saved.weight.has_value()) {
        k = saved.weight->to(k.scalar_type()).index_select(0, index.mul(kept));
      }
      if (indices) k = k * kept;
      const Tensor normalizer = (u.to(k.scalar_type()) * k).sum();
      grad = upstream * (row_loss - k * saved.loss) / normalizer;
    }
    // Not a product with `kept`: the loss may be NaN.
    return (indices ? at::where(kept, grad, 0) : grad).to(u.scalar_type());
  }
};

void forbid_forward_mode(std::initializer_list<Tensor> inputs) {
  for (const Tensor& x : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !torch::autograd::isFwGradDefined(x),
        "margin_cross_entropy does not implement forward-mode differentiation; use reverse mode, or "
        "LTKERNELS_BACKEND=reference.");
  }
}

Tensor lse_of(const Tensor& stats, bool return_lse) {
  return return_lse ? stats.select(0, 0) + stats.select(0, 1) : at::empty_symint({0}, stats.options());
}

// Below autograd, and for tensors that never record a graph.
std::tuple<Tensor, Tensor> margin_softmax_plain(LTK_MARGIN_PARAMETERS, bool return_lse) {
  check_margin_softmax(LTK_MARGIN_TENSOR_ARGUMENTS, ignore_index, label_smoothing);
  const auto [loss, stats, grad] = call_fwd(LTK_MARGIN_ARGUMENTS, /*with_grad=*/false);
  return {loss, lse_of(stats, return_lse)};
}

std::tuple<Tensor, Tensor> margin_softmax_autograd(LTK_MARGIN_PARAMETERS, bool return_lse) {
  check_margin_softmax(LTK_MARGIN_TENSOR_ARGUMENTS, ignore_index, label_smoothing);
  const Tensor a = value_or_undefined(logit_scale), b = value_or_undefined(logit_bias),
               m = value_or_undefined(target_margin), delta = value_or_undefined(pairwise_margin),
               u = value_or_undefined(sample_weight);
  forbid_forward_mode({logits, a, b, m, delta, u});
  const bool needs_graph = torch::autograd::compute_requires_grad(logits, a, b, m, delta, u);
  const bool class_grads = requires_grad(logit_scale) || requires_grad(logit_bias) || requires_grad(target_margin) ||
                           requires_grad(pairwise_margin);
  const bool precompute = needs_graph && logits.requires_grad() && reduction != kNone && !return_lse && !class_grads;

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
    node->scale_ = scale;
    node->neighbor_weight_ = neighbor_weight;
    node->back_from_ = back_from;
    node->reduction_ = reduction;
    node->ignore_index_ = ignore_index;
    node->label_smoothing_ = label_smoothing;
    // The logits may be modified after a precomputed gradient: do not hold on to them.
    node->saved_.emplace(
        precompute ? Tensor() : logits, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask,
        sample_weight, row_class, neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from, stats,
        u_requires_grad && reduction == kMean ? loss.detach() : Tensor());
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
  forbid_forward_mode({inputs...});
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

void margin_softmax_check(LTK_MARGIN_TENSOR_PARAMETERS, int64_t ignore_index, double label_smoothing) {
  check_margin_softmax(LTK_MARGIN_TENSOR_ARGUMENTS, ignore_index, label_smoothing);
}

TORCH_LIBRARY_IMPL(ltkernels, Autograd, m) {
  m.impl("margin_softmax", &margin_softmax_autograd);
  m.impl("margin_softmax_fwd", &margin_softmax_fwd_autograd);
  m.impl("margin_softmax_bwd", &margin_softmax_bwd_autograd);
}

TORCH_LIBRARY_IMPL(ltkernels, CompositeExplicitAutograd, m) { m.impl("margin_softmax", &margin_softmax_plain); }

TORCH_LIBRARY_IMPL(ltkernels, CompositeImplicitAutograd, m) { m.impl("margin_softmax_check", &margin_softmax_check); }

}  // namespace
}  // namespace ltkernels
