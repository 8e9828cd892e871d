// CPU implementation of the margin_softmax operators: arguments -> raw pointers -> row blocks in parallel.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "../kernel_calls.h"
#include "../margin_softmax.h"
#include "../margin_softmax_op.h"
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

// -------------------------------------------------------------------------------------------------------- arguments

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
  neighbor_offsets = offsets->contiguous();
  neighbor_classes = neighbors->contiguous();
  args.neighbor_offsets = neighbor_offsets.const_data_ptr<int32_t>();
  args.neighbor_classes = neighbor_classes.const_data_ptr<int32_t>();
  args.log_neighbor_weight = static_cast<acc_t>(std::log(weight_));
  if (back_from >= 0) args.back_from = back_from;
  const int64_t size = neighbor_classes.numel();
  const auto misplaced = [&](int64_t k) {
    const int64_t begin = args.neighbor_offsets[k], end = args.neighbor_offsets[k + 1];
    return (begin < 0) | (end < begin) | (end > size);
  };
  const auto unknown = [&](int64_t e) {
    return static_cast<uint64_t>(int64_t(args.neighbor_classes[e])) >= static_cast<uint64_t>(args.classes);
  };
  TORCH_CHECK_VALUE(
      !any_of_indices(args.classes, misplaced), "neighbor_offsets: expected numbers from 0 to ", size,
      " in ascending order");
  TORCH_CHECK_VALUE(
      !any_of_indices(size, unknown), "neighbor_classes: expected class numbers in [0, ", args.classes, ")");
  if (!row_class_.has_value()) return;
  row_class = row_class_->to(at::kLong).contiguous();
  args.row_class = row_class.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < args.rows; ++i) {
    const int64_t y = args.row_class[i];
    TORCH_CHECK_INDEX(
        y >= 0 && y < args.classes, "row_class: expected class indices in [0, ", args.classes, "), got ", y, " at row ",
        i);
  }
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

// --------------------------------------------------------------------------------------------------------- operators

template <typename acc_t>
std::unique_ptr<acc_t[]> make_scratch(const MarginSoftmaxKernels<acc_t>& kernels, int64_t classes) {
  return std::unique_ptr<acc_t[]>(new acc_t[kernels.scratch_size(classes)]);
}

int64_t rows_per_task(int64_t classes) {
  constexpr int64_t kElementsPerTask = 4096;  // below this a second thread costs more than it saves
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
  if (with_grad) args.grad = grad.mutable_data_ptr();

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
  TORCH_CHECK_VALUE(logits.is_contiguous(), "logits: expected contiguous memory to write the gradient to");
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
  if (grads & kGradLogits) args.grad = grad.mutable_data_ptr();
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
  if (factor != 1) grad.mul_(grad_output);
}

TORCH_LIBRARY_IMPL(ltkernels, CPU, m) {
  m.impl("margin_softmax_fwd", &margin_softmax_fwd);
  m.impl("margin_softmax_fwd_", &margin_softmax_fwd_);
  m.impl("margin_softmax_bwd", &margin_softmax_bwd);
  m.impl("margin_softmax_scale_", &margin_softmax_scale_);
}

}  // namespace
}  // namespace ltkernels
