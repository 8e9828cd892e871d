// The arguments of the margin_softmax operators as the raw pointers that a kernel takes, with the checks of values.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../margin_softmax.h"
#include "../margin_softmax_op.h"

namespace ltkernels {
namespace {

ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return ElementType::kDouble;
    case at::kBFloat16: return ElementType::kBFloat16;
    case at::kHalf: return ElementType::kHalf;
    default: return ElementType::kFloat;
  }
}

template <typename acc_t>
constexpr at::ScalarType kAccType = std::is_same_v<acc_t, double> ? at::kDouble : at::kFloat;

// x as contiguous acc_t; the tensor keeps the memory alive.
template <typename acc_t>
at::Tensor as_vector(const at::Tensor& x) {
  if (x.scalar_type() == kAccType<acc_t> && x.is_contiguous()) return x;  // saves two trips to the dispatcher
  return x.to(kAccType<acc_t>).contiguous();
}

at::Tensor unit_stride_rows(const at::Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) == 1 ? matrix : matrix.contiguous();
}

// Whether `bad` holds for any index, in a loop without branches that the compiler turns into vector code.
template <typename Predicate>
bool any_of_indices(int64_t size, Predicate bad) {
  bool found = false;
  for (int64_t j = 0; j < size; ++j) found |= bad(j);
  return found;
}

// A margin that is NaN or infinite would give a wrong number without a trace: a = inf silently removes classes.
template <typename acc_t>
void check_finite(const char* name, const at::Tensor& x, bool minus_infinity_allowed = false) {
  const acc_t* values = x.const_data_ptr<acc_t>();
  constexpr acc_t kLargest = std::numeric_limits<acc_t>::max();
  auto fits = [&](int64_t j) {
    return (values[j] <= kLargest) & ((values[j] >= -kLargest) | minus_infinity_allowed);  // false for NaN
  };
  if (!any_of_indices(x.numel(), [&](int64_t j) { return !fits(j); })) return;
  for (int64_t j = 0; j < x.numel(); ++j) {
    TORCH_CHECK_VALUE(fits(j), name, ": expected finite values, got ", values[j], " at index ", j);
  }
}

// Owns what the raw pointers of `args` point to.
template <typename acc_t>
struct Prepared {
  MarginSoftmaxArgs<acc_t> args;
  at::Tensor logits, target, scaled, bias, margin, pairwise, weight, sample_weight, mask, row_class, neighbor_offsets,
      neighbor_classes;

  explicit Prepared(LTK_MARGIN_PARAMETERS);

 private:
  void set_affine(const OptionalTensor& logit_scale, const OptionalTensor& logit_bias, double scale);
  void set_target(const at::Tensor& target_, int64_t ignore_index);
  void set_neighbors(
      const OptionalTensor& row_class_, const OptionalTensor& offsets, const OptionalTensor& neighbors, double weight_,
      int64_t back_from);
  void check_silenced() const;
  void set_normalizer(int64_t reduction);
};

template <typename acc_t>
void Prepared<acc_t>::set_affine(const OptionalTensor& logit_scale, const OptionalTensor& logit_bias, double scale) {
  args.scale = args.raw_scale = static_cast<acc_t>(scale);
  if (logit_bias.has_value()) {
    bias = as_vector<acc_t>(*logit_bias);
    check_finite<acc_t>("logit_bias", bias, /*minus_infinity_allowed=*/true);
  }
  if (logit_scale.has_value()) {
    const at::Tensor a = as_vector<acc_t>(*logit_scale);
    check_finite<acc_t>("logit_scale", a);
    if (a.dim() == 0) {
      args.scale *= *a.const_data_ptr<acc_t>();
    } else {
      scaled = a.mul(scale);
      args.scaled = scaled.const_data_ptr<acc_t>();
      if (!bias.defined()) bias = at::zeros_like(a);
    }
  }
  if (bias.defined()) args.bias = bias.const_data_ptr<acc_t>();
}

template <typename acc_t>
void Prepared<acc_t>::set_target(const at::Tensor& target_, int64_t ignore_index) {
  args.ignore_index = ignore_index;
  if (target_.is_floating_point()) {
    target = unit_stride_rows(target_);
    args.probability = target.const_data_ptr();
    args.probability_stride = target.stride(0);
    args.probability_type = element_type(target.scalar_type());
    return;
  }
  target = target_.scalar_type() == at::kLong && target_.is_contiguous() ? target_ : target_.to(at::kLong).contiguous();
  args.index = target.const_data_ptr<int64_t>();
  auto outside = [&](int64_t i) {
    const int64_t y = args.index[i];
    return (static_cast<uint64_t>(y) >= static_cast<uint64_t>(args.classes)) & (y != ignore_index);
  };
  if (!any_of_indices(args.rows, outside)) return;
  for (int64_t i = 0; i < args.rows; ++i) {
    const int64_t y = args.index[i];
    TORCH_CHECK_INDEX(
        !outside(i), "target: expected class indices in [0, ", args.classes, ") or ignore_index=", ignore_index,
        ", got ", y, " at row ", i);
  }
}

// The map is a user's data: a number out of range would be a read or write outside of memory.
template <typename acc_t>
void Prepared<acc_t>::set_neighbors(
    const OptionalTensor& row_class_, const OptionalTensor& offsets, const OptionalTensor& neighbors, double weight_,
    int64_t back_from) {
  if (!offsets.has_value()) return;
  TORCH_CHECK_VALUE(
      neighbors.has_value() && (!target.is_floating_point() || row_class_.has_value()) &&
          offsets->numel() == args.classes + 1,
      "neighbors: expected offsets of ", args.classes, " classes, neighbor_classes and, with probabilities, row_class");
  neighbor_offsets = offsets->contiguous();
  neighbor_classes = neighbors->contiguous();
  args.neighbor_offsets = neighbor_offsets.const_data_ptr<int32_t>();
  args.neighbor_classes = neighbor_classes.const_data_ptr<int32_t>();
  args.log_neighbor_weight = static_cast<acc_t>(std::log(weight_));
  if (back_from >= 0) args.back_from = back_from;
  if (row_class_.has_value()) {
    row_class = row_class_->to(at::kLong).contiguous();
    args.row_class = row_class.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < args.rows; ++i) {
      const int64_t y = args.row_class[i];
      TORCH_CHECK_INDEX(
          y >= 0 && y < args.classes, "row_class: expected class indices in [0, ", args.classes, "), got ", y,
          " at row ", i);
    }
  }
  check_silenced();
}

// All of the map, whatever the rows use, in the width of its numbers: for a small batch this is a good part of the
// time.
template <typename acc_t>
void Prepared<acc_t>::check_silenced() const {
  const int64_t size = neighbor_classes.numel();
  const int32_t* offsets = args.neighbor_offsets;
  const int32_t* neighbors = args.neighbor_classes;
  const int32_t largest = static_cast<int32_t>(std::min<int64_t>(args.classes - 1, INT32_MAX));
  TORCH_CHECK_VALUE(
      offsets[0] >= 0 && offsets[args.classes] <= size &&
          !any_of_indices(args.classes, [&](int64_t k) { return offsets[k + 1] < offsets[k]; }),
      "neighbor_offsets: expected numbers from 0 to ", size, " in ascending order");
  TORCH_CHECK_VALUE(
      !any_of_indices(size, [&](int64_t e) { return (neighbors[e] < 0) | (neighbors[e] > largest); }),
      "neighbor_classes: expected class numbers in [0, ", args.classes, ")");
}

// Z = sum of u_i w[y_i] over kept rows for indices, of u_i for probabilities.
template <typename acc_t>
void Prepared<acc_t>::set_normalizer(int64_t reduction) {
  if (reduction != kMean) return;
  if (args.sample_weight == nullptr && args.weight == nullptr) {
    int64_t kept = args.rows;
    for (int64_t i = 0; args.index != nullptr && i < args.rows; ++i) kept -= args.index[i] == args.ignore_index;
    args.inverse_normalizer = static_cast<acc_t>(1 / static_cast<double>(kept));
    return;
  }
  double total = 0;
  for (int64_t i = 0; i < args.rows; ++i) {
    if (args.index != nullptr && args.index[i] == args.ignore_index) continue;
    const double u = args.sample_weight == nullptr ? 1 : args.sample_weight[i];
    total += args.index != nullptr && args.weight != nullptr ? u * args.weight[args.index[i]] : u;
  }
  args.inverse_normalizer = static_cast<acc_t>(1 / total);
}

template <typename acc_t>
Prepared<acc_t>::Prepared(LTK_MARGIN_PARAMETERS) {
  args.rows = logits.size(0);
  args.classes = logits.size(1);
  // The public function has said more of it; these operators can be called without.
  const auto has = [](const OptionalTensor& x, int64_t size) { return !x.has_value() || x->numel() == size; };
  const int64_t matrix = args.rows * args.classes;
  TORCH_CHECK_VALUE(
      args.classes > 0 && target.numel() == (target.is_floating_point() ? matrix : args.rows) &&
          has(sample_weight, args.rows) && has(row_class, args.rows) && has(weight, args.classes) &&
          has(logit_bias, args.classes) && has(target_margin, args.classes) &&
          has(pairwise_margin, args.classes * args.classes) &&
          (has(logit_scale, args.classes) || logit_scale->dim() == 0) &&
          (has(mask, matrix) || (mask->dim() == 1 && has(mask, args.classes))),
      "margin_softmax: expected operands of ", args.rows, " rows and ", args.classes, " classes, at least one");
  this->logits = unit_stride_rows(logits);
  args.logits = this->logits.const_data_ptr();
  args.logits_stride = this->logits.stride(0);
  args.logits_type = element_type(logits.scalar_type());
  args.smoothing = static_cast<acc_t>(label_smoothing);
  set_affine(logit_scale, logit_bias, scale);
  if (target_margin.has_value()) {
    margin = as_vector<acc_t>(*target_margin);
    check_finite<acc_t>("target_margin", margin);
    if (scale != 1) margin = margin.mul(scale);
    args.margin = margin.const_data_ptr<acc_t>();
  }
  if (pairwise_margin.has_value()) {
    pairwise = as_vector<acc_t>(*pairwise_margin);
    args.pairwise = pairwise.const_data_ptr<acc_t>();
  }
  if (weight.has_value()) {
    this->weight = as_vector<acc_t>(*weight);
    args.weight = this->weight.const_data_ptr<acc_t>();
  }
  if (sample_weight.has_value()) {
    this->sample_weight = as_vector<acc_t>(*sample_weight);
    args.sample_weight = this->sample_weight.const_data_ptr<acc_t>();
  }
  if (mask.has_value()) {
    this->mask = mask->dim() == 2 ? unit_stride_rows(*mask) : mask->contiguous();
    args.mask = this->mask.const_data_ptr<bool>();
    args.mask_stride = mask->dim() == 2 ? this->mask.stride(0) : 0;
  }
  set_target(target, ignore_index);
  set_neighbors(row_class, neighbor_offsets, neighbor_classes, neighbor_weight, back_from);
  set_normalizer(reduction);
}

}  // namespace
}  // namespace ltkernels
