// Autograd of linear_margin_softmax; the schemas are in ops.cpp, the computation in linear_margin_softmax.cpp.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>

#include "autograd_node.h"
#include "linear_margin_softmax.h"
#include "margin_options.h"
#include "precomputed_gradient.h"

namespace ltkernels {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr char kName[] = "linear_margin_cross_entropy";

SixTensors call_fwd(LTK_LINEAR_PARAMETERS, int64_t predict, int64_t grads) {
  static const auto op =
      typed_operator<SixTensors(LTK_LINEAR_PARAMETERS, int64_t, int64_t)>("ltkernels::linear_margin_softmax_fwd");
  return op.call(LTK_LINEAR_ARGUMENTS, predict, grads);
}

FiveTensors call_bwd(
    const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& stats, LTK_LINEAR_PARAMETERS,
    int64_t grads) {
  static const auto op =
      typed_operator<FiveTensors(const Tensor&, const OptionalTensor&, const Tensor&, LTK_LINEAR_PARAMETERS, int64_t)>(
          "ltkernels::linear_margin_softmax_bwd");
  return op.call(grad_loss, grad_lse, stats, LTK_LINEAR_ARGUMENTS, grads);
}

void check(LTK_LINEAR_PARAMETERS, int64_t predict) {
  TORCH_CHECK_VALUE(input.dim() == 2, "input: expected features of shape (N, D), got ", input.sym_sizes());
  TORCH_CHECK_VALUE(
      linear_weight.dim() == 2 && linear_weight.sym_size(1) == input.sym_size(1), "linear_weight: expected shape (C, ",
      input.sym_size(1), ") for input of shape ", input.sym_sizes(), ", got ", linear_weight.sym_sizes());
  TORCH_CHECK_TYPE(
      linear_weight.scalar_type() == input.scalar_type(), "linear_weight: expected dtype ", input.scalar_type(),
      " like input, got ", linear_weight.scalar_type());
  TORCH_CHECK_VALUE(
      linear_weight.device() == input.device(), "linear_weight: expected a tensor on ", input.device(),
      " like input, got one on ", linear_weight.device());
  if (linear_bias.has_value()) {
    TORCH_CHECK_VALUE(
        linear_bias->dim() == 1 && linear_bias->sym_size(0) == linear_weight.sym_size(0),
        "linear_bias: expected shape (", linear_weight.sym_size(0), ",), got ", linear_bias->sym_sizes());
    TORCH_CHECK_TYPE(
        linear_bias->is_floating_point(), "linear_bias: expected a floating dtype, got ", linear_bias->scalar_type());
    TORCH_CHECK_VALUE(
        linear_bias->device() == input.device(), "linear_bias: expected a tensor on ", input.device(),
        " like input, got one on ", linear_bias->device());
    TORCH_CHECK_VALUE(!cosine, "linear_bias: expected None for a cosine classifier");
  }
  TORCH_CHECK_VALUE(
      chunk_rows == -1 || chunk_rows > 0, "chunk_size: expected 'auto' or a number above 0, got ", chunk_rows);
  TORCH_CHECK_VALUE(predict >= 0, "predict: expected a number of classes, got ", predict);
  // Shape, dtype and device of the logits are all that the checks look at.
  const Tensor logits =
      at::empty({1, 1}, input.options()).expand_symint({input.sym_size(0), linear_weight.sym_size(0)});
  check_margin_softmax(LTK_MARGIN_ARGUMENTS);
}

// Inputs: the upstream gradients of loss and lse. As for the row operation, a scalar loss that needs only gradients to
// input, linear_weight and linear_bias has computed them in the forward pass; others are recomputed from the inputs.
struct LinearMarginSoftmaxBackward : public torch::autograd::Node {
  enum Output {
    kInput,
    kWeight,
    kBias,
    kLogitScale,
    kLogitBias,
    kTargetMargin,
    kPairwiseMargin,
    kSampleWeight,
    kOutputs
  };

  std::optional<SavedMarginOptions> options_;
  SavedVariable input_, weight_, bias_, stats_, loss_;
  SavedVariable grads_[3];  // if precomputed_
  bool cosine_ = false, precomputed_ = false;
  int64_t chunk_rows_ = -1;

  std::string name() const override { return "LinearMarginSoftmaxBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    options_.reset();
    for (SavedVariable* saved : {&input_, &weight_, &bias_, &stats_, &loss_}) saved->reset_data();
    for (SavedVariable& saved : grads_) saved.reset_data();
    released_ = true;
  }

  variable_list apply(variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list grads(kOutputs);
    const bool lse_used = upstream.size() > 1 && upstream[1].defined();
    if (!upstream[0].defined() && !lse_used) return grads;
    if (precomputed_) {
      for (size_t k = kInput; k <= kBias; ++k) {
        if (task_should_compute_output(k)) grads[k] = times_upstream(grads_[k], upstream[0]);
      }
    } else {
      recompute(upstream[0], lse_used ? OptionalTensor(upstream[1]) : std::nullopt, grads);
    }
    differentiable_once(kName, grads, *this, upstream);
    return grads;
  }

 private:
  bool released_ = false;

  void recompute(const Tensor& upstream, const OptionalTensor& upstream_lse, variable_list& grads) {
    const MarginOptions options = options_->unpack();
    const Tensor stats = stats_.unpack();
    const bool scale = task_should_compute_output(kLogitScale), bias = task_should_compute_output(kLogitBias),
               margin = task_should_compute_output(kTargetMargin), pairs = task_should_compute_output(kPairwiseMargin);
    int64_t wanted = 0;
    for (size_t k = kInput; k <= kBias; ++k) wanted |= task_should_compute_output(k) ? int64_t(1) << k : 0;
    if (scale || bias || margin) wanted |= kGradClasses;
    if (pairs) wanted |= kGradPairs;
    if (wanted != 0) {
      const Tensor grad_loss = upstream.defined() ? upstream : at::zeros_symint({}, stats.options());
      const Tensor linear_bias = bias_.unpack();
      auto [grad_input, grad_weight, grad_bias, sums, pairwise] = call_bwd(
          grad_loss, upstream_lse, stats, input_.unpack(), weight_.unpack(),
          linear_bias.defined() ? OptionalTensor(linear_bias) : std::nullopt, cosine_, chunk_rows_,
          LTK_OPTIONS_OF(options), wanted);
      if (wanted & kGradInput) grads[kInput] = grad_input;
      if (wanted & kGradWeight) grads[kWeight] = grad_weight;
      if (wanted & kGradBias) grads[kBias] = grad_bias;
      ClassGradients of_class = class_gradients(options, sums, pairs ? pairwise : Tensor(), scale, bias, margin);
      grads[kLogitScale] = std::move(of_class.logit_scale);
      grads[kLogitBias] = std::move(of_class.logit_bias);
      grads[kTargetMargin] = std::move(of_class.target_margin);
      grads[kPairwiseMargin] = std::move(of_class.pairwise_margin);
    }
    if (task_should_compute_output(kSampleWeight) && upstream.defined()) {
      grads[kSampleWeight] = sample_weight_gradient(options, stats.select(0, 2), loss_.unpack(), upstream);
    }
  }
};

// Row losses as reduction="none" gives them: u_i r_i.
Tensor row_loss_of(const Tensor& stats, const OptionalTensor& sample_weight) {
  const Tensor r = stats.select(0, 2);
  return sample_weight.has_value() ? at::where(r == 0, r, r * sample_weight->detach()) : r.clone();
}

Tensor lse_of(const Tensor& stats, bool return_lse) {
  return return_lse ? stats.select(0, 0) + stats.select(0, 1) : at::empty_symint({0}, stats.options());
}

// Below autograd, and for tensors that never record a graph.
FourTensors linear_margin_softmax_plain(LTK_LINEAR_PARAMETERS, bool return_lse, int64_t predict) {
  check(LTK_LINEAR_ARGUMENTS, predict);
  const auto [loss, stats, predicted, dx, dw, db] = call_fwd(LTK_LINEAR_ARGUMENTS, predict, /*grads=*/0);
  return {loss, lse_of(stats, return_lse), row_loss_of(stats, sample_weight), predicted};
}

FourTensors linear_margin_softmax_autograd(LTK_LINEAR_PARAMETERS, bool return_lse, int64_t predict) {
  check(LTK_LINEAR_ARGUMENTS, predict);
  const Tensor linear_b = value_or_undefined(linear_bias), a = value_or_undefined(logit_scale),
               b = value_or_undefined(logit_bias), m = value_or_undefined(target_margin),
               delta = value_or_undefined(pairwise_margin), u = value_or_undefined(sample_weight);
  forbid_forward_mode(kName, {input, linear_weight, target, value_or_undefined(weight), linear_b, a, b, m, delta, u});
  const bool needs_graph = torch::autograd::compute_requires_grad(input, linear_weight, linear_b, a, b, m, delta, u);
  const bool vectors = requires_grad(logit_scale) || requires_grad(logit_bias) || requires_grad(target_margin) ||
                       requires_grad(pairwise_margin) || requires_grad(sample_weight);
  // Not for float16: gradients below its smallest numbers would be gone before a loss scale multiplies them.
  const bool precompute =
      needs_graph && !vectors && reduction != kNone && !return_lse && input.scalar_type() != at::kHalf;
  int64_t wanted = 0;
  if (precompute && input.requires_grad()) wanted |= kGradInput;
  if (precompute && linear_weight.requires_grad()) wanted |= kGradWeight;
  if (precompute && requires_grad(linear_bias)) wanted |= kGradBias;

  Tensor loss, stats, predicted, grads[3], lse, row_loss;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, stats, predicted, grads[0], grads[1], grads[2]) = call_fwd(LTK_LINEAR_ARGUMENTS, predict, wanted);
    lse = lse_of(stats, return_lse);
    row_loss = row_loss_of(stats, sample_weight);
  }
  if (!needs_graph) return {loss, lse, row_loss, predicted};

  auto node = make_node<LinearMarginSoftmaxBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, linear_weight, linear_b, a, b, m, delta, u));
  node->precomputed_ = precompute;
  if (precompute) {
    for (int k = 0; k < 3; ++k) node->grads_[k] = SavedVariable(grads[k], false);
  } else {
    node->cosine_ = cosine;
    node->chunk_rows_ = chunk_rows;
    node->options_.emplace(MarginOptions{LTK_MARGIN_OPTION_ARGUMENTS});
    node->input_ = SavedVariable(input, false);
    node->weight_ = SavedVariable(linear_weight, false);
    node->bias_ = SavedVariable(linear_b, false);
    node->stats_ = SavedVariable(stats, false);
    if (requires_grad(sample_weight) && reduction == kMean) node->loss_ = SavedVariable(loss.detach().clone(), false);
  }
  torch::autograd::set_history(loss, node);
  if (return_lse) torch::autograd::set_history(lse, node);
  return {loss, lse, row_loss, predicted};
}

// fwd and bwd called with a graph: right once, never silently.

template <typename Results, typename... Inputs>
Results mark_differentiable_once(Results results, const Inputs&... inputs) {
  forbid_forward_mode(kName, {inputs...});
  if (torch::autograd::compute_requires_grad(inputs...)) {
    variable_list outputs;
    const auto collect = [&](const Tensor& x) {
      if (x.is_floating_point()) outputs.push_back(x);  // not the predicted classes
    };
    std::apply([&](const auto&... x) { (collect(x), ...); }, results);
    differentiable_once(kName, outputs, torch::autograd::collect_next_edges(inputs...));
  }
  return results;
}

SixTensors linear_margin_softmax_fwd_autograd(LTK_LINEAR_PARAMETERS, int64_t predict, int64_t grads) {
  SixTensors results;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = call_fwd(LTK_LINEAR_ARGUMENTS, predict, grads);
  }
  return mark_differentiable_once(
      std::move(results), input, linear_weight, value_or_undefined(linear_bias), value_or_undefined(logit_scale),
      value_or_undefined(logit_bias), value_or_undefined(target_margin), value_or_undefined(pairwise_margin),
      value_or_undefined(sample_weight));
}

FiveTensors linear_margin_softmax_bwd_autograd(
    const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& stats, LTK_LINEAR_PARAMETERS,
    int64_t grads) {
  FiveTensors results;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = call_bwd(grad_loss, grad_lse, stats, LTK_LINEAR_ARGUMENTS, grads);
  }
  return mark_differentiable_once(
      std::move(results), grad_loss, value_or_undefined(grad_lse), input, linear_weight,
      value_or_undefined(linear_bias), value_or_undefined(logit_scale), value_or_undefined(logit_bias),
      value_or_undefined(target_margin), value_or_undefined(pairwise_margin), value_or_undefined(sample_weight));
}

TORCH_LIBRARY_IMPL(ltkernels, Autograd, m) {
  m.impl("linear_margin_softmax", &linear_margin_softmax_autograd);
  m.impl("linear_margin_softmax_fwd", &linear_margin_softmax_fwd_autograd);
  m.impl("linear_margin_softmax_bwd", &linear_margin_softmax_bwd_autograd);
}

TORCH_LIBRARY_IMPL(ltkernels, CompositeExplicitAutograd, m) {
  m.impl("linear_margin_softmax", &linear_margin_softmax_plain);
}

}  // namespace
}  // namespace ltkernels
