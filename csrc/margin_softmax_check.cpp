// Argument checks of margin-adjusted softmax cross-entropy: the same errors on every backend.
#include <ATen/core/grad_mode.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>
#include <string>

#include "margin_softmax_op.h"

namespace ltkernels {
namespace {

bool is_supported_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

void check_device(const char* name, const at::Tensor& x, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(
      x.device() == logits.device(), name, ": expected a tensor on ", logits.device(), " like input, got one on ",
      x.device());
}

// A sparse, MKL-DNN or nested tensor, which no kernel reads.
void check_layout(const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(
      x.layout() == at::kStrided && !x.is_nested(), name, ": expected a dense tensor (torch.strided), got ",
      x.is_nested() ? "a nested tensor" : c10::str("layout ", x.layout()));
}

void check_layout(const char* name, const OptionalTensor& x) {
  if (x.has_value()) check_layout(name, *x);
}

// A floating vector with one entry for each of `size`, or 0-d where that is allowed.
void check_vector(
    const char* name, const OptionalTensor& x, const at::Tensor& logits, int64_t dimension, bool scalar_allowed) {
  if (!x.has_value()) return;
  TORCH_CHECK_TYPE(is_supported_float(x->scalar_type()), name, ": expected a floating dtype, got ", x->scalar_type());
  check_device(name, *x, logits);
  const bool fits =
      (x->dim() == 1 && x->sym_size(0) == logits.sym_size(dimension)) || (scalar_allowed && x->dim() == 0);
  TORCH_CHECK_VALUE(
      fits, name, ": expected shape (", logits.sym_size(dimension), scalar_allowed ? ",) or ()" : ",)",
      " for logits of shape ", logits.sym_sizes(), ", got ", x->sym_sizes());
}

void check_logits(const at::Tensor& logits) {
  TORCH_CHECK_TYPE(
      is_supported_float(logits.scalar_type()), "input: expected float16, bfloat16, float32 or float64, got ",
      logits.scalar_type());
  TORCH_CHECK_VALUE(logits.dim() == 2, "input: expected logits of shape (N, C), got ", logits.sym_sizes());
  TORCH_CHECK_VALUE(logits.sym_size(1) > 0, "input: expected at least one class, got shape ", logits.sym_sizes());
}

void check_target(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index, bool pairwise) {
  check_device("target", target, logits);
  if (!target.is_floating_point()) {
    TORCH_CHECK_TYPE(
        at::isIntegralType(target.scalar_type(), /*includeBool=*/false),
        "target: expected an integer dtype (class indices) or a floating dtype (probabilities), got ",
        target.scalar_type());
    TORCH_CHECK_VALUE(
        target.dim() == 1 && target.sym_size(0) == logits.sym_size(0), "target: expected class indices of shape (",
        logits.sym_size(0), ",) for logits of shape ", logits.sym_sizes(), ", got ", target.sym_sizes());
    return;
  }
  TORCH_CHECK_TYPE(
      is_supported_float(target.scalar_type()), "target: expected float16, bfloat16, float32 or float64, got ",
      target.scalar_type());
  TORCH_CHECK_VALUE(
      target.dim() == 2 && target.sym_size(0) == logits.sym_size(0) && target.sym_size(1) == logits.sym_size(1),
      "target: expected probabilities in the shape of the logits, ", logits.sym_sizes(), ", got ", target.sym_sizes());
  TORCH_CHECK_VALUE(!pairwise, "pairwise_margin: expected class indices as target, got probabilities");
  TORCH_CHECK_VALUE(
      ignore_index < 0,
      "ignore_index: expected class indices as target, got probabilities with ignore_index=", ignore_index);
  TORCH_CHECK_VALUE(
      !(at::GradMode::is_enabled() && target.requires_grad()),
      "target: probabilities that require grad are not supported; pass target.detach()");
}

void check_pairwise(const OptionalTensor& pairwise, const at::Tensor& logits) {
  if (!pairwise.has_value()) return;
  const auto classes = logits.sym_size(1);
  TORCH_CHECK_TYPE(
      is_supported_float(pairwise->scalar_type()), "pairwise_margin: expected a floating dtype, got ",
      pairwise->scalar_type());
  check_device("pairwise_margin", *pairwise, logits);
  TORCH_CHECK_VALUE(
      pairwise->dim() == 2 && pairwise->sym_size(0) == classes && pairwise->sym_size(1) == classes,
      "pairwise_margin: expected shape (", classes, ", ", classes, "), got ", pairwise->sym_sizes());
}

void check_mask(const OptionalTensor& mask, const at::Tensor& logits) {
  if (!mask.has_value()) return;
  const auto rows = logits.sym_size(0);
  const auto classes = logits.sym_size(1);
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask: expected dtype bool, got ", mask->scalar_type());
  check_device("mask", *mask, logits);
  const bool shared = mask->dim() == 1 && mask->sym_size(0) == classes;
  TORCH_CHECK_VALUE(
      shared || (mask->dim() == 2 && mask->sym_size(0) == rows && mask->sym_size(1) == classes),
      "mask: expected shape (", classes, ",) or (", rows, ", ", classes, "), got ", mask->sym_sizes());
}

// Also what rounds to 0 or infinity in the type that the kernels compute in: such a scale would be lost silently.
void check_scale(double scale, at::ScalarType logits) {
  const bool wide = logits == at::kDouble;
  const double rounded = wide ? scale : static_cast<double>(static_cast<float>(scale));
  TORCH_CHECK_VALUE(
      std::isfinite(rounded) && rounded > 0, "scale: expected a finite number above 0",
      std::isfinite(scale) && scale > 0 ? " in float32" : "", ", got ", scale);
}

void check_class_numbers(const char* name, const at::Tensor& x, const at::Tensor& logits) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kInt, name, ": expected dtype int32, got ", x.scalar_type());
  check_device(name, x, logits);
}

void check_neighbors(LTK_MARGIN_PARAMETERS) {
  TORCH_CHECK_VALUE(
      neighbor_offsets.has_value() == neighbor_classes.has_value(),
      "neighbor_offsets, neighbor_classes: expected both or neither");
  if (row_class.has_value()) {
    check_device("row_class", *row_class, logits);
    TORCH_CHECK_TYPE(
        at::isIntegralType(row_class->scalar_type(), /*includeBool=*/false),
        "row_class: expected an integer dtype, got ", row_class->scalar_type());
    TORCH_CHECK_VALUE(
        row_class->dim() == 1 && row_class->sym_size(0) == logits.sym_size(0), "row_class: expected shape (",
        logits.sym_size(0), ",) for logits of shape ", logits.sym_sizes(), ", got ", row_class->sym_sizes());
    TORCH_CHECK_VALUE(
        neighbor_offsets.has_value() && target.is_floating_point(),
        "row_class: expected with neighbors and probabilities as target only; class indices pick their own neighbors");
  }
  if (!neighbor_offsets.has_value()) return;
  check_class_numbers("neighbor_offsets", *neighbor_offsets, logits);
  check_class_numbers("neighbor_classes", *neighbor_classes, logits);
  TORCH_CHECK_VALUE(
      neighbor_offsets->dim() == 1 && neighbor_offsets->sym_size(0) == logits.sym_size(1) + 1,
      "neighbors: expected a map of the ", logits.sym_size(1), " classes of the logits, got one of ",
      neighbor_offsets->sym_numel() - 1);
  TORCH_CHECK_VALUE(
      neighbor_classes->dim() == 1, "neighbor_classes: expected a vector, got shape ", neighbor_classes->sym_sizes());
  TORCH_CHECK_VALUE(
      !target.is_floating_point() || row_class.has_value(),
      "row_class: expected with probabilities as target: the class of each row, which picks its neighbors");
  TORCH_CHECK_VALUE(
      neighbor_weight >= 0 && neighbor_weight <= 1, "neighbor_weight: expected a number in [0, 1], got ",
      neighbor_weight);
  TORCH_CHECK_VALUE(
      back_from < 0 || neighbor_weight == 0, "mode 'back': expected neighbor_weight=0, got ", neighbor_weight);
}

void check_layouts(LTK_MARGIN_PARAMETERS) {
  check_layout("input", logits);
  check_layout("target", target);
  check_layout("weight", weight);
  check_layout("logit_scale", logit_scale);
  check_layout("logit_bias", logit_bias);
  check_layout("target_margin", target_margin);
  check_layout("pairwise_margin", pairwise_margin);
  check_layout("mask", mask);
  check_layout("sample_weight", sample_weight);
  check_layout("row_class", row_class);
}

}  // namespace

void check_margin_softmax(LTK_MARGIN_PARAMETERS) {
  check_layouts(LTK_MARGIN_ARGUMENTS);
  check_logits(logits);
  check_target(logits, target, ignore_index, pairwise_margin.has_value());
  check_vector("weight", weight, logits, 1, false);
  check_vector("logit_scale", logit_scale, logits, 1, true);
  check_vector("logit_bias", logit_bias, logits, 1, false);
  check_vector("target_margin", target_margin, logits, 1, false);
  check_vector("sample_weight", sample_weight, logits, 0, false);
  check_pairwise(pairwise_margin, logits);
  check_mask(mask, logits);
  check_neighbors(LTK_MARGIN_ARGUMENTS);
  check_scale(scale, logits.scalar_type());
  TORCH_CHECK_VALUE(
      label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing: expected a number in [0, 1], got ",
      label_smoothing);
  TORCH_CHECK_VALUE(
      !(at::GradMode::is_enabled() && weight.has_value() && weight->requires_grad()),
      "weight: gradients to class weights are not supported; pass weight.detach()");
}

}  // namespace ltkernels
