// What the contrastive operators compute on tiles of the similarity matrix; ltkernels/reference.py defines it.
//
//   x[i,j] = <q_i, k_j>,  l[i,j] = x[i,j] / tau_i + c_j + rho[y_i, y_j],  G[i,j] = d loss / d x[i,j]
//
// A tile holds x of some rows and keys. Keys that a row may not see are -inf in it.
#pragma once

#include <cstdint>

namespace ltkernels {

// reference.py has the same numbers.
enum Denominator : int64_t { kAll, kOwn, kNegatives, kLogsumexp, kLogsumexpOtherLabel, kLogsumexpSameLabel };

// Bits of `grads`: what an operator computes besides the loss. kExpected is a statistic, not a gradient.
enum ContrastiveGrads : int64_t {
  kGradQuery = 1,
  kGradKey = 2,
  kGradTemperature = 4,
  kGradKeyBias = 8,
  kGradPairMargin = 16,
  kGradExtraPositive = 32,
  kExpected = 64
};

// Rows of the (5, M) statistics; kCount: positives of a row, 1 if none are asked for.
enum ContrastiveStat { kLse, kPositive, kRowLoss, kExpectedLogit, kCount, kContrastiveStats };

enum class LabelRule { kNone, kWithoutSame, kSameOnly };  // which keys of its label a row's log-sum-exp runs over

// The pointers are those of the first row and the first key of the tile.
template <typename acc_t>
struct ContrastiveTile {
  using Label = int32_t;
  int64_t rows = 0, keys = 0, stride = 0;
  acc_t* x = nullptr;       // (rows, stride)
  acc_t* logits = nullptr;  // (rows, stride) scratch, or null if l = x / tau
  const acc_t* inverse_temperature = nullptr;
  const Label* label = nullptr;      // (rows,) below 0: no positives; null: no labels
  const Label* key_label = nullptr;  // (keys,)
  LabelRule rule = LabelRule::kNone;
  const acc_t* key_bias = nullptr;     // (keys,)
  const acc_t* pair_margin = nullptr;  // (num_labels, num_labels)
  int64_t num_labels = 0;
  const bool* allowed = nullptr;  // allowed[i * allowed_row_stride + j * allowed_key_stride]
  int64_t allowed_row_stride = 0, allowed_key_stride = 0;
};

// What a tile is besides in self-contrast: that of its keys as rows and its rows as keys, transposed. The pointers are
// those of the first key, and whole vectors may be read and written.
template <typename acc_t>
struct ContrastiveMirror {
  const acc_t* inverse_temperature = nullptr;
  acc_t* scratch = nullptr;  // (stride,)
};

// One row of coefficients: G = negative * exp(l - lse) - positive * [same label] (times a sigmoid, if `own`).
template <typename acc_t>
struct ContrastiveCoefficients {
  const acc_t* lse = nullptr;
  const acc_t* negative = nullptr;
  const acc_t* positive = nullptr;
  bool own = false;
};

template <typename acc_t>
struct ContrastiveKernels {
  using Tile = ContrastiveTile<acc_t>;
  using Coefficients = ContrastiveCoefficients<acc_t>;
  using Mirror = ContrastiveMirror<acc_t>;
  // x = -inf where not allowed, and the logits, if the tile has memory for them.
  void (*prepare)(const Tile&);
  // Joins the maximum and sum of exp(l - max) of each row.
  void (*accumulate)(const Tile&, acc_t* row_max, acc_t* row_sum);
  // The same for the rows of the tile and of its mirror image, of tiles without `logits` and `allowed`.
  void (*accumulate_both)(const Tile&, const Mirror&, acc_t* row_max, acc_t* row_sum, acc_t* key_max, acc_t* key_sum);
  // Adds x over the positives of each row, and their number.
  void (*positives)(const Tile&, acc_t* sum, acc_t* count);
  void (*positives_both)(const Tile&, acc_t* row_sum, acc_t* row_count, acc_t* key_sum, acc_t* key_count);
  // Adds softplus(lse - x / tau) and its derivative over the positives of each row.
  void (*softplus)(const Tile&, const acc_t* lse, acc_t* loss, acc_t* slope);
  // Adds sum_j exp(l - lse) x / tau to each row's expectation.
  void (*expected)(const Tile&, const acc_t* lse, acc_t* expected);
  // Adds row_weight_i exp(l - lse_i) over the rows to each key's sum.
  void (*key_sums)(const Tile&, const acc_t* lse, const acc_t* row_weight, acc_t* sums);
  // x = G; adds sum_j G x to each row of `products`.
  void (*gradient)(const Tile&, const Coefficients&, acc_t* products);
  // h (rows, stride) = G of the tile + G of its mirror image, transposed; for tiles as in accumulate_both. Where no key
  // is seen, the log-sum-exp is +inf here.
  void (*gradient_both)(
      const Tile&, const Mirror&, const Coefficients& of_rows, const Coefficients& of_keys, acc_t* h,
      acc_t* row_products, acc_t* key_products);
  // out (keys, rows) = x transposed, or (rows, keys) out += the transpose of x.
  void (*transpose)(const acc_t* x, int64_t rows, int64_t keys, int64_t stride, acc_t* out, int64_t out_stride);
  void (*add_transposed)(const acc_t* x, int64_t rows, int64_t keys, int64_t stride, acc_t* out, int64_t out_stride);
};

#define LTK_DECLARE_KERNELS(CAPABILITY)                       \
  namespace CAPABILITY {                                      \
  extern const ContrastiveKernels<float> contrastive_float;   \
  extern const ContrastiveKernels<double> contrastive_double; \
  }
LTK_DECLARE_KERNELS(DEFAULT)
LTK_DECLARE_KERNELS(AVX2)
LTK_DECLARE_KERNELS(AVX512)
#undef LTK_DECLARE_KERNELS

}  // namespace ltkernels
