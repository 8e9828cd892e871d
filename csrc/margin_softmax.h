// Parameters of the row operation: margin-adjusted softmax cross-entropy over rows of logits.
//
//   v[j]  = s * (a[j] * f[j] - m[j] * t[j]) + b[j] + Delta[y, j] + log(lambda) [j in S(y)]
//           (-inf where mask[j] is false, and in S(y) if lambda = 0: such t'[j] are 0)
//   t'[j] = w[j] * ((1 - eps) * t[j] + eps / |allowed|)                    T = sum_j t'[j]
//   r     = T * logsumexp_j v[j] - sum_j t'[j] * v[j]                      loss = u * r
//   G[j]  = (c * T + e) * softmax_j(v) - c * t'[j]                         dloss/df[j] = s * a[j] * G[j]
//
// with c the upstream gradient of the row's loss times u (and 1/Z under a mean) and e that of its log-sum-exp.
// This header is plain C++: the kernel files that include it are compiled once per instruction set.
#pragma once

#include <cstdint>

namespace ltkernels {

enum class ElementType : int8_t { kFloat, kDouble, kBFloat16, kHalf };

// Pointers are null where an argument is absent. acc_t is float, or double for double logits.
template <typename acc_t>
struct MarginSoftmaxArgs {
  int64_t rows = 0;
  int64_t classes = 0;
  const void* logits = nullptr;  // (rows, classes), unit stride along classes
  int64_t logits_stride = 0;     // elements from row to row; 0 for an expanded row
  ElementType logits_type = ElementType::kFloat;

  const int64_t* index = nullptr;     // (rows,) class indices, or
  const void* probability = nullptr;  // (rows, classes) probabilities
  int64_t probability_stride = 0;
  ElementType probability_type = ElementType::kFloat;
  int64_t ignore_index = -100;

  acc_t scale = 1;                       // s, used where scaled is null
  const acc_t* scaled = nullptr;         // (classes,) s * a
  const acc_t* bias = nullptr;           // (classes,) b
  const acc_t* margin = nullptr;         // (classes,) s * m
  const acc_t* pairwise = nullptr;       // (classes, classes) Delta
  const acc_t* weight = nullptr;         // (classes,) w
  const acc_t* sample_weight = nullptr;  // (rows,) u
  const bool* mask = nullptr;            // (classes,) or (rows, classes)
  int64_t mask_stride = 0;               // 0 for one mask for all rows
  acc_t smoothing = 0;                   // eps

  // Silenced classes S of a row of class y: neighbor_classes[neighbor_offsets[y] .. neighbor_offsets[y + 1]) and, if
  // y >= back_from, all others from back_from on. Their classes are in row_class, or in index where that is null.
  const int64_t* row_class = nullptr;         // (rows,)
  const int32_t* neighbor_offsets = nullptr;  // (classes + 1,)
  const int32_t* neighbor_classes = nullptr;
  int64_t back_from = INT64_MAX;
  acc_t log_neighbor_weight = 0;  // log(lambda), -inf for 0

  acc_t inverse_normalizer = 1;  // 1/Z under a mean

  // Forward: statistics of each row, all 0 for an ignored row.
  acc_t* row_max = nullptr;     // (rows,) M = max_j v[j]
  acc_t* row_logsum = nullptr;  // (rows,) log sum_j exp(v[j] - M)
  acc_t* row_loss = nullptr;    // (rows,) r

  // The gradient: written by the forward pass if it is not null, with c = u / Z and e = 0, or by the backward pass.
  void* grad = nullptr;     // (rows, classes), unit stride along classes, in the logits' type
  int64_t grad_stride = 0;  // elements from row to row

  // Backward: upstream gradients, one a row, or one for all.
  const acc_t* grad_loss = nullptr;  // (rows,) or (1,)
  int64_t grad_loss_stride = 0;
  const acc_t* grad_lse = nullptr;  // (rows,) or null
  acc_t raw_scale = 1;              // s, also where scaled is given
};

// One instruction set's kernels. Rows are independent; `scratch` holds scratch_size(classes) elements.
template <typename acc_t>
struct MarginSoftmaxKernels {
  using Args = MarginSoftmaxArgs<acc_t>;
  int64_t (*scratch_size)(int64_t classes);
  void (*forward)(const Args&, int64_t begin, int64_t end, acc_t* scratch);
  // class_grad: null, or (3, classes) sums over the rows for a, b and m, added to.
  void (*backward)(const Args&, int64_t begin, int64_t end, acc_t* scratch, acc_t* class_grad);
  // Adds G of rows order[begin..end) to the (classes, classes) gradient of Delta, at the row of their class.
  void (*pairwise)(const Args&, const int64_t* order, int64_t begin, int64_t end, acc_t* scratch, acc_t* grad);
  // out = tau * (log(counts) - log_total)
  void (*log_prior)(const acc_t* counts, int64_t size, acc_t log_total, acc_t tau, acc_t* out);
};

// Those of the best instruction set that this processor runs.
template <typename acc_t>
const MarginSoftmaxKernels<acc_t>& margin_softmax_kernels();

#define LTK_DECLARE_KERNELS(CAPABILITY)                            \
  namespace CAPABILITY {                                           \
  extern const MarginSoftmaxKernels<float> margin_softmax_float;   \
  extern const MarginSoftmaxKernels<double> margin_softmax_double; \
  }
LTK_DECLARE_KERNELS(DEFAULT)
LTK_DECLARE_KERNELS(AVX2)
LTK_DECLARE_KERNELS(AVX512)
#undef LTK_DECLARE_KERNELS

}  // namespace ltkernels
