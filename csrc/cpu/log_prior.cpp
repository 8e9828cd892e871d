// tau * log(n_j / sum of n) from class counts n, the additive margin of logit adjustment.
//
// Computed at every call of a loss that takes counts, so that nobody has to keep a vector in step with them. As six
// operations of Python this cost a fifth of the loss itself at 512 rows.
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "../margin_softmax.h"
#include "new_tensors.h"

namespace ltkernels {
namespace {

template <typename T>
bool is_count(T n) {
  return (n > 0) & (n <= std::numeric_limits<T>::max());
}

// In double, and in the order of the classes modulo kParts: partial sums that a compiler keeps in vector registers.
template <typename T>
double checked_total(const at::Tensor& counts) {
  const T* n = counts.const_data_ptr<T>();
  const int64_t size = counts.numel();
  constexpr int64_t kParts = 8;
  double parts[kParts] = {};
  int valid[kParts] = {1, 1, 1, 1, 1, 1, 1, 1};
  int64_t j = 0;
  for (; j + kParts <= size; j += kParts) {
    for (int64_t k = 0; k < kParts; ++k) {
      parts[k] += n[j + k];
      valid[k] &= is_count(n[j + k]);
    }
  }
  for (; j < size; ++j) {
    parts[0] += n[j];
    valid[0] &= is_count(n[j]);
  }
  double total = 0;
  int all_valid = 1;
  for (int64_t k = 0; k < kParts; ++k) {
    total += parts[k];
    all_valid &= valid[k];
  }
  for (j = 0; all_valid == 0 && j < size; ++j) {
    TORCH_CHECK_VALUE(is_count(n[j]), "prior_counts: expected finite counts above 0, got ", n[j], " for class ", j);
  }
  return total;
}

template <typename T>
at::Tensor plain_log_prior(const at::Tensor& counts, double total, double tau) {
  at::Tensor prior = empty_tensor(counts.sizes(), counts.scalar_type());
  margin_softmax_kernels<T>().log_prior(
      counts.const_data_ptr<T>(), counts.numel(), static_cast<T>(std::log(total)), static_cast<T>(tau),
      prior.mutable_data_ptr<T>());
  return prior;
}

at::Tensor log_prior(const at::Tensor& counts, double tau) {
  TORCH_CHECK_VALUE(
      counts.dim() == 1 && !counts.is_complex() && counts.scalar_type() != at::kBool,
      "prior_counts: expected real numbers of shape (C,), got ", counts.scalar_type(), " of shape ", counts.sizes());
  const at::Tensor n =
      counts.to(counts.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous().resolve_neg();
  const auto generic = [&] { return (n.log() - n.sum().log()) * tau; };
  if (!n.is_cpu() || at::isTensorSubclassLike(n)) return generic();  // values are out of reach
  const bool is_double = n.scalar_type() == at::kDouble;
  const double total = is_double ? checked_total<double>(n) : checked_total<float>(n);
  if (n.requires_grad() || torch::autograd::isFwGradDefined(n)) return generic();
  return is_double ? plain_log_prior<double>(n, total, tau) : plain_log_prior<float>(n, total, tau);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ltkernels, m) {
  // Composite: every transform sees the operations that it is made of.
  m.def("log_prior(Tensor prior_counts, float tau) -> Tensor", &log_prior);
}

}  // namespace ltkernels
