// CPU implementation of the margin_softmax operators: arguments -> raw pointers -> row blocks in parallel.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "../kernel_calls.h"
#include "../margin_softmax.h"
#include "../margin_softmax_op.h"
#include "margin_softmax_prepared.h"
#include "new_tensors.h"

namespace ltkernels {
namespace {

// ------------------------------------------------------------------------------------------------ kernel selection

struct Variant {
  MarginSoftmaxKernels<float> single;
  MarginSoftmaxKernels<double> wide;
  KernelCounter forward, forward_gradient, backward;

  Variant(const MarginSoftmaxKernels<float>& f, const MarginSoftmaxKernels<double>& d, const std::string& name)
      : single(f),
        wide(d),
        forward("cpu." + name + ".margin_softmax.forward"),
        forward_gradient("cpu." + name + ".margin_softmax.forward_gradient"),
        backward("cpu." + name + ".margin_softmax.backward") {}

  template <typename acc_t>
  const MarginSoftmaxKernels<acc_t>& kernels() const {
    if constexpr (std::is_same_v<acc_t, double>) return wide;
    else return single;
  }
};

// The best variant this processor runs; ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers it, as for torch itself.
Variant& variant() {
  static const std::string capability = at::get_cpu_capability();
#if defined(__x86_64__)
  if (capability == "AVX512") {
    static Variant avx512(AVX512::margin_softmax_float, AVX512::margin_softmax_double, "avx512");
    return avx512;
  }
  if (capability == "AVX2") {
    static Variant avx2(AVX2::margin_softmax_float, AVX2::margin_softmax_double, "avx2");
    return avx2;
  }
#endif
  static Variant baseline(DEFAULT::margin_softmax_float, DEFAULT::margin_softmax_double, "default");
  return baseline;
}

// --------------------------------------------------------------------------------------------------------- operators

template <typename acc_t>
std::unique_ptr<acc_t[]> make_scratch(const MarginSoftmaxKernels<acc_t>& kernels, int64_t classes) {
  return std::unique_ptr<acc_t[]>(new acc_t[kernels.scratch_size(classes)]);
}

int64_t rows_per_task(int64_t classes) {
  constexpr int64_t kElementsPerTask = 16384;  // some 10 us: a second thread for less costs what it saves, and waits
  return std::max<int64_t>(1, kElementsPerTask / classes);
}

// Sum of u_i r_i in row order: the same bits for any number of threads.
template <typename acc_t>
double weighted_sum(const MarginSoftmaxArgs<acc_t>& args) {
  double total = 0;
  for (int64_t i = 0; i < args.rows; ++i) {
    if (args.index != nullptr && args.index[i] == args.ignore_index) continue;
    const double u = args.sample_weight == nullptr ? 1 : args.sample_weight[i];
    total += u * args.row_loss[i];
  }
  return total;
}

template <typename acc_t>
at::Tensor reduce_loss(const MarginSoftmaxArgs<acc_t>& args, int64_t reduction) {
  if (reduction == kNone) {
    at::Tensor loss = empty_tensor({args.rows}, kAccType<acc_t>);
    acc_t* out = loss.mutable_data_ptr<acc_t>();
    for (int64_t i = 0; i < args.rows; ++i) {
      const bool weighted =
          args.sample_weight != nullptr && !(args.index != nullptr && args.index[i] == args.ignore_index);
      out[i] = weighted ? args.sample_weight[i] * args.row_loss[i] : args.row_loss[i];
    }
    return loss;
  }
  at::Tensor loss = empty_tensor({}, kAccType<acc_t>);
  const double total = weighted_sum(args);
  *loss.mutable_data_ptr<acc_t>() = static_cast<acc_t>(reduction == kMean ? total * args.inverse_normalizer : total);
  return loss;
}

template <typename acc_t>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    LTK_MARGIN_PARAMETERS, bool with_grad, const at::Tensor& grad_memory = {}) {
  Prepared<acc_t> prepared(LTK_MARGIN_ARGUMENTS);
  auto& args = prepared.args;
  const at::ScalarType type = logits.scalar_type();
  at::Tensor stats = empty_tensor({3, args.rows}, kAccType<acc_t>);
  args.row_max = stats.mutable_data_ptr<acc_t>();
  args.row_logsum = args.row_max + args.rows;
  args.row_loss = args.row_logsum + args.rows;
  at::Tensor grad = grad_memory;
  if (!grad.defined()) grad = with_grad ? empty_gradient(args.rows, args.classes, type) : empty_tensor({0}, type);
  if (with_grad) {
    args.grad = grad.mutable_data_ptr();
    args.grad_stride = grad.stride(0);
  }

  const auto& kernels = variant().template kernels<acc_t>();
  at::parallel_for(0, args.rows, rows_per_task(args.classes), [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch(kernels, args.classes);
    kernels.forward(args, begin, end, scratch.get());
  });
  (with_grad ? variant().forward_gradient : variant().forward).add();
  // C x C values are too many to check at every call; a bad one that was used shows as NaN.
  const auto is_nan = [&](int64_t i) { return std::isnan(args.row_loss[i]); };
  if (args.pairwise != nullptr && any_of_indices(args.rows, is_nan)) {
    check_finite<acc_t>("pairwise_margin", prepared.pairwise.flatten(), /*minus_infinity_allowed=*/true);
  }
  return {reduce_loss(args, reduction), stats, grad};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> margin_softmax_fwd(LTK_MARGIN_PARAMETERS, bool with_grad) {
  return logits.scalar_type() == at::kDouble ? forward<double>(LTK_MARGIN_ARGUMENTS, with_grad)
                                             : forward<float>(LTK_MARGIN_ARGUMENTS, with_grad);
}

// A row is in the scratch before its gradient is written, so that both may lie in the same memory.
std::tuple<at::Tensor, at::Tensor> margin_softmax_fwd_(LTK_MARGIN_PARAMETERS) {
  const bool rows_apart = logits.size(0) < 2 || logits.stride(0) >= logits.size(1);
  TORCH_CHECK_VALUE(
      rows_apart && (logits.stride(1) == 1 || logits.size(1) == 1),
      "logits: expected rows of unit stride that do not overlap, to write the gradient to, got strides ",
      logits.strides());
  const auto [loss, stats, grad] = logits.scalar_type() == at::kDouble
                                       ? forward<double>(LTK_MARGIN_ARGUMENTS, /*with_grad=*/true, logits)
                                       : forward<float>(LTK_MARGIN_ARGUMENTS, /*with_grad=*/true, logits);
  return {loss, stats};
}

// Row blocks of the column sums: their number depends on the shape alone, and they are added in order.
template <typename acc_t>
void run_backward(
    const MarginSoftmaxKernels<acc_t>& kernels, const MarginSoftmaxArgs<acc_t>& args, at::Tensor& class_grad) {
  if (!class_grad.defined()) {
    at::parallel_for(0, args.rows, rows_per_task(args.classes), [&](int64_t begin, int64_t end) {
      const auto scratch = make_scratch(kernels, args.classes);
      kernels.backward(args, begin, end, scratch.get(), nullptr);
    });
    return;
  }
  const int64_t blocks = std::clamp<int64_t>(args.rows / 64, 1, 32);
  at::Tensor partial = at::zeros({blocks, 3, args.classes}, class_grad.options());
  acc_t* sums = partial.mutable_data_ptr<acc_t>();
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    const auto scratch = make_scratch(kernels, args.classes);
    for (int64_t k = first; k < last; ++k) {
      kernels.backward(
          args, args.rows * k / blocks, args.rows * (k + 1) / blocks, scratch.get(), sums + k * 3 * args.classes);
    }
  });
  acc_t* out = class_grad.mutable_data_ptr<acc_t>();
  for (int64_t j = 0; j < 3 * args.classes; ++j) {
    acc_t total = 0;
    for (int64_t k = 0; k < blocks; ++k) total += sums[k * 3 * args.classes + j];
    out[j] = total;
  }
}

// Rows of a class are added in their order by one thread: rows are sorted by class, whole classes go to a task.
template <typename acc_t>
at::Tensor run_pairwise(
    const MarginSoftmaxKernels<acc_t>& kernels, const MarginSoftmaxArgs<acc_t>& args, const at::Tensor& target) {
  at::Tensor grad = at::zeros({args.classes, args.classes}, kAccType<acc_t>);
  const at::Tensor order = target.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const int64_t* rows = order.const_data_ptr<int64_t>();
  acc_t* out = grad.mutable_data_ptr<acc_t>();
  auto first_row_of = [&](int64_t y) {
    return std::lower_bound(rows, rows + args.rows, y, [&](int64_t row, int64_t c) { return args.index[row] < c; }) -
           rows;
  };
  at::parallel_for(0, args.classes, 1, [&](int64_t first, int64_t last) {
    const auto scratch = make_scratch(kernels, args.classes);
    kernels.pairwise(args, rows, first_row_of(first), first_row_of(last), scratch.get(), out);
  });
  return grad;
}

template <typename acc_t>
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_loss, const OptionalTensor& grad_lse, const at::Tensor& stats, LTK_MARGIN_PARAMETERS,
    int64_t grads) {
  Prepared<acc_t> prepared(LTK_MARGIN_ARGUMENTS);
  auto& args = prepared.args;
  const at::ScalarType type = logits.scalar_type();
  TORCH_CHECK_VALUE(
      stats.numel() == 3 * args.rows && (grad_loss.dim() == 0 || grad_loss.numel() == args.rows) &&
          (!grad_lse.has_value() || grad_lse->numel() == args.rows),
      "margin_softmax_bwd: expected statistics and upstream gradients of ", args.rows, " rows");
  const at::Tensor statistics = stats.contiguous();
  acc_t* statistic = const_cast<acc_t*>(statistics.const_data_ptr<acc_t>());  // only read by a backward pass
  args.row_max = statistic;
  args.row_logsum = statistic + args.rows;
  const at::Tensor upstream = as_vector<acc_t>(grad_loss);
  args.grad_loss = upstream.const_data_ptr<acc_t>();
  args.grad_loss_stride = upstream.dim() == 0 ? 0 : 1;
  const at::Tensor upstream_lse = grad_lse.has_value() ? as_vector<acc_t>(*grad_lse) : at::Tensor();
  if (grad_lse.has_value()) args.grad_lse = upstream_lse.const_data_ptr<acc_t>();

  at::Tensor grad = grads & kGradLogits ? empty_gradient(args.rows, args.classes, type) : empty_tensor({0}, type);
  if (grads & kGradLogits) {
    args.grad = grad.mutable_data_ptr();
    args.grad_stride = grad.stride(0);
  }
  at::Tensor class_grad;
  if (grads & kGradClass) class_grad = empty_tensor({3, args.classes}, kAccType<acc_t>);
  const auto& kernels = variant().template kernels<acc_t>();
  if (grads & (kGradLogits | kGradClass)) run_backward(kernels, args, class_grad);
  at::Tensor pairwise_grad =
      grads & kGradPairwise ? run_pairwise(kernels, args, prepared.target) : empty_tensor({0}, kAccType<acc_t>);
  variant().backward.add();
  return {grad, class_grad.defined() ? class_grad : empty_tensor({0}, kAccType<acc_t>), pairwise_grad};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> margin_softmax_bwd(
    const at::Tensor& grad_loss, const OptionalTensor& grad_lse, const at::Tensor& stats, LTK_MARGIN_PARAMETERS,
    int64_t grads) {
  return logits.scalar_type() == at::kDouble ? backward<double>(grad_loss, grad_lse, stats, LTK_MARGIN_ARGUMENTS, grads)
                                             : backward<float>(grad_loss, grad_lse, stats, LTK_MARGIN_ARGUMENTS, grads);
}

// grad *= grad_output in place. An upstream gradient of 1, the usual case, touches nothing.
void margin_softmax_scale_(at::Tensor grad, const at::Tensor& grad_output) {
  const bool is_float = grad_output.scalar_type() == at::kFloat && grad_output.numel() == 1;
  const double factor = is_float ? *grad_output.const_data_ptr<float>() : grad_output.item<double>();
  if (factor == 1) return;
  if (std::isfinite(factor)) {
    grad.mul_(grad_output);
  } else {
    // Removed classes and ignored rows stay at 0. In pieces: the gradient may be all that fits the memory.
    const at::Tensor flat = grad.is_contiguous() ? grad.view({-1}) : grad;
    for (at::Tensor& part : flat.split(int64_t(1) << 18)) {
      const at::Tensor zero = part.eq(0);
      part.mul_(grad_output).masked_fill_(zero, 0);
    }
  }
}

TORCH_LIBRARY_IMPL(ltkernels, CPU, m) {
  m.impl("margin_softmax_fwd", &margin_softmax_fwd);
  m.impl("margin_softmax_fwd_", &margin_softmax_fwd_);
  m.impl("margin_softmax_bwd", &margin_softmax_bwd);
  m.impl("margin_softmax_scale_", &margin_softmax_scale_);
}

}  // namespace

template <>
const MarginSoftmaxKernels<float>& margin_softmax_kernels<float>() {
  return variant().single;
}
template <>
const MarginSoftmaxKernels<double>& margin_softmax_kernels<double>() {
  return variant().wide;
}

}  // namespace ltkernels
