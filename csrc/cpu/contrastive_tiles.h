// The tiles of a similarity matrix q k^T: who computes which, what is masked in them, products with keys and queries.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../contrastive.h"
#include "../contrastive_op.h"
#include "new_tensors.h"

namespace ltkernels {

// The instruction set of torch that kernels are chosen by, in lower case.
inline std::string cpu_capability_name() {
  const std::string capability = at::get_cpu_capability();
#if defined(__x86_64__)
  if (capability == "AVX512") return "avx512";
  if (capability == "AVX2") return "avx2";
#endif
  return "default";
}

template <typename A>
const ContrastiveKernels<A>& contrastive_kernels() {
  const auto choose = [](const auto& baseline, const auto& avx2, const auto& avx512) -> const ContrastiveKernels<A>& {
    const std::string name = cpu_capability_name();
    return name == "avx512" ? avx512 : name == "avx2" ? avx2 : baseline;
  };
#if defined(__x86_64__)
  if constexpr (std::is_same_v<A, double>) {
    static const auto& kernels =
        choose(DEFAULT::contrastive_double, AVX2::contrastive_double, AVX512::contrastive_double);
    return kernels;
  } else {
    static const auto& kernels = choose(DEFAULT::contrastive_float, AVX2::contrastive_float, AVX512::contrastive_float);
    return kernels;
  }
#else
  if constexpr (std::is_same_v<A, double>) return DEFAULT::contrastive_double;
  else return DEFAULT::contrastive_float;
#endif
}

template <typename A>
class ContrastiveTiles {
 protected:
  using Tile = ContrastiveTile<A>;

  explicit ContrastiveTiles(LTK_CONTRASTIVE_PARAMETERS)
      : kernels_(contrastive_kernels<A>()), self_(!key.has_value()), exclude_self_(exclude_self && !key.has_value()) {
    query_ = query.to(type()).contiguous();
    key_ = self_ ? query_ : key->to(type()).contiguous();
    rows_ = query_.size(0), keys_ = key_.size(0), width_ = query_.size(1);
    tau_ = vector(temperature);
    // Small batches want enough tiles for all threads, large ones tiles that fill the cache.
    const int64_t size = std::max(rows_, keys_);
    block_ = stride_ = size < 512 ? 64 : 128;
    inverse_tau_.assign(blocks(rows_) * block_, 1);  // padded: sweeps of both roles read whole vectors
    for (int64_t i = 0; i < rows_; ++i) inverse_tau_[i] = 1 / tau_[i];
    // NaN where it makes no sense: callers whose values can be read are told before.
    for (A& x : inverse_tau_) x = x > 0 && std::isfinite(x) ? x : std::numeric_limits<A>::quiet_NaN();
    without_positives_ = denominator == kOwn || denominator == kNegatives;
    set_labels(labels, key_labels, denominator);
    set_positive_index(positive_index);
    set_additive(key_bias, pair_margin);
    may_be_infinite_ = (positive_labels_ || without_positives_) && may_be_infinite();
    if (allowed.has_value()) {
      allowed_ = *allowed;
      allowed_row_stride_ = allowed_.dim() == 2 ? allowed_.stride(0) : 0;
      allowed_key_stride_ = allowed_.stride(-1);
    }
    scratch_.resize(std::max(at::get_num_threads(), at::get_thread_num() + 1));
  }

  static constexpr at::ScalarType type() { return std::is_same_v<A, double> ? at::kDouble : at::kFloat; }

  static std::vector<A> vector(const at::Tensor& x) {
    const at::Tensor values = x.to(type()).contiguous();
    const A* first = values.template const_data_ptr<A>();
    return std::vector<A>(first, first + values.numel());
  }

  bool has_positive_labels() const { return positive_labels_; }
  bool has_positive_index() const { return !positive_index_.empty(); }
  int64_t num_labels() const { return num_labels_; }
  int64_t padded_keys() const { return blocks(keys_) * block_; }
  int64_t padded_rows() const { return blocks(rows_) * block_; }
  void have_products() { have_products_ = true; }
  const A* query_row(int64_t i) const { return query_.template const_data_ptr<A>() + i * width_; }
  const A* key_row(int64_t j) const { return key_.template const_data_ptr<A>() + j * width_; }

  // In eight partial sums: one sum would wait for every addition.
  A dot(const A* x, const A* y) const {
    constexpr int64_t kParts = 8;
    A parts[kParts] = {}, total = 0;
    int64_t d = 0;
    for (; d + kParts <= width_; d += kParts) {
      for (int64_t k = 0; k < kParts; ++k) parts[k] += x[d + k] * y[d + k];
    }
    for (; d < width_; ++d) total += x[d] * y[d];
    for (const A part : parts) total += part;
    return total;
  }

  // Keeps the products that the first sweep computes for those that follow, if they are few.
  void keep_products() {
    const int64_t rows = blocks(rows_), tiles = rows * (self_ ? rows / 2 + 1 : blocks(keys_));
    const int64_t bytes = tiles * tile_size() * static_cast<int64_t>(sizeof(A));
    // Tiles that are changed for one role or sweep are of no use to the next.
    if ((self_ && !one_sweep()) || without_positive_index_ || bytes > Workspace::kMost) return;
    if (workspace_.acquire(bytes)) kept_ = static_cast<A*>(workspace_.data());
  }

  // Calls f(tile, first row, first key, role) for every tile and, in self-contrast, for its mirror image (role 1).
  // both(tile, mirror, first row, first key): the two in one sweep, where that can be.
  // positive(row, role, x): the product of a row with its positive by index, if the row sees it.
  template <typename F, typename B, typename P>
  void for_each_role(F f, B both, P positive) {
    in_rounds([&](int64_t i, int64_t j, Scratch& scratch) {
      A* x = similarities(i, j, scratch);
      if (one_sweep() && i != j) {
        find_positives_of_both(i, j, x, scratch);
        for (const Positive& p : scratch.found) positive(p.of, p.role, p.x);
        return both(tile_at(i, j, x), mirror_at(j, scratch), i * block_, j * block_);
      }
      const bool two_roles = self_ && i != j;
      if (two_roles) transpose(x, i, j, scratch.transposed.get());
      role(i, j, 0, x, scratch, f, positive);
      if (two_roles) role(j, i, 1, scratch.transposed.get(), scratch, f, positive);
    });
  }

  template <typename F>
  void for_each_role(F f) {
    in_rounds([&](int64_t i, int64_t j, Scratch& scratch) {
      A* x = similarities(i, j, scratch);
      const bool two_roles = self_ && i != j;
      if (two_roles) transpose(x, i, j, scratch.transposed.get());
      role(i, j, 0, x, scratch, f, [](int64_t, int, A) {});
      if (two_roles) role(j, i, 1, scratch.transposed.get(), scratch, f, [](int64_t, int, A) {});
    });
  }

  // f(tile, first row), all tiles in the rows' role, by one thread. The tiles have logits.
  template <typename F>
  void for_each_role_in_order(F f) {
    Scratch& scratch = scratch_[0];
    scratch.allocate(tile_size(), stride_);
    for (int64_t i = 0; i < blocks(rows_); ++i) {
      for (int64_t j = 0; j < blocks(keys_); ++j) {
        multiply(i, j, scratch.x.get());
        role(
            i, j, 0, scratch.x.get(), scratch, [&](const Tile& tile, int64_t row, int64_t, int) { f(tile, row); },
            [](int64_t, int, A) {});
      }
    }
  }

  // gradient(tile, first row, first key, role) turns x into G; positive(row, role, x) returns what G has besides at the
  // positive by index; both(tile, mirror, first row, first key, h) writes the G of both roles. Then adds G k to
  // `of_rows` and G^T q to `of_keys` (in self-contrast H z, of two halves), if not null.
  template <typename F, typename B, typename P>
  void for_each_gradient_tile(F gradient, B both, P positive, A* of_rows, A* of_keys) {
    in_rounds([&](int64_t i, int64_t j, Scratch& scratch) {
      A *x = similarities(i, j, scratch), *transposed = scratch.transposed.get();
      if (one_sweep() && i != j) {
        find_positives_of_both(i, j, x, scratch);
        both(tile_at(i, j, x), mirror_at(j, scratch), i * block_, j * block_, transposed);
        for (const Positive& p : scratch.found) transposed[p.row * stride_ + p.key] += positive(p.of, p.role, p.x);
        return add_products(i, j, transposed, of_rows, of_keys);
      }
      if (self_ && i != j) transpose(x, i, j, transposed);
      gradient_role(i, j, 0, x, scratch, gradient, positive);
      if (self_ && i != j) {
        gradient_role(j, i, 1, transposed, scratch, gradient, positive);
        kernels_.add_transposed(transposed, size(j, keys_), size(i, rows_), stride_, x, stride_);
      } else if (self_ && of_rows != nullptr) {
        transpose(x, i, i, transposed);
        for (int64_t e = 0; e < size(i, rows_) * stride_; ++e) x[e] += transposed[e];
      }
      add_products(i, j, x, of_rows, of_keys);
    });
  }

  const ContrastiveKernels<A>& kernels_;
  int64_t rows_ = 0, keys_ = 0, width_ = 0;
  const bool self_, exclude_self_;
  std::vector<A> tau_, inverse_tau_;

 private:
  static constexpr A kInfinite = std::numeric_limits<A>::infinity();

  struct Positive {
    int64_t row, key;  // in the tile
    int64_t of;        // whose positive it is
    int role;
    A x;
  };

  // One thread's tiles.
  struct Scratch {
    std::unique_ptr<A[]> x, transposed, logits, row;
    std::vector<Positive> found;

    void allocate(int64_t size, int64_t stride) {
      if (x) return;
      x.reset(new A[size]), transposed.reset(new A[size]), logits.reset(new A[size]), row.reset(new A[stride]);
    }
  };

  at::Tensor query_, key_, allowed_;
  Workspace workspace_;
  A* kept_ = nullptr;
  bool have_products_ = false;
  int64_t allowed_row_stride_ = 0, allowed_key_stride_ = 0;
  std::vector<int32_t> label_, key_label_;  // padded to whole tiles
  std::vector<int64_t> positive_index_;
  std::vector<A> key_bias_, pair_margin_;
  int64_t num_labels_ = 0, block_ = 0, stride_ = 0;
  bool positive_labels_ = false, without_positive_index_ = false;
  bool without_positives_ = false, may_be_infinite_ = false;
  LabelRule rule_ = LabelRule::kNone;
  std::vector<Scratch> scratch_;

  int64_t blocks(int64_t size) const { return (size + block_ - 1) / block_; }
  int64_t size(int64_t block, int64_t total) const { return std::min(block_, total - block * block_); }

  std::vector<int32_t> labels_of(const char* name, const at::Tensor& labels, int64_t size) const {
    const at::Tensor wide = labels.to(at::kLong).contiguous();
    const int64_t* y = wide.const_data_ptr<int64_t>();
    std::vector<int32_t> result(blocks(size) * block_, -1);
    for (int64_t i = 0; i < size; ++i) {
      TORCH_CHECK_VALUE(
          y[i] >= -1 && y[i] <= std::numeric_limits<int32_t>::max(), name,
          ": expected labels from -1 to 2^31 - 1, got ", y[i], " at index ", i);
      result[i] = static_cast<int32_t>(y[i]);
    }
    return result;
  }

  void set_labels(const std::optional<at::Tensor>& y, const std::optional<at::Tensor>& ky, int64_t denominator) {
    if (!y.has_value()) return;
    label_ = labels_of("labels", *y, rows_);
    key_label_ = self_ ? label_ : labels_of("key_labels", ky.value(), keys_);
    positive_labels_ = denominator == kAll || denominator == kOwn || denominator == kNegatives;
    if (without_positives_ || denominator == kLogsumexpOtherLabel) rule_ = LabelRule::kWithoutSame;
    if (denominator == kLogsumexpSameLabel) rule_ = LabelRule::kSameOnly;
  }

  bool may_be_infinite() const {
    const double bound = static_cast<double>(largest(query_)) * largest(key_) * width_;
    return !(bound < static_cast<double>(std::numeric_limits<A>::max()));
  }

  // The largest absolute value; NaN is passed over.
  static A largest(const at::Tensor& matrix) {
    const A *x = matrix.template const_data_ptr<A>(), *end = x + matrix.numel();
    A top = 0;
    for (; x != end; ++x) top = std::abs(*x) > top ? std::abs(*x) : top;
    return top;
  }

  void set_positive_index(const std::optional<at::Tensor>& index) {
    if (!index.has_value()) return;
    const at::Tensor wide = index->to(at::kLong).contiguous();
    const int64_t* p = wide.const_data_ptr<int64_t>();
    positive_index_.assign(p, p + rows_);
    for (int64_t i = 0; i < rows_; ++i) {
      TORCH_CHECK_VALUE(
          p[i] >= 0 && p[i] < keys_, "positive_index: expected keys from 0 to ", keys_ - 1, ", got ", p[i],
          " at index ", i);
      TORCH_CHECK_VALUE(
          !self_ || p[i] != i, "positive_index: expected another row than the row itself, got ", i, " at index ", i);
    }
    without_positive_index_ = without_positives_;
  }

  void set_additive(const std::optional<at::Tensor>& key_bias, const std::optional<at::Tensor>& pair_margin) {
    if (key_bias.has_value()) key_bias_ = vector(*key_bias);
    if (!pair_margin.has_value()) return;
    pair_margin_ = vector(*pair_margin);
    num_labels_ = pair_margin->size(0);
    for (const std::vector<int32_t>* labels : {&label_, &key_label_}) {
      for (const int32_t y : *labels) {
        TORCH_CHECK_VALUE(
            y < num_labels_, "labels: expected labels below ", num_labels_, ", the size of pair_margin, got ", y);
      }
    }
  }

  int64_t tile_size() const { return block_ * stride_; }

  // Whether one sweep over a tile does for its mirror image too.
  bool one_sweep() const { return self_ && !has_logits() && !allowed_.defined() && !without_positive_index_; }

  bool has_logits() const { return !key_bias_.empty() || !pair_margin_.empty() || rule_ != LabelRule::kNone; }

  // f(row block, key block, scratch) for each tile; in self-contrast for one of each pair that mirror each other.
  template <typename F>
  void in_rounds(F f) {
    const int64_t rows = blocks(rows_), keys = blocks(keys_);
    const int64_t cycle = std::max(rows, keys);
    const int64_t rounds = self_ ? rows / 2 + 1 : cycle;
    for (int64_t round = 0; round < rounds; ++round) {
      // Half way round, tiles meet their mirror images.
      const int64_t tiles = self_ && round > 0 && 2 * round == rows ? rows / 2 : rows;
      at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        const at::AutoDispatchBelowADInplaceOrView guard;  // this thread may not have the caller's
        Scratch& scratch = scratch_[at::get_thread_num()];
        scratch.allocate(tile_size(), stride_);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t j = (i + round) % cycle;
          if (j < keys) f(i, j, scratch);
        }
      });
    }
  }

  // A block of the rows of a matrix, and a tile, as tensors. Of cpublas, torch exports brgemm and pack, but not gemm.
  at::Tensor rows_of(const A* matrix, int64_t block, int64_t rows) const {
    return at::from_blob(const_cast<A*>(matrix) + block * block_ * width_, {size(block, rows), width_}, type());
  }
  at::Tensor tile_of(A* x, int64_t i, int64_t j) const {
    return at::from_blob(x, {size(i, rows_), size(j, keys_)}, {stride_, 1}, type());
  }

  // The products of a tile: kept, or in this thread's memory.
  A* similarities(int64_t i, int64_t j, Scratch& scratch) {
    if (kept_ == nullptr) {
      multiply(i, j, scratch.x.get());
      return scratch.x.get();
    }
    const int64_t rows = blocks(rows_), tile = self_ ? (j - i + rows) % rows * rows + i : i * blocks(keys_) + j;
    A* x = kept_ + tile * tile_size();
    if (!have_products_) multiply(i, j, x);
    return x;
  }

  void multiply(int64_t i, int64_t j, A* x) const {
    at::Tensor products = tile_of(x, i, j);
    at::mm_out(products, rows_of(query_row(0), i, rows_), rows_of(key_row(0), j, keys_).t());
    if (may_be_infinite_) show_infinite(i, j, x);
    pad(x, size(i, rows_), size(j, keys_));
  }

  // To the sweeps -inf is a key that the row does not see. A positive that is infinitely far away would be left out of
  // the loss, and so would be the last negative where positives are not among them: all would look well. They get NaN.
  void show_infinite(int64_t i, int64_t j, A* x) const {
    for (int64_t r = 0; r < size(i, rows_); ++r) {
      const int32_t label = without_positives_ ? -1 : label_[i * block_ + r];
      for (int64_t k = 0; k < size(j, keys_); ++k) {
        const bool shown = without_positives_ || (label >= 0 && key_label_[j * block_ + k] == label);
        if (shown && x[r * stride_ + k] == -kInfinite) x[r * stride_ + k] = std::numeric_limits<A>::quiet_NaN();
      }
    }
  }

  void pad(A* x, int64_t rows, int64_t keys) const {
    for (int64_t r = 0; keys < stride_ && r < rows; ++r)
      std::fill(x + r * stride_ + keys, x + (r + 1) * stride_, -kInfinite);
  }

  void add_products(int64_t i, int64_t j, A* x, A* of_rows, A* of_keys) const {
    const at::Tensor g = tile_of(x, i, j);
    if (of_rows != nullptr) rows_of(of_rows, i, rows_).addmm_(g, rows_of(key_row(0), j, keys_));
    if (of_keys == nullptr || (self_ && i == j)) return;
    rows_of(of_keys, j, keys_).addmm_(g.t(), rows_of(query_row(0), i, rows_));
  }

  void transpose(const A* x, int64_t i, int64_t j, A* out) const {
    const int64_t m = size(i, rows_), n = size(j, keys_);
    kernels_.transpose(x, m, n, stride_, out, stride_);
    pad(out, n, m);
  }

  Tile tile_at(int64_t i, int64_t j, A* x) const {
    const int64_t row = i * block_, key = j * block_;
    Tile t;
    t.rows = size(i, rows_), t.keys = size(j, keys_), t.stride = stride_;
    t.x = x;
    t.inverse_temperature = inverse_tau_.data() + row;
    if (!label_.empty()) t.label = label_.data() + row, t.key_label = key_label_.data() + key;
    return t;
  }

  ContrastiveMirror<A> mirror_at(int64_t j, Scratch& scratch) const {
    return {inverse_tau_.data() + j * block_, scratch.row.get()};
  }

  // Positives by index of the rows of a tile and of its mirror image.
  void find_positives_of_both(int64_t i, int64_t j, const A* x, Scratch& scratch) const {
    scratch.found.clear();
    if (positive_index_.empty()) return;
    const int64_t row = i * block_, key = j * block_, rows = size(i, rows_), keys = size(j, keys_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t p = positive_index_[row + r] - key;
      if (p >= 0 && p < keys) scratch.found.push_back({r, p, row + r, 0, x[r * stride_ + p]});
    }
    for (int64_t k = 0; k < keys; ++k) {
      const int64_t p = positive_index_[key + k] - row;
      if (p >= 0 && p < rows) scratch.found.push_back({p, k, key + k, 1, x[p * stride_ + k]});
    }
  }

  template <typename F, typename P>
  void role(int64_t i, int64_t j, int number, A* x, Scratch& scratch, F f, P positive) {
    const int64_t row = i * block_, key = j * block_;
    Tile t = tile_at(i, j, x);
    t.logits = has_logits() ? scratch.logits.get() : nullptr;
    t.rule = rule_;
    if (!key_bias_.empty()) t.key_bias = key_bias_.data() + key;
    if (!pair_margin_.empty()) t.pair_margin = pair_margin_.data(), t.num_labels = num_labels_;
    if (allowed_.defined()) {
      t.allowed = allowed_.const_data_ptr<bool>() + row * allowed_row_stride_ + key * allowed_key_stride_;
      t.allowed_row_stride = allowed_row_stride_, t.allowed_key_stride = allowed_key_stride_;
    }
    if (exclude_self_ && i == j) {
      for (int64_t r = 0; r < t.rows; ++r) x[r * stride_ + r] = -kInfinite;
    }
    scratch.found.clear();
    for (int64_t r = 0; !positive_index_.empty() && r < t.rows; ++r) {
      const int64_t p = positive_index_[row + r] - key;
      if (p < 0 || p >= t.keys) continue;
      A& product = x[r * stride_ + p];
      const bool seen = t.allowed == nullptr || t.allowed[r * t.allowed_row_stride + p * t.allowed_key_stride];
      if (!seen || (exclude_self_ && row + r == key + p)) continue;
      positive(row + r, number, product);
      scratch.found.push_back({r, p, row + r, number, product});
      if (without_positive_index_) product = -kInfinite;
    }
    if (t.allowed != nullptr || t.logits != nullptr) kernels_.prepare(t);
    f(t, row, key, number);
  }

  template <typename F, typename P>
  void gradient_role(int64_t i, int64_t j, int number, A* x, Scratch& scratch, F gradient, P positive) {
    role(i, j, number, x, scratch, gradient, [](int64_t, int, A) {});
    for (const Positive& p : scratch.found) x[p.row * stride_ + p.key] += positive(p.of, number, p.x);
  }
};

}  // namespace ltkernels
