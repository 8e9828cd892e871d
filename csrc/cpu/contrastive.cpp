// CPU implementation of the contrastive operators: tiles of the similarity matrix, in passes over all of them.
//
//   1. rows      maximum and sum of exp(l) of each row, and its positives
//   2. softplus  (denominator "own" with labels) the loss of each positive, which needs the log-sum-exp of its row
//   3. gradient  G of each tile, multiplied with keys and queries
//
// A tile of q k^T is a matrix product of its own and stays in the cache. In self-contrast the tile of rows I and keys J
// is also that of rows J and keys I, transposed: half of the tiles do, and both gradients come from H = G + G^T.
//
// Tiles run in rounds: in one round no two tiles have the same rows, nor the same keys, and what is added up for rows
// and for keys lies apart. So nothing is locked, and every sum has one order for any number of threads.
#include "contrastive_tiles.h"

#include <torch/library.h>

#include "../contrastive_op.h"
#include "../kernel_calls.h"

namespace ltkernels {
namespace {

template <typename A>
class Contrastive : public ContrastiveTiles<A> {
  using Base = ContrastiveTiles<A>;
  using Base::kernels_, Base::rows_, Base::keys_, Base::width_, Base::self_, Base::tau_, Base::inverse_tau_;
  using Tile = ContrastiveTile<A>;

 public:
  explicit Contrastive(LTK_CONTRASTIVE_PARAMETERS)
      : Base(LTK_CONTRASTIVE_ARGUMENTS),
        denominator_(denominator),
        reduction_(reduction),
        scaled_(scale_by_temperature) {
    if (sample_weight.has_value()) weight_ = this->vector(*sample_weight);
    if (log_normalizer.has_value()) normalizer_ = this->vector(*log_normalizer);
    if (extra_positive.has_value()) extra_ = extra_positive->to(this->type()).contiguous();
    extra_type_ = query.scalar_type();
  }

  // Statistics of all rows, but for the row loss and the expectation.
  void forward(bool gradients) {
    if (gradients) this->keep_products();
    rows_pass();
    this->have_products();
    if (extra_.defined()) add_extra_rows();
    statistics();
    if (denominator_ == kOwn) own_losses();
  }

  // The same from what forward() and row_losses() have found, but for the expectation.
  void from_statistics(const at::Tensor& stats) {
    const at::Tensor known = stats.to(this->type()).contiguous();
    const auto column = [&](int64_t k) {
      const A* first = known.template const_data_ptr<A>() + k * rows_;
      return std::vector<A>(first, first + rows_);
    };
    lse_ = column(kLse), positive_ = column(kPositive), row_loss_ = column(kRowLoss), count_ = column(kCount);
    product_.resize(rows_);
    for (int64_t i = 0; i < rows_; ++i) product_[i] = positive_[i] * count_[i] * tau_[i];
    if (extra_.defined()) extra_products();
    if (denominator_ == kOwn) own_losses();
  }

  // Whether row i counts: it has a positive, or none is asked for.
  bool counts(int64_t i) const { return count_[i] > 0; }
  bool full(int64_t i) const { return !(lse_[i] == -kInfinite); }
  A weight(int64_t i) const { return weight_.empty() ? A(1) : weight_[i]; }

  // 1 / Z; 0 if there is nothing to divide.
  double inverse_normalizer() const {
    if (reduction_ != 1) return 1;
    double total = 0;
    for (int64_t i = 0; i < rows_; ++i) total += counts(i) ? double(weight(i)) : 0;
    return total == 0 ? 0 : 1 / total;
  }

  void row_losses() {
    row_loss_.assign(rows_, 0);
    for (int64_t i = 0; i < rows_; ++i) {
      if (denominator_ >= kLogsumexp) row_loss_[i] = lse_[i];
      else if (!counts(i) || !full(i)) row_loss_[i] = 0;
      else if (!normalizer_.empty()) row_loss_[i] = mass(i) * tau_[i] * (expected_[i] - positive_[i]);
      else if (denominator_ == kOwn) row_loss_[i] = own_loss_[i] / count_[i];
      else row_loss_[i] = lse_[i] - positive_[i];
      if (scaled_) row_loss_[i] *= tau_[i];
    }
  }

  at::Tensor loss() const {
    if (reduction_ == 0) {
      at::Tensor loss = at::empty({rows_}, this->type());
      for (int64_t i = 0; i < rows_; ++i) {
        loss.template mutable_data_ptr<A>()[i] = counts(i) ? weight(i) * row_loss_[i] : 0;
      }
      return loss;
    }
    double total = 0;
    for (int64_t i = 0; i < rows_; ++i) total += counts(i) ? double(weight(i)) * row_loss_[i] : 0;
    const double factor = inverse_normalizer();
    return at::full({}, factor == 0 ? 0.0 : total * factor, at::TensorOptions(this->type()));
  }

  at::Tensor stats() const {
    at::Tensor stats = at::empty({kContrastiveStats, rows_}, this->type());
    A* out = stats.template mutable_data_ptr<A>();
    const std::vector<A>* columns[] = {&lse_, &positive_, &row_loss_, &expected_, &count_};
    for (const std::vector<A>* column : columns) out = std::copy(column->begin(), column->begin() + rows_, out);
    return stats;
  }

  // The expectation alone: a statistic, or part of the loss.
  void expect() {
    std::vector<A> parts[2] = {std::vector<A>(rows_), std::vector<A>(rows_)};
    this->for_each_role([&](const Tile& tile, int64_t row, int64_t, int role) {
      kernels_.expected(tile, lse_.data() + row, parts[role].data() + row);
    });
    for (int64_t i = 0; i < rows_; ++i) expected_[i] = parts[0][i] + parts[1][i];
    if (extra_.defined() && denominator_ == kAll) {
      for (int64_t i = 0; i < rows_; ++i) {
        const A s = extra_product_[i] * inverse_tau_[i];
        expected_[i] += std::exp(s - lse_[i]) * s;
      }
    }
  }

  // Gradients for upstream gradients of the loss: one a row, or one for all.
  std::vector<at::Tensor> gradients(const A* upstream, int64_t stride, int64_t wanted) {
    coefficients(upstream, stride);
    const bool query = wanted & kGradQuery, key = (wanted & kGradKey) && !self_;
    if (wanted & (kGradQuery | kGradKey | kGradTemperature | kGradKeyBias)) {
      gradient_pass(query, key, wanted & kGradTemperature, wanted & kGradKeyBias);
    }
    std::vector<at::Tensor> grads(6);
    if (extra_.defined()) extra_gradient(query, wanted & kGradExtraPositive);
    if (query) grads[0] = grad_query_.to(extra_type_);
    if (key) grads[1] = grad_key_.to(extra_type_);
    if (wanted & kGradTemperature) grads[2] = temperature_gradient(upstream, stride);
    if (wanted & kGradKeyBias) grads[3] = at::tensor(at::ArrayRef<A>(key_sum_.data(), keys_), this->type());
    if (wanted & kGradPairMargin) grads[4] = pair_margin_gradient();
    if (wanted & kGradExtraPositive) grads[5] = grad_extra_.to(extra_type_);
    for (at::Tensor& grad : grads) {
      if (!grad.defined()) grad = at::empty({0}, this->type());
    }
    return grads;
  }

  bool needs_expectation() const { return !normalizer_.empty(); }

 private:
  static constexpr A kInfinite = std::numeric_limits<A>::infinity();

  int64_t denominator_, reduction_;
  bool scaled_;
  std::vector<A> weight_, normalizer_;
  at::Tensor extra_;
  at::ScalarType extra_type_;
  // Of each row: the log-sum-exp, positives as a sum of products and as a mean of logits, and their number.
  std::vector<A> max_, sum_, lse_, product_, positive_, count_, expected_, own_loss_, own_slope_, row_loss_;
  std::vector<A> extra_product_;
  std::vector<A> negative_c_, positive_c_;  // coefficients of the gradient
  std::vector<A> row_product_, key_sum_;    // sum_j G x of each row; gradient of the key bias
  at::Tensor grad_query_, grad_key_, grad_extra_;

  // R_i = sum of w[i,j] of a log_normalizer.
  A mass(int64_t i) const { return std::exp(lse_[i] - positive_[i] - normalizer_[i]); }

  void rows_pass() {
    struct Part {
      std::vector<A> max, sum, product, count;
    } parts[2];
    const std::vector<A> zeros(this->padded_rows());
    for (Part& part : parts) part = {std::vector<A>(zeros.size(), -kInfinite), zeros, zeros, zeros};
    const bool labels = this->has_positive_labels();
    this->for_each_role(
        [&](const Tile& tile, int64_t row, int64_t, int role) {
          Part& part = parts[role];
          kernels_.accumulate(tile, part.max.data() + row, part.sum.data() + row);
          if (labels) kernels_.positives(tile, part.product.data() + row, part.count.data() + row);
        },
        [&](const Tile& tile, const ContrastiveMirror<A>& mirror, int64_t row, int64_t key) {
          Part &of_row = parts[0], &of_key = parts[1];
          kernels_.accumulate_both(
              tile, mirror, of_row.max.data() + row, of_row.sum.data() + row, of_key.max.data() + key,
              of_key.sum.data() + key);
          if (!labels) return;
          kernels_.positives_both(
              tile, of_row.product.data() + row, of_row.count.data() + row, of_key.product.data() + key,
              of_key.count.data() + key);
        },
        [&](int64_t row, int role, A x) {
          parts[role].product[row] = x;
          parts[role].count[row] = 1;
        });
    max_.assign(rows_, 0), sum_.assign(rows_, 0), product_.assign(rows_, 0), count_.assign(rows_, 0);
    for (int64_t i = 0; i < rows_; ++i) {
      max_[i] = parts[0].max[i], sum_[i] = parts[0].sum[i];
      join(i, parts[1].max[i], parts[1].sum[i]);
      product_[i] = parts[0].product[i] + parts[1].product[i];
      count_[i] = denominator_ >= kLogsumexp ? A(1) : parts[0].count[i] + parts[1].count[i];
    }
  }

  void join(int64_t i, A max, A sum) {
    if (max > max_[i]) std::swap(max, max_[i]), std::swap(sum, sum_[i]);
    sum_[i] += max == -kInfinite ? sum : sum * std::exp(max - max_[i]);  // sum: 0, or NaN
  }

  void extra_products() {
    extra_product_.resize(rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      extra_product_[i] = this->dot(this->query_row(i), extra_.template const_data_ptr<A>() + i * width_);
    }
  }

  void add_extra_rows() {
    extra_products();
    for (int64_t i = 0; i < rows_; ++i) {
      product_[i] += extra_product_[i];
      count_[i] += 1;
      if (denominator_ == kAll) join(i, extra_product_[i] * inverse_tau_[i], A(1));
    }
  }

  // The log-sum-exp of a row that sees no key. Products of an infinite query look like keys that it may not see.
  A nothing(int64_t i) const {
    const A* q = this->query_row(i);
    const bool finite = std::all_of(q, q + width_, [](A x) { return std::isfinite(x); });
    return finite ? -kInfinite : std::numeric_limits<A>::quiet_NaN();
  }

  void statistics() {
    lse_.resize(rows_), positive_.resize(rows_), expected_.assign(rows_, 0);
    for (int64_t i = 0; i < rows_; ++i) {
      lse_[i] = sum_[i] == 0 ? nothing(i) : max_[i] + std::log(sum_[i]);
      positive_[i] = count_[i] > 0 ? product_[i] / count_[i] * inverse_tau_[i] : A(0);
    }
  }

  static A sigmoid(A z) { return 1 / (1 + std::exp(-z)); }
  static A softplus(A z) { return std::max(z, A(0)) + std::log1p(std::exp(-std::abs(z))); }

  void add_own(int64_t i, A product) {
    if (!full(i)) return;
    const A gap = lse_[i] - product * inverse_tau_[i];
    own_loss_[i] += softplus(gap), own_slope_[i] += sigmoid(gap);
  }

  void own_losses() {
    own_loss_.assign(rows_, 0), own_slope_.assign(rows_, 0);
    if (this->has_positive_labels()) {
      std::vector<A> loss[2] = {std::vector<A>(rows_), std::vector<A>(rows_)}, slope[2] = {loss[0], loss[0]};
      this->for_each_role([&](const Tile& tile, int64_t row, int64_t, int role) {
        kernels_.softplus(tile, lse_.data() + row, loss[role].data() + row, slope[role].data() + row);
      });
      for (int64_t i = 0; i < rows_; ++i)
        own_loss_[i] = loss[0][i] + loss[1][i], own_slope_[i] = slope[0][i] + slope[1][i];
    }
    for (int64_t i = 0; i < rows_; ++i) {
      const bool indexed = this->has_positive_index() && count_[i] > (extra_.defined() ? 1 : 0);
      if (indexed) add_own(i, product_[i] - (extra_.defined() ? extra_product_[i] : A(0)));
      if (extra_.defined()) add_own(i, extra_product_[i]);
    }
  }

  // d loss / d (row loss) of row i, temperature as a factor of the loss aside.
  double alpha(int64_t i, const A* upstream, int64_t stride, double factor) const {
    return counts(i) && full(i) && factor != 0 ? double(upstream[i * stride]) * weight(i) * factor : 0;
  }

  void coefficients(const A* upstream, int64_t stride) {
    negative_c_.resize(this->padded_rows()), positive_c_.resize(this->padded_rows());
    const double factor = inverse_normalizer();
    for (int64_t i = 0; i < rows_; ++i) {
      const double a = alpha(i, upstream, stride, factor), count = std::max(count_[i], A(1));
      double negative = scaled_ ? a : a * inverse_tau_[i];
      if (a != 0 && !normalizer_.empty()) negative = a * mass(i);
      positive_c_[i] = static_cast<A>(denominator_ >= kLogsumexp ? 0 : negative / count);
      if (denominator_ == kOwn) negative *= own_slope_[i] / count;
      negative_c_[i] = static_cast<A>(negative);
    }
  }

  // Gradient to the product of row i with a positive that is no part of the tiles' labels.
  A positive_gradient(int64_t i, A product) const {
    if (positive_c_[i] == 0) return 0;
    return -positive_c_[i] * (denominator_ == kOwn ? sigmoid(lse_[i] - product * inverse_tau_[i]) : A(1));
  }

  void gradient_pass(bool query, bool key, bool, bool key_bias) {
    std::vector<A> products[2], sums[2], weight(rows_), lse_or_infinite(this->padded_rows());
    for (std::vector<A>& sum : products) sum.assign(this->padded_rows(), 0);
    for (int64_t i = 0; i < rows_; ++i) lse_or_infinite[i] = full(i) ? lse_[i] : kInfinite;
    if (key_bias) {
      for (std::vector<A>& sum : sums) sum.assign(this->padded_keys(), 0);
      // With a log_normalizer the exponentials are constants.
      for (int64_t i = 0; i < rows_; ++i) weight[i] = normalizer_.empty() ? negative_c_[i] * tau_[i] : A(0);
    }
    const at::TensorOptions type(this->type());
    if (query) grad_query_ = at::zeros({rows_, width_}, type);
    if (key) grad_key_ = at::zeros({keys_, width_}, type);
    at::Tensor transposed = query && self_ ? at::zeros({rows_, width_}, type) : at::Tensor();
    const ContrastiveCoefficients<A> all{lse_.data(), negative_c_.data(), positive_c_.data(), denominator_ == kOwn};
    const auto gradient = [&](const Tile& tile, int64_t row, int64_t first_key, int role) {
      if (key_bias) kernels_.key_sums(tile, lse_.data() + row, weight.data() + row, sums[role].data() + first_key);
      ContrastiveCoefficients<A> c{all.lse + row, all.negative + row, all.positive + row, all.own};
      if (!this->has_positive_labels()) c.positive = nullptr;
      kernels_.gradient(tile, c, products[role].data() + row);
    };
    const auto both = [&](const Tile& tile, const ContrastiveMirror<A>& mirror, int64_t row, int64_t key, A* h) {
      const auto of = [&](int64_t first) {
        const A* positive = this->has_positive_labels() ? positive_c_.data() + first : nullptr;
        return ContrastiveCoefficients<A>{lse_or_infinite.data() + first, negative_c_.data() + first, positive};
      };
      kernels_.gradient_both(tile, mirror, of(row), of(key), h, products[0].data() + row, products[1].data() + key);
    };
    const auto positive = [&](int64_t row, int role, A x) {
      const A g = positive_gradient(row, x);
      products[role][row] += g * x;
      return g;
    };
    this->for_each_gradient_tile(
        gradient, both, positive, query ? grad_query_.template mutable_data_ptr<A>() : nullptr,
        transposed.defined() ? transposed.template mutable_data_ptr<A>()
        : key                ? grad_key_.template mutable_data_ptr<A>()
                             : nullptr);
    if (transposed.defined()) grad_query_.add_(transposed);
    row_product_.resize(rows_);
    for (int64_t i = 0; i < rows_; ++i) row_product_[i] = products[0][i] + products[1][i];
    if (key_bias) {
      key_sum_.resize(keys_);
      for (int64_t j = 0; j < keys_; ++j) key_sum_[j] = sums[0][j] + sums[1][j];
    }
  }

  void extra_gradient(bool query, bool wanted) {
    if (wanted) grad_extra_ = at::zeros({rows_, width_}, at::TensorOptions(this->type()));
    for (int64_t i = 0; i < rows_; ++i) {
      A g = positive_gradient(i, extra_product_[i]);
      if (denominator_ == kAll && negative_c_[i] != 0) {
        g += negative_c_[i] * std::exp(extra_product_[i] * inverse_tau_[i] - lse_[i]);
      }
      if (!row_product_.empty()) row_product_[i] += g == 0 ? A(0) : g * extra_product_[i];
      if (g == 0) continue;
      const A* e = extra_.template const_data_ptr<A>() + i * width_;
      const A* q = this->query_row(i);
      A* dq = query ? grad_query_.template mutable_data_ptr<A>() + i * width_ : nullptr;
      A* de = wanted ? grad_extra_.template mutable_data_ptr<A>() + i * width_ : nullptr;
      for (int64_t d = 0; query && d < width_; ++d) dq[d] += g * e[d];
      for (int64_t d = 0; wanted && d < width_; ++d) de[d] = g * q[d];
    }
  }

  // dtau_i = -sum_j G[i,j] x[i,j] / tau_i, and the loss itself if tau_i multiplies it.
  at::Tensor temperature_gradient(const A* upstream, int64_t stride) const {
    at::Tensor grad = at::zeros({rows_}, at::TensorOptions(this->type()));
    if (!normalizer_.empty()) return grad;
    const double factor = inverse_normalizer();
    A* out = grad.template mutable_data_ptr<A>();
    for (int64_t i = 0; i < rows_; ++i) {
      const double a = alpha(i, upstream, stride, factor);
      if (a == 0) continue;
      out[i] = -row_product_[i] * inverse_tau_[i];
      if (scaled_) out[i] += static_cast<A>(a * row_loss_[i] * inverse_tau_[i]);
    }
    return grad;
  }

  // One thread: any two tiles may add to the same pair of labels, and few train these margins.
  at::Tensor pair_margin_gradient() {
    const int64_t L = this->num_labels();
    at::Tensor grad = at::zeros({L, L}, at::TensorOptions(this->type()));
    A* out = grad.template mutable_data_ptr<A>();
    this->for_each_role_in_order([&](const Tile& tile, int64_t row) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        const A weight = normalizer_.empty() ? negative_c_[row + i] * tau_[row + i] : A(0);
        if (tile.label[i] < 0 || weight == 0) continue;
        for (int64_t j = 0; j < tile.keys; ++j) {
          if (tile.key_label[j] < 0) continue;
          const A p = std::exp(tile.logits[i * tile.stride + j] - lse_[row + i]);
          out[tile.label[i] * L + tile.key_label[j]] += weight * p;
        }
      }
    });
    return grad;
  }
};

using Forward =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

KernelCounter& forward_calls() {
  static KernelCounter counter("cpu." + cpu_capability_name() + ".contrastive.forward");
  return counter;
}
KernelCounter& backward_calls() {
  static KernelCounter counter("cpu." + cpu_capability_name() + ".contrastive.backward");
  return counter;
}

template <typename A>
Forward forward(LTK_CONTRASTIVE_PARAMETERS, int64_t grads) {
  Contrastive<A> rows(LTK_CONTRASTIVE_ARGUMENTS);
  rows.forward(grads & ~kExpected);
  if (rows.needs_expectation() || (grads & kExpected)) rows.expect();
  rows.row_losses();
  const A one = 1;
  auto g = rows.gradients(&one, 0, grads & ~kExpected);
  forward_calls().add();
  return {rows.loss(), rows.stats(), g[0], g[1], g[2], g[3], g[4], g[5]};
}

template <typename A>
Backward backward(const at::Tensor& grad_loss, const at::Tensor& stats, LTK_CONTRASTIVE_PARAMETERS, int64_t grads) {
  Contrastive<A> rows(LTK_CONTRASTIVE_ARGUMENTS);
  rows.from_statistics(stats);
  const at::Tensor upstream = grad_loss.to(c10::CppTypeToScalarType<A>::value).contiguous();
  auto g = rows.gradients(upstream.template const_data_ptr<A>(), upstream.dim() == 0 ? 0 : 1, grads);
  backward_calls().add();
  return {g[0], g[1], g[2], g[3], g[4], g[5]};
}

Forward contrastive_fwd(LTK_CONTRASTIVE_PARAMETERS, int64_t grads) {
  return query.scalar_type() == at::kDouble ? forward<double>(LTK_CONTRASTIVE_ARGUMENTS, grads)
                                            : forward<float>(LTK_CONTRASTIVE_ARGUMENTS, grads);
}

Backward contrastive_bwd(
    const at::Tensor& grad_loss, const at::Tensor& stats, LTK_CONTRASTIVE_PARAMETERS, int64_t grads) {
  return query.scalar_type() == at::kDouble ? backward<double>(grad_loss, stats, LTK_CONTRASTIVE_ARGUMENTS, grads)
                                            : backward<float>(grad_loss, stats, LTK_CONTRASTIVE_ARGUMENTS, grads);
}

TORCH_LIBRARY_IMPL(ltkernels, CPU, m) {
  m.impl("contrastive_fwd", &contrastive_fwd);
  m.impl("contrastive_bwd", &contrastive_bwd);
}

}  // namespace
}  // namespace ltkernels
