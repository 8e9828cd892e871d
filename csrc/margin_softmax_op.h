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

// The options: everything but the logits.
#define LTK_MARGIN_OPTION_SCHEMA                                                                                \
  "Tensor target, Tensor? weight, Tensor? logit_scale, Tensor? logit_bias, Tensor? target_margin, "             \
  "Tensor? pairwise_margin, Tensor? mask, Tensor? sample_weight, Tensor? row_class, Tensor? neighbor_offsets, " \
  "Tensor? neighbor_classes, float scale, float neighbor_weight, int back_from, int reduction, "                \
  "int ignore_index, float label_smoothing"

#define LTK_MARGIN_OPTION_PARAMETERS                                                                                \
  const at::Tensor &target, const OptionalTensor &weight, const OptionalTensor &logit_scale,                        \
      const OptionalTensor &logit_bias, const OptionalTensor &target_margin, const OptionalTensor &pairwise_margin, \
      const OptionalTensor &mask, const OptionalTensor &sample_weight, const OptionalTensor &row_class,             \
      const OptionalTensor &neighbor_offsets, const OptionalTensor &neighbor_classes, double scale,                 \
      double neighbor_weight, int64_t back_from, int64_t reduction, int64_t ignore_index, double label_smoothing

#define LTK_MARGIN_OPTION_ARGUMENTS                                                                        \
  target, weight, logit_scale, logit_bias, target_margin, pairwise_margin, mask, sample_weight, row_class, \
      neighbor_offsets, neighbor_classes, scale, neighbor_weight, back_from, reduction, ignore_index, label_smoothing

#define LTK_MARGIN_SCHEMA "Tensor logits, " LTK_MARGIN_OPTION_SCHEMA
#define LTK_MARGIN_PARAMETERS const at::Tensor &logits, LTK_MARGIN_OPTION_PARAMETERS
#define LTK_MARGIN_ARGUMENTS logits, LTK_MARGIN_OPTION_ARGUMENTS

// A linear classifier f = x W^T + bias in front, in chunks of `chunk_rows` rows; -1: as many as fit a fixed memory.
#define LTK_LINEAR_SCHEMA \
  "Tensor input, Tensor linear_weight, Tensor? linear_bias, bool cosine, int chunk_rows, " LTK_MARGIN_OPTION_SCHEMA
#define LTK_LINEAR_PARAMETERS                                                                               \
  const at::Tensor &input, const at::Tensor &linear_weight, const OptionalTensor &linear_bias, bool cosine, \
      int64_t chunk_rows, LTK_MARGIN_OPTION_PARAMETERS
#define LTK_LINEAR_ARGUMENTS input, linear_weight, linear_bias, cosine, chunk_rows, LTK_MARGIN_OPTION_ARGUMENTS

// Raises ValueError or TypeError, naming the argument, for shapes, dtypes, devices and options that make no sense.
// Reads no tensor values, so that it runs under tracing and without synchronisation.
void check_margin_softmax(LTK_MARGIN_PARAMETERS);

}  // namespace ltkernels
