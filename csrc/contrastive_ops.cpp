// Schemas and autograd of the contrastive operators.
//
//   contrastive      public operation: forward, autograd node. Called by ltkernels.functional.
//   contrastive_fwd  loss and (5, M) statistics; of a scalar loss the gradients that `grads` names, for upstream 1.
//   contrastive_bwd  those gradients for any upstream gradient, from the inputs and the statistics.
//
// fwd and bwd have a kernel per device: C++ for CPU (cpu/contrastive.cpp), Triton for CUDA and shapes for tracing
// (ltkernels/_ops.py).
#include <ATen/ATen.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <mutex>

#include "autograd_node.h"
#include "contrastive.h"
#include "contrastive_op.h"
#include "margin_options.h"
#include "precomputed_gradient.h"

namespace ltkernels {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using TwoTensors = std::tuple<Tensor, Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr char kName[] = "contrastive_loss";

TORCH_LIBRARY_FRAGMENT(ltkernels, m) {
  m.def(
      "contrastive(" LTK_CONTRASTIVE_SCHEMA ", bool with_expected) -> (Tensor loss, Tensor stats)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "contrastive_fwd(" LTK_CONTRASTIVE_SCHEMA
      ", int grads) -> (Tensor loss, Tensor stats, Tensor grad_query, "
      "Tensor grad_key, Tensor grad_temperature, Tensor grad_key_bias, Tensor grad_pair_margin, "
      "Tensor grad_extra_positive)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "contrastive_bwd(Tensor grad_loss, Tensor stats, " LTK_CONTRASTIVE_SCHEMA
      ", int grads) -> (Tensor grad_query, "
      "Tensor grad_key, Tensor grad_temperature, Tensor grad_key_bias, Tensor grad_pair_margin, "
      "Tensor grad_extra_positive)",
      {at::Tag::pt2_compliant_tag});
}

EightTensors call_fwd(LTK_CONTRASTIVE_PARAMETERS, int64_t grads) {
  static const auto op =
      typed_operator<EightTensors(LTK_CONTRASTIVE_PARAMETERS, int64_t)>("ltkernels::contrastive_fwd");
  return op.call(LTK_CONTRASTIVE_ARGUMENTS, grads);
}

SixTensors call_bwd(const Tensor& grad_loss, const Tensor& stats, LTK_CONTRASTIVE_PARAMETERS, int64_t grads) {
  static const auto op = typed_operator<SixTensors(const Tensor&, const Tensor&, LTK_CONTRASTIVE_PARAMETERS, int64_t)>(
      "ltkernels::contrastive_bwd");
  return op.call(grad_loss, stats, LTK_CONTRASTIVE_ARGUMENTS, grads);
}

// Inputs that a gradient flows to: query, key, temperature, key_bias, pair_margin, extra_positive are outputs 0 to 5 of
// the operators and bits 0 to 5 of `grads`; sample_weight comes after them.
constexpr size_t kGradients = 6, kSampleWeight = 6, kOutputs = 7;

#define LTK_CONTRASTIVE_LEAVES                                                                                \
  query, value_or_undefined(key), temperature, value_or_undefined(key_bias), value_or_undefined(pair_margin), \
      value_or_undefined(extra_positive), value_or_undefined(sample_weight)

struct ContrastiveBackward : public torch::autograd::Node {
  // Of a scalar loss: gradients for an upstream gradient of 1. Otherwise what they are computed from.
  std::array<SavedVariable, kGradients> grads_;
  std::array<SavedVariable, 12> inputs_;
  std::array<at::ScalarType, kOutputs> types_{};
  SavedVariable stats_, loss_, sample_weight_;
  bool precomputed_ = false, exclude_self_ = true, scale_by_temperature_ = false;
  int64_t denominator_ = kAll, reduction_ = kMean;

  std::string name() const override { return "ContrastiveBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& saved : grads_) saved.reset_data();
    for (SavedVariable& saved : inputs_) saved.reset_data();
    for (SavedVariable* saved : {&stats_, &loss_, &sample_weight_}) saved->reset_data();
    released_ = true;
  }

  variable_list apply(variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list grads(kOutputs);
    if (!upstream[0].defined()) return grads;
    const bool weight_wanted = task_should_compute_output(kSampleWeight);
    // Once: under activation checkpointing a second time would be an error.
    const Tensor stats = precomputed_ && !weight_wanted ? Tensor() : stats_.unpack();
    if (precomputed_) {
      for (size_t k = 0; k < kGradients; ++k) {
        if (task_should_compute_output(k)) grads[k] = times_upstream(grads_[k], upstream[0]);
      }
    } else {
      recompute(upstream[0], stats, grads);
    }
    if (weight_wanted) grads[kSampleWeight] = weight_gradient(upstream[0], stats);
    for (size_t k = 0; k < kOutputs; ++k) {
      if (grads[k].defined()) grads[k] = grads[k].to(types_[k]);
    }
    differentiable_once(kName, grads, *this, upstream);
    return grads;
  }

 private:
  bool released_ = false;

  void recompute(const Tensor& upstream, const Tensor& stats, variable_list& grads) {
    int64_t wanted = 0;
    for (size_t k = 0; k < kGradients; ++k) wanted |= task_should_compute_output(k) ? int64_t(1) << k : 0;
    if (wanted == 0) return;
    std::array<OptionalTensor, 12> x;
    for (size_t k = 0; k < x.size(); ++k) {
      const Tensor value = inputs_[k].unpack();
      if (value.defined()) x[k] = value;
    }
    const auto results = call_bwd(
        upstream, stats, *x[0], x[1], *x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], denominator_,
        exclude_self_, scale_by_temperature_, reduction_, wanted);
    const std::array<Tensor, kGradients> all = {std::get<0>(results), std::get<1>(results), std::get<2>(results),
                                                std::get<3>(results), std::get<4>(results), std::get<5>(results)};
    for (size_t k = 0; k < kGradients; ++k) {
      if (wanted >> k & 1) grads[k] = all[k];
    }
  }

  // du_i = upstream_i r_i, or upstream (r_i - loss) / Z under a mean, over the rows that count.
  Tensor weight_gradient(const Tensor& upstream, const Tensor& stats) {
    const Tensor r = stats.select(0, kRowLoss), counted = stats.select(0, kCount).gt(0);
    if (reduction_ != kMean) return at::where(counted, upstream * r, 0);
    const Tensor total = at::where(counted, sample_weight_.unpack().to(r.scalar_type()), 0).sum();
    const Tensor grad = upstream * (r - loss_.unpack()) / at::where(total.ne(0), total, 1);
    return at::where(counted & total.ne(0), grad, 0);
  }
};

void check_arguments(LTK_CONTRASTIVE_PARAMETERS) {
  TORCH_CHECK_VALUE(
      query.dim() == 2 && query.is_floating_point() && temperature.dim() == 1 &&
          temperature.sym_size(0) == query.sym_size(0),
      "query, temperature: expected shapes (M, D) and (M,), got ", query.sym_sizes(), " and ", temperature.sym_sizes());
  const c10::SymInt rows = query.sym_size(0), keys = key.has_value() ? key->sym_size(0) : rows;
  const auto check_vector = [](const char* name, const OptionalTensor& x, const c10::SymInt& size) {
    if (!x.has_value()) return;
    TORCH_CHECK_VALUE(
        x->dim() == 1 && x->sym_size(0) == size, name, ": expected shape (", size, ",), got ", x->sym_sizes());
  };
  const auto check_matrix = [&](const char* name, const OptionalTensor& x, const c10::SymInt& size) {
    if (!x.has_value()) return;
    TORCH_CHECK_VALUE(
        x->dim() == 2 && x->sym_size(0) == size && x->sym_size(1) == query.sym_size(1), name, ": expected shape (",
        size, ", ", query.sym_size(1), "), got ", x->sym_sizes());
    TORCH_CHECK_TYPE(
        x->scalar_type() == query.scalar_type(), name, ": expected dtype ", query.scalar_type(), " like query, got ",
        x->scalar_type());
  };
  check_matrix("key", key, keys);
  check_matrix("extra_positive", extra_positive, rows);
  check_vector("labels", labels, rows);
  check_vector("key_labels", key_labels, keys);
  check_vector("positive_index", positive_index, rows);
  check_vector("key_bias", key_bias, keys);
  check_vector("sample_weight", sample_weight, rows);
  check_vector("log_normalizer", log_normalizer, rows);
  TORCH_CHECK_VALUE(
      !allowed.has_value() ||
          (allowed->scalar_type() == at::kBool &&
           (allowed->dim() == 1 ? allowed->sym_size(0) == keys
                                : allowed->dim() == 2 && allowed->sym_size(0) == rows && allowed->sym_size(1) == keys)),
      "allowed: expected booleans of shape (N,) or (M, N)");
  TORCH_CHECK_VALUE(
      !pair_margin.has_value() ||
          (labels.has_value() && pair_margin->dim() == 2 && pair_margin->sym_size(0) == pair_margin->sym_size(1)),
      "pair_margin: expected shape (L, L), with labels");
  TORCH_CHECK_VALUE(
      key.has_value() ? labels.has_value() == key_labels.has_value() : !key_labels.has_value(),
      "key_labels: expected with key and labels, and only then");
  TORCH_CHECK_VALUE(
      denominator >= kAll && denominator <= kLogsumexpSameLabel, "denominator: expected a number from 0 to ",
      static_cast<int64_t>(kLogsumexpSameLabel), ", got ", denominator);
  TORCH_CHECK_VALUE(
      denominator < kLogsumexpOtherLabel || labels.has_value(), "labels: expected for this denominator, got None");
  TORCH_CHECK_VALUE(
      !log_normalizer.has_value() || denominator == kNegatives, "log_normalizer: expected denominator 'negatives'");
  TORCH_CHECK_VALUE(
      !scale_by_temperature || (denominator < kLogsumexp && !log_normalizer.has_value()),
      "scale_by_temperature: expected a loss without log_normalizer");
  TORCH_CHECK_VALUE(reduction >= 0 && reduction <= 2, "reduction: expected 0, 1 or 2, got ", reduction);
}

// Below autograd, and for tensors that never record a graph.
TwoTensors contrastive_plain(LTK_CONTRASTIVE_PARAMETERS, bool with_expected) {
  check_arguments(LTK_CONTRASTIVE_ARGUMENTS);
  const auto results = call_fwd(LTK_CONTRASTIVE_ARGUMENTS, with_expected ? kExpected : 0);
  return {std::get<0>(results), std::get<1>(results)};
}

TwoTensors contrastive_autograd(LTK_CONTRASTIVE_PARAMETERS, bool with_expected) {
  check_arguments(LTK_CONTRASTIVE_ARGUMENTS);
  forbid_forward_mode(kName, {LTK_CONTRASTIVE_LEAVES});
  const bool needs_graph = torch::autograd::compute_requires_grad(LTK_CONTRASTIVE_LEAVES);
  const std::array<Tensor, kOutputs> leaves = {LTK_CONTRASTIVE_LEAVES};
  // Not for float16: gradients below its smallest numbers would be gone before a loss scale multiplies them.
  const bool precompute = needs_graph && reduction != kNone && query.scalar_type() != at::kHalf;
  int64_t wanted = with_expected ? kExpected : 0;
  for (size_t k = 0; precompute && k < kGradients; ++k) {
    if (leaves[k].defined() && leaves[k].requires_grad()) wanted |= int64_t(1) << k;
  }
  EightTensors results;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = call_fwd(LTK_CONTRASTIVE_ARGUMENTS, wanted);
  }
  const Tensor loss = std::get<0>(results), stats = std::get<1>(results);
  if (!needs_graph) return {loss, stats};

  auto node = make_node<ContrastiveBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(LTK_CONTRASTIVE_LEAVES));
  for (size_t k = 0; k < kOutputs; ++k) node->types_[k] = leaves[k].defined() ? leaves[k].scalar_type() : at::kFloat;
  node->precomputed_ = precompute;
  if (precompute) {
    const std::array<Tensor, kGradients> grads = {std::get<2>(results), std::get<3>(results), std::get<4>(results),
                                                  std::get<5>(results), std::get<6>(results), std::get<7>(results)};
    for (size_t k = 0; k < kGradients; ++k) node->grads_[k] = SavedVariable(grads[k], false);
  } else {
    const std::array<Tensor, 12> inputs = {
        query,
        value_or_undefined(key),
        temperature,
        value_or_undefined(labels),
        value_or_undefined(key_labels),
        value_or_undefined(positive_index),
        value_or_undefined(allowed),
        value_or_undefined(key_bias),
        value_or_undefined(pair_margin),
        value_or_undefined(sample_weight),
        value_or_undefined(log_normalizer),
        value_or_undefined(extra_positive)};
    for (size_t k = 0; k < inputs.size(); ++k) node->inputs_[k] = SavedVariable(inputs[k], false);
  }
  node->denominator_ = denominator;
  node->reduction_ = reduction;
  node->exclude_self_ = exclude_self;
  node->scale_by_temperature_ = scale_by_temperature;
  const bool weighted = requires_grad(sample_weight);
  if (!precompute || weighted) node->stats_ = SavedVariable(stats, false);
  if (weighted) {
    node->sample_weight_ = SavedVariable(*sample_weight, false);
    if (reduction == kMean) node->loss_ = SavedVariable(loss.detach().clone(), false);
  }
  torch::autograd::set_history(loss, node);
  return {loss, stats};
}

// ------------------------------------------------------- fwd and bwd called with a graph: right once, never silently

template <typename Results, typename... Inputs>
Results mark_differentiable_once(Results results, const Inputs&... inputs) {
  forbid_forward_mode(kName, {inputs...});
  if (torch::autograd::compute_requires_grad(inputs...)) {
    const variable_list outputs = std::apply([](const auto&... x) { return variable_list{x...}; }, results);
    differentiable_once(kName, outputs, torch::autograd::collect_next_edges(inputs...));
  }
  return results;
}

EightTensors contrastive_fwd_autograd(LTK_CONTRASTIVE_PARAMETERS, int64_t grads) {
  EightTensors results;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = call_fwd(LTK_CONTRASTIVE_ARGUMENTS, grads);
  }
  return mark_differentiable_once(std::move(results), LTK_CONTRASTIVE_LEAVES);
}

SixTensors contrastive_bwd_autograd(
    const Tensor& grad_loss, const Tensor& stats, LTK_CONTRASTIVE_PARAMETERS, int64_t grads) {
  SixTensors results;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = call_bwd(grad_loss, stats, LTK_CONTRASTIVE_ARGUMENTS, grads);
  }
  return mark_differentiable_once(std::move(results), grad_loss, LTK_CONTRASTIVE_LEAVES);
}

TORCH_LIBRARY_IMPL(ltkernels, Autograd, m) {
  m.impl("contrastive", &contrastive_autograd);
  m.impl("contrastive_fwd", &contrastive_fwd_autograd);
  m.impl("contrastive_bwd", &contrastive_bwd_autograd);
}

TORCH_LIBRARY_IMPL(ltkernels, CompositeExplicitAutograd, m) { m.impl("contrastive", &contrastive_plain); }

}  // namespace
}  // namespace ltkernels
