// The row kernel of margin-adjusted softmax cross-entropy for CPUs; ../margin_softmax.h has the formula.
//
// A row passes through a scratch buffer that stays in the L1 or L2 cache, in short sweeps:
//   1. load     logits -> v, and its maximum       (reads the logits, once)
//   2. exp      v -> exp(v - M), and its sum       (meanwhile prefetches what sweeps 3 and, of the next row, 1 touch)
//   3. store    exp * coefficient -> gradient      (writes the gradient, once)
// Rare options (mask, pairwise margin, probabilities, smoothing, class gradients) are extra sweeps over the scratch,
// so that the common path has no switch inside a loop. The scratch is padded with v = -inf to whole vectors.
//
// This file is compiled once per instruction set and must not include torch or define a symbol outside
// LTK_CAPABILITY that is not static: see simd.h.
#include "../margin_softmax.h"
#include "margin_softmax_row.h"
#include "simd.h"

namespace ltkernels {
namespace LTK_CAPABILITY {
namespace {

// Rows with class indices are swept together as far as they are short: a row's maximum, sum and coefficient take their
// time one after the other, and the processor has the sweeps of the other rows to go on with.
template <typename A>
LTK_INLINE int64_t rows_together(int64_t classes) {
  constexpr int64_t kElements = 512, kMostRows = 8;
  const int64_t rows = kElements / padded<A>(classes);
  return rows < 1 ? 1 : rows > kMostRows ? kMostRows : rows;
}

template <typename A>
int64_t scratch_size(int64_t classes) {
  const int64_t rows = rows_together<A>(classes);
  return (rows < 2 ? 2 : rows) * padded<A>(classes);
}

template <typename A>
LTK_INLINE void zero_removed(const MarginSoftmaxArgs<A>& p, int64_t i, A* g) {
  if (const bool* mask = mask_row(p, i)) {
    for (int64_t j = 0; j < p.classes; ++j) g[j] = mask[j] ? g[j] : 0;
  }
  zero_silenced(p, i, g);
}

// For the sweeps of `row` if `next` is loaded after it.
template <typename A>
LTK_INLINE Prefetch prefetch_of(const MarginSoftmaxArgs<A>& p, int64_t row, int64_t next) {
  const int64_t size = element_size(p.logits_type);
  const char* load = static_cast<const char*>(p.logits) + next * p.logits_stride * size;
  return {load, p.grad == nullptr ? load : static_cast<const char*>(p.grad) + row * p.grad_stride * size};
}

template <typename A>
LTK_INLINE A log_of(A sum) {
  return static_cast<A>(__builtin_log(sum));
}

template <typename A>
LTK_INLINE bool is_ignored(const MarginSoftmaxArgs<A>& p, int64_t i) {
  return p.index != nullptr && p.index[i] == p.ignore_index;
}

// T of a row of class y.
template <typename A>
LTK_INLINE A mass_of(const MarginSoftmaxArgs<A>& p, int64_t y) {
  return p.weight == nullptr ? 1 : p.weight[y];
}

// Sums of exponentials -> their logarithms. That of an ignored row, 0, and NaN stay what they are.
template <typename A>
LTK_INLINE Vec<A> log_of_sums(Vec<A> x) {
  return x > 0 ? log_positive(x > 0 ? x : broadcast<A>(1)) : x;
}

template <typename A>
LTK_INLINE void logs_of_sums(A* sums, int64_t size) {
  constexpr int64_t W = Simd<A>::kLanes;
  int64_t i = 0;
  for (; i + W <= size; i += W) store(sums + i, log_of_sums<A>(load(sums + i)));
  for (; i < size; ++i) sums[i] = log_of_sums<A>(broadcast<A>(sums[i]))[0];  // the same bits at any place
}

// Statistics of rows with class indices from their sums and expected logits.
template <typename A>
void finish_rows(const MarginSoftmaxArgs<A>& p, int64_t begin, int64_t end) {
  logs_of_sums(p.row_logsum + begin, end - begin);
  for (int64_t i = begin; i < end; ++i) {
    if (is_ignored(p, i)) continue;
    p.row_loss[i] = mass_of(p, p.index[i]) * p.row_logsum[i] - p.row_loss[i];
  }
}

template <typename A>
LTK_INLINE void leave_out(const MarginSoftmaxArgs<A>& p, int64_t i) {
  p.row_max[i] = p.row_logsum[i] = p.row_loss[i] = 0;
  if (p.grad != nullptr) zero_gradient(p, i);
}

// c of row i for an upstream gradient of 1.
template <typename A>
LTK_INLINE A unit_upstream(const MarginSoftmaxArgs<A>& p, int64_t i) {
  return (p.sample_weight == nullptr ? 1 : p.sample_weight[i]) * p.inverse_normalizer;
}

// Rows [begin, end) with class indices, no more than rows_together. What one sweep leaves for the next is kept where
// the statistics go: the sum in row_logsum, whose logarithm waits for finish_rows, and the expected logit in row_loss.
template <typename A>
LTK_INLINE void forward_rows(const MarginSoftmaxArgs<A>& p, int64_t begin, int64_t end, int64_t last, A* scratch) {
  const int64_t size = padded<A>(p.classes);
  for (int64_t i = begin; i < end; ++i) {
    if (is_ignored(p, i)) {
      leave_out(p, i);
      continue;
    }
    prefetch_silenced(p, i, last);
    A* v = scratch + (i - begin) * size;
    const A top = load_row(p, i, v, static_cast<A*>(nullptr));
    const int64_t y = p.index[i];
    const A mass = mass_of(p, y);
    p.row_max[i] = top;
    p.row_loss[i] = mass == 0 ? 0 : mass * (v[y] - top);
  }
  for (int64_t i = begin; i < end; ++i) {
    if (is_ignored(p, i)) continue;
    A* v = scratch + (i - begin) * size;
    const int64_t next = i + (end - begin);
    p.row_logsum[i] = exp_sum(p, v, size, p.row_max[i], prefetch_of(p, i, next < last ? next : i));
  }
  for (int64_t i = begin; p.grad != nullptr && i < end; ++i) {
    if (is_ignored(p, i)) continue;
    const A* v = scratch + (i - begin) * size;
    const int64_t y = p.index[i];
    const A mass = mass_of(p, y);
    const A c = unit_upstream(p, i);
    const A coefficient = c * mass / p.row_logsum[i];
    // A finite coefficient has a finite sum, which has no NaN among its terms.
    const A k = gradient_scale(p, coefficient);
    const bool finite = k - k == 0;
    store_gradient(p, i, v, coefficient, finite, y, v[y] * coefficient - c * mass);
  }
}

// A row with a distribution as its target.
template <typename A>
void forward_dense(const MarginSoftmaxArgs<A>& p, int64_t i, int64_t next, A* v, A* t) {
  if (is_ignored(p, i)) return leave_out(p, i);
  const int64_t size = padded<A>(p.classes);
  const A top = load_row(p, i, v, t);
  const A mass = target_distribution(p, i, t);
  const A expected = expected_logit(t, v, size, top);
  const A sum = exp_sum(p, v, size, top, prefetch_of(p, i, next));
  p.row_max[i] = top;
  p.row_logsum[i] = log_of(sum);
  p.row_loss[i] = mass * p.row_logsum[i] - expected;
  if (p.grad == nullptr) return;
  const A c = unit_upstream(p, i);
  const A coefficient = c * mass / sum;
  for (int64_t j = 0; j < size; ++j) v[j] = v[j] * coefficient - c * t[j];
  zero_removed(p, i, v);
  store_gradient(p, i, v, A(1), /*finite=*/false, int64_t(-1), A(0));
}

// Rows with class indices.
template <typename A>
LTK_INLINE void forward_indexed(const MarginSoftmaxArgs<A>& p, int64_t begin, int64_t end, A* scratch) {
  const int64_t together = rows_together<A>(p.classes);
  for (int64_t i = begin; i < end; i += together) {
    forward_rows(p, i, i + together < end ? i + together : end, end, scratch);
  }
}

template <typename A>
void forward(const MarginSoftmaxArgs<A>& p, int64_t begin, int64_t end, A* scratch) {
  if (is_dense(p)) {
    A* t = scratch + padded<A>(p.classes);
    for (int64_t i = begin; i < end; ++i) forward_dense(p, i, i + 1 < end ? i + 1 : i, scratch, t);
    return;
  }
  const bool has_options = p.mask != nullptr || p.pairwise != nullptr || p.neighbor_offsets != nullptr ||
                           p.margin != nullptr || p.scaled != nullptr || p.weight != nullptr ||
                           p.sample_weight != nullptr;
  if (has_options) {
    forward_indexed(p, begin, end, scratch);
  } else {
    // The same with options that the compiler knows to be absent: asking takes 6 to 8 % of the time at 100 classes.
    MarginSoftmaxArgs<A> usual = p;
    usual.mask = nullptr;
    usual.pairwise = usual.margin = usual.scaled = usual.weight = usual.sample_weight = nullptr;
    usual.neighbor_offsets = nullptr;
    forward_indexed(usual, begin, end, scratch);
  }
  finish_rows(p, begin, end);
}

// G of row i in `v`, exactly 0 in masked and padded entries; `t` is scratch. False for an ignored row. `next` is the
// row whose turn it is after this one.
template <typename A>
bool row_gradient(const MarginSoftmaxArgs<A>& p, int64_t i, int64_t next, A* v, A* t) {
  if (is_ignored(p, i)) return false;
  const int64_t size = padded<A>(p.classes);
  load_row(p, i, v, t);
  softmax_from(p, v, size, p.row_max[i], p.row_logsum[i], prefetch_of(p, i, next));
  const A u = p.sample_weight == nullptr ? 1 : p.sample_weight[i];
  const A c = p.grad_loss[i * p.grad_loss_stride] * u * p.inverse_normalizer;
  const A e = p.grad_lse == nullptr ? 0 : p.grad_lse[i];
  if (is_dense(p)) {
    const A k = c * target_distribution(p, i, t) + e;
    for (int64_t j = 0; j < size; ++j) v[j] = v[j] * k - c * t[j];
  } else {
    const int64_t y = p.index[i];
    const A mass = mass_of(p, y);
    const A k = c * mass + e;
    for (int64_t j = 0; j < size; ++j) v[j] *= k;
    v[y] -= c * mass;
  }
  zero_removed(p, i, v);
  return true;
}

// class_grad rows: da += s f G, db += G, dm -= s t G.
template <typename A>
void add_class_gradients(const MarginSoftmaxArgs<A>& p, int64_t i, const A* g, A* row, A* class_grad) {
  const int64_t C = p.classes;
  A* da = class_grad;
  A* db = class_grad + C;
  A* dm = class_grad + 2 * C;
  widen_row(p.logits, p.logits_type, i * p.logits_stride, C, row);
  // Whatever the logits of classes that are out, NaN times 0 included.
  zero_silenced(p, i, row);
  const bool* mask = mask_row(p, i);
  for (int64_t j = 0; mask != nullptr && j < C; ++j) row[j] = mask[j] ? row[j] : 0;
  for (int64_t j = 0; j < C; ++j) da[j] += row[j] == -kInfinity<A> ? 0 : p.raw_scale * row[j] * g[j];
  for (int64_t j = 0; j < C; ++j) db[j] += g[j];
  if (p.index != nullptr) {
    dm[p.index[i]] -= p.raw_scale * g[p.index[i]];
  } else {
    widen_row(p.probability, p.probability_type, i * p.probability_stride, C, row);
    for (int64_t j = 0; j < C; ++j) dm[j] -= row[j] == 0 ? 0 : p.raw_scale * row[j] * g[j];
  }
}

template <typename A>
void backward(const MarginSoftmaxArgs<A>& p, int64_t begin, int64_t end, A* scratch, A* class_grad) {
  A* v = scratch;
  A* t = scratch + padded<A>(p.classes);
  for (int64_t i = begin; i < end; ++i) {
    if (!row_gradient(p, i, i + 1 < end ? i + 1 : i, v, t)) {
      if (p.grad != nullptr) zero_gradient(p, i);
      continue;
    }
    if (p.grad != nullptr) store_gradient(p, i, v, A(1), /*finite=*/false, int64_t(-1), A(0));
    if (class_grad != nullptr) add_class_gradients(p, i, v, t, class_grad);
  }
}

template <typename A>
void pairwise(const MarginSoftmaxArgs<A>& p, const int64_t* order, int64_t begin, int64_t end, A* scratch, A* grad) {
  A* v = scratch;
  A* t = scratch + padded<A>(p.classes);
  for (int64_t n = begin; n < end; ++n) {
    if (!row_gradient(p, order[n], order[n + 1 < end ? n + 1 : n], v, t)) continue;
    A* out = grad + p.index[order[n]] * p.classes;
    for (int64_t j = 0; j < p.classes; ++j) out[j] += v[j];
  }
}

// out = tau * (log(counts) - log_total)
template <typename A>
void log_prior(const A* counts, int64_t size, A log_total, A tau, A* out) {
  constexpr int64_t W = Simd<A>::kLanes;
  int64_t j = 0;
  for (; j + W <= size; j += W) store(out + j, (log_positive(load(counts + j)) - log_total) * tau);
  for (; j < size; ++j) out[j] = (log_positive(broadcast<A>(counts[j]))[0] - log_total) * tau;
}

}  // namespace

extern const MarginSoftmaxKernels<float> margin_softmax_float = {
    scratch_size<float>, forward<float>, backward<float>, pairwise<float>, log_prior<float>};
extern const MarginSoftmaxKernels<double> margin_softmax_double = {
    scratch_size<double>, forward<double>, backward<double>, pairwise<double>, log_prior<double>};

}  // namespace LTK_CAPABILITY
}  // namespace ltkernels
