// The argument list that every operator of margin-adjusted softmax cross-entropy shares.
//
// The dispatcher wants the arguments spelled out in each signature; the macros keep the spelling in one place.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace ltkernels {

using OptionalTensor = std::optional<at::Tensor>;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Which gradients margin_softmax_bwd is asked for.
enum GradBit : int64_t { kGradLogits = 1, kGradClass = 2, kGradPairwise = 4 };

#define LTK_MARGIN_SCHEMA                                                                                    \
  "Tensor logits, Tensor target, Tensor? weight, Tensor? logit_scale, Tensor? logit_bias, "                  \
  "Tensor? target_margin, Tensor? pairwise_margin, Tensor? mask, Tensor? sample_weight, Tensor? row_class, " \
  "Tensor? neighbor_offsets, Tensor? neighbor_classes, float scale, float neighbor_weight, int back_from, "  \
  "int reduction, int ignore_index, float label_smoothing"

#define LTK_MARGIN_TENSOR_PARAMETERS                                                                                   \
  const at::Tensor &logits, const at::Tensor &target, const OptionalTensor &weight, const OptionalTensor &logit_scale, \
      const OptionalTensor &logit_bias, const OptionalTensor &target_margin, const OptionalTensor &pairwise_margin,    \
      const OptionalTensor &mask, const OptionalTensor &sample_weight, const OptionalTensor &row_class,                \
      const OptionalTensor &neighbor_offsets, const OptionalTensor &neighbor_classes, double scale,                    \
      double neighbor_weight, int64_t back_from

#define LTK_MARGIN_PARAMETERS \
  LTK_MARGIN_TENSOR_PARAMETERS, int64_t reduction, int64_t ignore_index, double label_smoothing

#define LTK_MARGIN_TENSOR_ARGUMENTS                                                                                \
  logits, target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class, \
      neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from

#define LTK_MARGIN_ARGUMENTS LTK_MARGIN_TENSOR_ARGUMENTS, reduction, ignore_index, label_smoothing

// Raises ValueError or TypeError, naming the argument, for shapes, dtypes, devices and options that make no sense.
// Reads no tensor values, so that it runs under tracing and without synchronisation.
void check_margin_softmax(LTK_MARGIN_TENSOR_PARAMETERS, int64_t ignore_index, double label_smoothing);

}  // namespace ltkernels
