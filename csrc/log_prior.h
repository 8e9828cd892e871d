// tau * log(n_j / sum of n) from class counts n, the additive margin of logit adjustment.
#pragma once

#include <ATen/core/Tensor.h>

namespace ltkernels {

at::Tensor log_prior(const at::Tensor& counts, double tau);

}  // namespace ltkernels
