// Arguments of the contrastive operators, in one place for schemas, declarations and calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#define LTK_CONTRASTIVE_SCHEMA                                                               \
  "Tensor query, Tensor? key, Tensor temperature, Tensor? labels, Tensor? key_labels, "      \
  "Tensor? positive_index, Tensor? allowed, Tensor? key_bias, Tensor? pair_margin, "         \
  "Tensor? sample_weight, Tensor? log_normalizer, Tensor? extra_positive, int denominator, " \
  "bool exclude_self, bool scale_by_temperature, int reduction"

#define LTK_CONTRASTIVE_PARAMETERS                                                                   \
  const at::Tensor &query, const std::optional<at::Tensor>&key, const at::Tensor &temperature,       \
      const std::optional<at::Tensor>&labels, const std::optional<at::Tensor>&key_labels,            \
      const std::optional<at::Tensor>&positive_index, const std::optional<at::Tensor>&allowed,       \
      const std::optional<at::Tensor>&key_bias, const std::optional<at::Tensor>&pair_margin,         \
      const std::optional<at::Tensor>&sample_weight, const std::optional<at::Tensor>&log_normalizer, \
      const std::optional<at::Tensor>&extra_positive, int64_t denominator, bool exclude_self,        \
      bool scale_by_temperature, int64_t reduction

#define LTK_CONTRASTIVE_ARGUMENTS                                                                             \
  query, key, temperature, labels, key_labels, positive_index, allowed, key_bias, pair_margin, sample_weight, \
      log_normalizer, extra_positive, denominator, exclude_self, scale_by_temperature, reduction
