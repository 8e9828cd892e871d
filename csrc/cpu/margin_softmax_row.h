// The sweeps over one row that the kernels of margin_softmax_kernel.cpp are made of; included once, and compiled once
// per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../margin_softmax.h"
#include "simd.h"

namespace ltkernels {
namespace LTK_CAPABILITY {
namespace {

template <typename A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());

// Rows in scratch are padded to whole vectors.
template <typename A>
LTK_INLINE int64_t padded(int64_t classes) {
  constexpr int64_t W = Simd<A>::kLanes;
  return (classes + W - 1) / W * W;
}

// ---------------------------------------------------------------------------------------------------- sweep 1: load

enum class Affine { kScale, kBias, kScaleBias };  // s * f, s * f + b, (s * a) * f + b

template <Affine kAffine, typename A, typename T>
LTK_INLINE A load_adjusted(const T* logits, const MarginSoftmaxArgs<A>& p, A* v) {
  constexpr int64_t W = Simd<A>::kLanes;
  const int64_t C = p.classes;
  const A* scaled = p.scaled;
  const A* bias = p.bias;
  const A scale = p.scale;
  Vec<A> top = broadcast<A>(-kInfinity<A>);
  if (C < W) {
    store(v, top);
    for (int64_t j = 0; j < C; ++j) {
      A x = widen(logits[j]);
      if constexpr (kAffine == Affine::kScale) x = x * scale;
      if constexpr (kAffine == Affine::kBias) x = x * scale + bias[j];
      if constexpr (kAffine == Affine::kScaleBias) x = x * scaled[j] + bias[j];
      v[j] = x;
    }
    return lane_max<A>(larger(load(v), top));
  }
  auto adjust = [&](Vec<A> x, int64_t j) __attribute__((always_inline)) {
    if constexpr (kAffine == Affine::kScale) x = x * scale;
    if constexpr (kAffine == Affine::kBias) x = x * scale + load(bias + j);
    if constexpr (kAffine == Affine::kScaleBias) x = x * load(scaled + j) + load(bias + j);
    return x;
  };
  Vec<A> other = top;
  int64_t j = for_each_pair<A>(C, [&](int64_t j) __attribute__((always_inline)) {
    const auto [low, high] = load_pair(logits + j);
    const Vec<A> x = adjust(low, j), y = adjust(high, j + W);
    store(v + j, x);
    store(v + j + W, y);
    top = larger(x, top);
    other = larger(y, other);
  });
  if (j + W <= C) {
    const Vec<A> x = adjust(load(logits + j), j);
    store(v + j, x);
    top = larger(x, top);
    j += W;
  }
  if (j < C) {
    // The last C - j values are the upper lanes of the last whole vector: moved down, and padded. Stored as they lie,
    // overlapping, the next sweep would wait for both stores to reach the cache.
    const auto lanes = lane_numbers<A>();
    const auto missing = static_cast<typename Simd<A>::Lane>(j + W - C);
    const Vec<A> x = shuffle<A>(adjust(load(logits + C - W), C - W), (lanes + missing) & (W - 1));
    const Vec<A> padding = broadcast<A>(-kInfinity<A>);
    const Vec<A> y = lanes + missing < W ? x : padding;
    store(v + j, y);
    other = larger(y, other);
  }
  return lane_max<A>(larger(top, other));
}

template <typename A, typename T>
LTK_INLINE A load_row_as(const MarginSoftmaxArgs<A>& p, int64_t i, A* v) {
  const T* logits = static_cast<const T*>(p.logits) + i * p.logits_stride;
  if (p.scaled != nullptr) return load_adjusted<Affine::kScaleBias>(logits, p, v);
  if (p.bias != nullptr) return load_adjusted<Affine::kBias>(logits, p, v);
  return load_adjusted<Affine::kScale>(logits, p, v);
}

template <typename A>
LTK_INLINE A max_of(const A* v, int64_t size) {
  constexpr int64_t W = Simd<A>::kLanes;
  Vec<A> top = broadcast<A>(-kInfinity<A>), tops[3] = {top, top, top};  // not load(v): a NaN there would stay
  int64_t j = 0;
  for (; j + 4 * W <= size; j += 4 * W) {
    top = larger(load(v + j), top);
    for (int k = 0; k < 3; ++k) tops[k] = larger(load(v + j + (k + 1) * W), tops[k]);
  }
  for (; j < size; j += W) top = larger(load(v + j), top);
  return lane_max<A>(larger(larger(top, tops[0]), larger(tops[1], tops[2])));
}

// Row i of a matrix in any type, as acc_t.
template <typename A, typename T>
void widen_row(const void* matrix, int64_t offset, int64_t classes, A* out) {
  const T* row = static_cast<const T*>(matrix) + offset;
  for (int64_t j = 0; j < classes; ++j) out[j] = static_cast<A>(widen(row[j]));
}

template <typename A>
void widen_row(const void* matrix, ElementType type, int64_t offset, int64_t classes, A* out) {
  switch (type) {
    case ElementType::kFloat: return widen_row<A, float>(matrix, offset, classes, out);
    case ElementType::kDouble: return widen_row<A, double>(matrix, offset, classes, out);
    case ElementType::kBFloat16: return widen_row<A, BFloat16>(matrix, offset, classes, out);
    case ElementType::kHalf: return widen_row<A, Half>(matrix, offset, classes, out);
  }
}

template <typename A>
const bool* mask_row(const MarginSoftmaxArgs<A>& p, int64_t i) {
  return p.mask == nullptr ? nullptr : p.mask + i * p.mask_stride;
}

// Calls f(j) for each silenced class of row i.
template <typename A, typename F>
LTK_INLINE void for_each_silenced(const MarginSoftmaxArgs<A>& p, int64_t i, F f) {
  if (p.neighbor_offsets == nullptr) return;
  const int64_t y = p.row_class != nullptr ? p.row_class[i] : p.index[i];
  for (int64_t e = p.neighbor_offsets[y]; e < p.neighbor_offsets[y + 1]; ++e) f(int64_t(p.neighbor_classes[e]));
  if (y < p.back_from) return;
  for (int64_t j = p.back_from; j < p.classes; ++j) {
    if (j != y) f(j);
  }
}

// Fetches what for_each_silenced reads for the two rows after i: two dependent trips to memory, as long as a short row.
template <typename A>
LTK_INLINE void prefetch_silenced(const MarginSoftmaxArgs<A>& p, int64_t i, int64_t end) {
  if (p.neighbor_offsets == nullptr) return;
  const int64_t* rows = p.row_class != nullptr ? p.row_class : p.index;
  const auto known = [&](int64_t row) { return row < end && rows[row] >= 0; };  // not an ignored row
  if (known(i + 2)) __builtin_prefetch(p.neighbor_offsets + rows[i + 2]);
  if (known(i + 1) && rows[i + 1] < p.classes) __builtin_prefetch(p.neighbor_classes + p.neighbor_offsets[rows[i + 1]]);
}

// Sets silenced entries of a row of masses or gradients to 0, if they are out of the distribution altogether.
template <typename A, typename T>
LTK_INLINE void zero_silenced(const MarginSoftmaxArgs<A>& p, int64_t i, T* row) {
  if (p.log_neighbor_weight == -kInfinity<A>) {
    for_each_silenced(p, i, [&](int64_t j) { row[j] = narrow<T>(A(0)); });
  }
}

// v of row i with its maximum; `t` is scratch for a row of probabilities.
template <typename A>
LTK_INLINE A load_row(const MarginSoftmaxArgs<A>& p, int64_t i, A* v, A* t) {
  const int64_t C = p.classes;
  A top;
  if constexpr (sizeof(A) == 8) {
    top = load_row_as<A, double>(p, i, v);
  } else {
    switch (p.logits_type) {
      case ElementType::kBFloat16: top = load_row_as<A, BFloat16>(p, i, v); break;
      case ElementType::kHalf: top = load_row_as<A, Half>(p, i, v); break;
      default: top = load_row_as<A, float>(p, i, v);
    }
  }
  const bool* mask = mask_row(p, i);
  const bool spread_margin = p.margin != nullptr && p.index == nullptr;
  if (p.pairwise != nullptr || mask != nullptr || spread_margin) {
    if (p.pairwise != nullptr) {
      const A* delta = p.pairwise + p.index[i] * C;
      for (int64_t j = 0; j < C; ++j) v[j] += delta[j];
    }
    if (spread_margin) {
      widen_row(p.probability, p.probability_type, i * p.probability_stride, C, t);
      for (int64_t j = 0; j < C; ++j) v[j] -= p.margin[j] * t[j];
    }
    if (mask != nullptr) {
      for (int64_t j = 0; j < C; ++j) v[j] = mask[j] ? v[j] : -kInfinity<A>;
    }
    top = max_of(v, padded<A>(C));
  }
  if (p.neighbor_offsets != nullptr) {
    // Excluded before the maximum is known: a silenced logit far above the others would push their exp below 0.
    bool top_lost = false;
    const bool excluded = p.log_neighbor_weight == -kInfinity<A>;
    for_each_silenced(p, i, [&](int64_t j) {
      top_lost |= v[j] >= top;
      v[j] = excluded ? -kInfinity<A> : v[j] + p.log_neighbor_weight;
    });
    if (top_lost) top = max_of(v, padded<A>(C));
  }
  if (p.margin != nullptr && p.index != nullptr) {
    const int64_t y = p.index[i];
    const A before = v[y];
    v[y] = before - p.margin[y];
    // The maximum must be that of the adjusted row: exp would overflow or vanish under a large margin.
    if (v[y] > top) top = v[y];
    else if (before == top && v[y] < before) top = max_of(v, padded<A>(C));
  }
  return top;
}

// ------------------------------------------------------------------------------------------------------ sweep 2: exp

// Rows of logits or gradients to prefetch, a cache line at a time: exp keeps the arithmetic units busy for long while
// memory is idle, and the two other sweeps the other way round.
struct Prefetch {
  const char* load;   // the logits of the next row
  const char* store;  // the gradient of this row

  // The lines that hold kElements of kSize bytes each from element j on.
  template <bool kStore, int64_t kElements, int64_t kSize>
  LTK_INLINE void lines(int64_t j) const {
    constexpr int64_t kLine = 64;
#pragma GCC unroll 8
    for (int64_t k = 0; k < kElements * kSize; k += kLine) {
      __builtin_prefetch(load + j * kSize + k, 0, 2);
      if constexpr (kStore) __builtin_prefetch(store + j * kSize + k, 1, 2);
    }
  }
};

// Whether what exp gives is rounded to 16 bits in the end, and a shorter exp is as good.
template <typename A>
LTK_INLINE bool is_narrow(const MarginSoftmaxArgs<A>& p) {
  return p.logits_type == ElementType::kBFloat16 || p.logits_type == ElementType::kHalf;
}

// v -> exp(v - shift) of kVectors vectors, if kStore says so; their sum goes to two in turn.
template <bool kStore, bool kNarrow, int kVectors, typename A>
LTK_INLINE void exp_sum_of(A* v, Vec<A> shift, Vec<A> (&sums)[2]) {
  constexpr int64_t W = Simd<A>::kLanes;
  Vec<A> e[kVectors];
  unrolled<kVectors>([&](int k) { e[k] = load(v + k * W) - shift; });
  exp_nonpositive<kNarrow>(e);
  unrolled<kVectors>([&](int k) {
    if constexpr (kStore) store(v + k * W, e[k]);
    sums[k % 2] += e[k];
  });
}

template <bool kStore, bool kNarrow, typename A>
LTK_INLINE A exp_sum_as(A* v, int64_t size, A shift, Prefetch prefetch) {
  const Vec<A> m = broadcast<A>(shift);
  Vec<A> sums[2] = {};
  for_each_group<A>(size, [&](int64_t j, auto number) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(number)::value;
    prefetch.lines<kStore, kVectors * Simd<A>::kLanes, kNarrow ? 2 : sizeof(A)>(j);
    exp_sum_of<kStore, kNarrow, kVectors>(v + j, m, sums);
  });
  return lane_sum<A>(sums[0] + sums[1]);
}

// v -> exp(v - shift), if a gradient needs it, and its sum.
template <typename A>
LTK_INLINE A exp_sum(const MarginSoftmaxArgs<A>& p, A* v, int64_t size, A shift, Prefetch prefetch) {
  if constexpr (sizeof(A) == 4) {
    if (is_narrow(p)) {
      return p.grad != nullptr ? exp_sum_as<true, true>(v, size, shift, prefetch)
                               : exp_sum_as<false, true>(v, size, shift, prefetch);
    }
  }
  return p.grad != nullptr ? exp_sum_as<true, false>(v, size, shift, prefetch)
                           : exp_sum_as<false, false>(v, size, shift, prefetch);
}

template <bool kNarrow, int kVectors, typename A>
LTK_INLINE void softmax_of(A* v, Vec<A> shift, Vec<A> logsum) {
  constexpr int64_t W = Simd<A>::kLanes;
  Vec<A> e[kVectors];
  unrolled<kVectors>([&](int k) { e[k] = (load(v + k * W) - shift) - logsum; });
  exp_nonpositive<kNarrow>(e);
  unrolled<kVectors>([&](int k) { store(v + k * W, e[k]); });
}

template <bool kNarrow, typename A>
LTK_INLINE void softmax_from_as(A* v, int64_t size, A shift, A logsum, Prefetch prefetch) {
  const Vec<A> m = broadcast<A>(shift), l = broadcast<A>(logsum);
  for_each_group<A>(size, [&](int64_t j, auto number) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(number)::value;
    prefetch.lines<true, kVectors * Simd<A>::kLanes, kNarrow ? 2 : sizeof(A)>(j);
    softmax_of<kNarrow, kVectors>(v + j, m, l);
  });
}

template <typename A>
LTK_INLINE void softmax_from(const MarginSoftmaxArgs<A>& p, A* v, int64_t size, A shift, A logsum, Prefetch prefetch) {
  if constexpr (sizeof(A) == 4) {
    if (is_narrow(p)) return softmax_from_as<true>(v, size, shift, logsum, prefetch);
  }
  softmax_from_as<false>(v, size, shift, logsum, prefetch);
}

// ---------------------------------------------------------------------------------------------------- sweep 3: store

// out = g * k * scaled. `finite`: neither is g NaN nor k NaN or infinite.
template <typename A, typename T>
LTK_INLINE void store_scaled(const A* g, A k, bool finite, const A* scaled, int64_t C, T* out) {
  constexpr int64_t W = Simd<A>::kLanes;
  if (C < W) {
    for (int64_t j = 0; j < C; ++j) out[j] = narrow<T>(scaled == nullptr ? g[j] * k : g[j] * k * scaled[j]);
    return;
  }
  auto scale = [&](Vec<A> x, int64_t j)
                   __attribute__((always_inline)) { return scaled == nullptr ? x * k : x * k * load(scaled + j); };
  int64_t j = 0;
  if (finite) {
    j = for_each_pair<A>(C, [&](int64_t j) __attribute__((always_inline)) {
      store_pair(out + j, scale(load(g + j), j), scale(load(g + j + W), j + W));
    });
  }
  for (; j + W <= C; j += W) store(out + j, scale(load(g + j), j));
  if (j < C) {
    // The last vector of `out`, in part for the second time, from two aligned loads: an unaligned one would wait for
    // the stores of the sweep before to reach the cache.
    const auto shift = static_cast<typename Simd<A>::Lane>(C - j);
    store(out + C - W, scale(shuffle<A>(load(g + j - W), load(g + j), lane_numbers<A>() + shift), C - W));
  }
}

// What multiplies a whole row of the gradient.
template <typename A>
LTK_INLINE A gradient_scale(const MarginSoftmaxArgs<A>& p, A coefficient) {
  return p.scaled == nullptr ? coefficient * p.scale : coefficient;
}

// grad[i, :] = coefficient * s * a * g, then the target's entry if `y` >= 0, then exact zeros where masked.
template <typename A, typename T>
LTK_INLINE void store_gradient_as(
    const MarginSoftmaxArgs<A>& p, int64_t i, const A* g, A coefficient, bool finite, int64_t y, A at_target) {
  T* out = static_cast<T*>(p.grad) + i * p.grad_stride;
  const A k = gradient_scale(p, coefficient);
  store_scaled(g, k, finite, p.scaled, p.classes, out);
  if (y >= 0) out[y] = narrow<T>(at_target * (p.scaled == nullptr ? p.scale : p.scaled[y]));
  if (const bool* mask = mask_row(p, i)) {
    if (y >= 0 && !mask[y]) out[y] = narrow<T>(A(0));
    for (int64_t j = 0; !finite && j < p.classes; ++j) {  // 0 * coefficient may be NaN
      if (!mask[j]) out[j] = narrow<T>(A(0));
    }
  }
  if (k - k != 0) zero_silenced(p, i, out);
}

template <typename A>
LTK_INLINE void store_gradient(
    const MarginSoftmaxArgs<A>& p, int64_t i, const A* g, A coefficient, bool finite, int64_t y, A at_target) {
  if constexpr (sizeof(A) == 8) {
    store_gradient_as<A, double>(p, i, g, coefficient, finite, y, at_target);
  } else {
    switch (p.logits_type) {
      case ElementType::kBFloat16: return store_gradient_as<A, BFloat16>(p, i, g, coefficient, finite, y, at_target);
      case ElementType::kHalf: return store_gradient_as<A, Half>(p, i, g, coefficient, finite, y, at_target);
      default: return store_gradient_as<A, float>(p, i, g, coefficient, finite, y, at_target);
    }
  }
}

LTK_INLINE int64_t element_size(ElementType type) {
  return type == ElementType::kDouble ? 8 : type == ElementType::kFloat ? 4 : 2;
}

template <typename A>
LTK_INLINE void zero_gradient(const MarginSoftmaxArgs<A>& p, int64_t i) {
  const int64_t size = element_size(p.logits_type);
  std::memset(static_cast<char*>(p.grad) + i * p.grad_stride * size, 0, p.classes * size);
}

// ----------------------------------------------------------------------------------------------- target distribution

// t' of row i without u, in `t` (zeros in the padding), for probabilities and smoothed indices. Returns T.
// The sum of term(j) over vectors that begin at j, halves added to halves: terms of about the same size, such as those
// of label smoothing, lose digits in a running sum of many, and always in the same direction.
template <typename A, typename F>
Vec<A> pairwise_sum(int64_t begin, int64_t end, const F& term) {
  constexpr int64_t W = Simd<A>::kLanes;
  constexpr int64_t kRun = 32 * W;
  if (end - begin > kRun) {
    const int64_t middle = begin + (end - begin) / (2 * W) * W;
    return pairwise_sum<A>(begin, middle, term) + pairwise_sum<A>(middle, end, term);
  }
  Vec<A> sum = {};
  for (int64_t j = begin; j < end; j += W) sum += term(j);
  return sum;
}

template <typename A>
A target_distribution(const MarginSoftmaxArgs<A>& p, int64_t i, A* t) {
  const int64_t C = p.classes;
  const bool* mask = mask_row(p, i);
  int64_t allowed = C;
  if (mask != nullptr) {
    allowed = 0;
    for (int64_t j = 0; j < C; ++j) allowed += mask[j];
  }
  const A spread = allowed > 0 ? p.smoothing / static_cast<A>(allowed) : 0;
  if (p.index == nullptr) {
    widen_row(p.probability, p.probability_type, i * p.probability_stride, C, t);
    for (int64_t j = 0; j < C; ++j) t[j] = (1 - p.smoothing) * t[j] + spread;
  } else {
    for (int64_t j = 0; j < C; ++j) t[j] = spread;
  }
  for (int64_t j = 0; mask != nullptr && j < C; ++j) t[j] = mask[j] ? t[j] : 0;
  if (p.index != nullptr) t[p.index[i]] += 1 - p.smoothing;
  zero_silenced(p, i, t);
  for (int64_t j = 0; p.weight != nullptr && j < C; ++j) t[j] *= p.weight[j];
  for (int64_t j = C; j < padded<A>(C); ++j) t[j] = 0;
  return lane_sum<A>(pairwise_sum<A>(0, padded<A>(C), [&](int64_t j) { return load(t + j); }));
}

// sum_j t'[j] * (v[j] - M), where a term with t' = 0 is 0.
template <typename A>
A expected_logit(const A* t, const A* v, int64_t size, A top) {
  const auto term = [&](int64_t j) {
    const Vec<A> mass = load(t + j);
    return mass == 0 ? Vec<A>{} : mass * (load(v + j) - broadcast<A>(top));
  };
  return lane_sum<A>(pairwise_sum<A>(0, size, term));
}

template <typename A>
LTK_INLINE bool is_dense(const MarginSoftmaxArgs<A>& p) {
  return p.index == nullptr || p.smoothing != 0;
}

}  // namespace
}  // namespace LTK_CAPABILITY
}  // namespace ltkernels
