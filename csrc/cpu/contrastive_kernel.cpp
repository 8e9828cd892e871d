// The sweeps over a tile of similarities that the contrastive operators are made of; ../contrastive.h has the formulas.
//
// Rows of a tile are padded to whole vectors with x = -inf, which takes part in nothing. The tile stays in the L2
// cache from one sweep to the next. Rare options (key bias, pair margins, rules about labels) go through a second
// tile of logits, so that the sweeps that everybody uses have no switch inside.
//
// This file is compiled once per instruction set and must not include torch or define a symbol outside
// LTK_CAPABILITY that is not static: see simd.h.
#include "../contrastive.h"
#include "simd.h"

namespace ltkernels {
namespace LTK_CAPABILITY {
namespace {

template <typename A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());

template <typename A>
using Tile = ContrastiveTile<A>;
template <typename A>
using Mirror = ContrastiveMirror<A>;

// Lanes of labels as wide as those of A.
template <typename A>
LTK_INLINE typename Simd<A>::Int load_labels(const int32_t* p) {
  if constexpr (sizeof(A) == 4) {
    return load_as<typename Simd<A>::Int>(p);
  } else {
    typename Simd<A>::Int labels;
    for (int k = 0; k < Simd<A>::kLanes; ++k) labels[k] = p[k];
    return labels;
  }
}

// -1 in the lanes of keys that have the row's label and that the row sees, NaN included.
template <typename A>
LTK_INLINE typename Simd<A>::Int positive_lanes(const Tile<A>& t, typename Simd<A>::Int label, Vec<A> x, int64_t j) {
  return (load_labels<A>(t.key_label + j) == label) & (x != -kInfinity<A>);
}

template <typename A>
LTK_INLINE typename Simd<A>::Int row_label(const Tile<A>& t, int64_t i) {
  // -1 is nobody's label: a row that has it is given one that no key has.
  const int32_t label = t.label[i] < 0 ? INT32_MIN : t.label[i];
  return typename Simd<A>::Int{} + static_cast<typename Simd<A>::Lane>(label);
}

// Calls f(row, logits of the row, factor) where factor * logits = l.
template <typename A, typename F>
LTK_INLINE void for_each_row(const Tile<A>& t, F f) {
  for (int64_t i = 0; i < t.rows; ++i) {
    if (t.logits == nullptr) f(i, t.x + i * t.stride, t.inverse_temperature[i]);
    else f(i, t.logits + i * t.stride, A(1));
  }
}

template <typename A>
void prepare(const Tile<A>& t) {
  for (int64_t i = 0; t.allowed != nullptr && i < t.rows; ++i) {
    const bool* allowed = t.allowed + i * t.allowed_row_stride;
    A* x = t.x + i * t.stride;
    for (int64_t j = 0; j < t.keys; ++j) x[j] = allowed[j * t.allowed_key_stride] ? x[j] : -kInfinity<A>;
  }
  for (int64_t i = 0; t.logits != nullptr && i < t.rows; ++i) {
    const A* x = t.x + i * t.stride;
    A* l = t.logits + i * t.stride;
    const A factor = t.inverse_temperature[i];
    for (int64_t j = 0; j < t.stride; ++j) l[j] = x[j] * factor;
    for (int64_t j = 0; t.key_bias != nullptr && j < t.keys; ++j) l[j] += t.key_bias[j];
    if (t.pair_margin != nullptr && t.label[i] >= 0) {
      const A* margin = t.pair_margin + t.label[i] * t.num_labels;
      for (int64_t j = 0; j < t.keys; ++j) l[j] += t.key_label[j] >= 0 ? margin[t.key_label[j]] : A(0);
    }
    if (t.rule == LabelRule::kNone) continue;
    const bool same_only = t.rule == LabelRule::kSameOnly;
    for (int64_t j = 0; j < t.keys; ++j) {
      const bool same = t.label[i] >= 0 && t.key_label[j] == t.label[i];
      l[j] = same == same_only ? l[j] : -kInfinity<A>;
    }
  }
}

template <typename A>
void accumulate(const Tile<A>& t, A* row_max, A* row_sum) {
  constexpr int64_t W = Simd<A>::kLanes;
  for_each_row(t, [&](int64_t i, const A* l, A factor) __attribute__((always_inline)) {
    Vec<A> top = broadcast<A>(-kInfinity<A>), other = top;
    for (int64_t j = 0; j < t.stride; j += 2 * W) {
      top = larger(load(l + j), top);
      other = larger(load(l + j + W), other);
    }
    const A largest = rounded(lane_max<A>(larger(top, other)) * factor);
    if (largest > row_max[i]) {
      row_sum[i] *= row_max[i] == -kInfinity<A> ? A(0) : static_cast<A>(__builtin_exp(row_max[i] - largest));
      row_max[i] = largest;
    }
    if (row_max[i] == -kInfinity<A>) {
      // Nothing so far, or NaN alone: the maximum passes over it, the sum must not. A temperature may be NaN, too.
      for (int64_t j = 0; j < t.keys; ++j) {
        const A z = l[j] == -kInfinity<A> ? A(0) : l[j] * factor;
        row_sum[i] += z != z ? z : A(0);
      }
      return;
    }
    const Vec<A> m = broadcast<A>(row_max[i]), f = broadcast<A>(factor);
    Vec<A> sum = {}, more = {};
    for (int64_t j = 0; j < t.stride; j += 2 * W) {
      sum += exp_nonpositive(rounded(load(l + j) * f) - m);
      more += exp_nonpositive(rounded(load(l + j + W) * f) - m);
    }
    row_sum[i] += lane_sum<A>(sum + more);
  });
}

// What may be subtracted from logits of which it is the maximum: 0 if there is none.
template <typename A>
LTK_INLINE Vec<A> finite_maximum(Vec<A> max) {
  return max == -kInfinity<A> ? Vec<A>{} : max;
}

// Joins the maximum of a row's logits to that found before, and scales the sum to it.
template <typename A>
LTK_INLINE void raise_maximum(A largest, A& max, A& sum) {
  if (!(largest > max)) return;
  sum *= max == -kInfinity<A> ? A(0) : static_cast<A>(__builtin_exp(max - largest));
  max = largest;
}

template <typename A>
LTK_INLINE void raise_maxima(const A* largest_x, const A* factor, int64_t keys, A* max, A* sum) {
  for (int64_t j = 0; j < keys; j += Simd<A>::kLanes) {
    const Vec<A> known = load(max + j), top = larger(rounded(load(largest_x + j) * load(factor + j)), known);
    store(sum + j, load(sum + j) * exp_nonpositive(known - finite_maximum<A>(top)));
    store(max + j, top);
  }
}

template <typename A>
void accumulate_both(const Tile<A>& t, const Mirror<A>& mirror, A* row_max, A* row_sum, A* key_max, A* key_sum) {
  constexpr int64_t W = Simd<A>::kLanes;
  const A* key_factor = mirror.inverse_temperature;
  A* key_top = mirror.scratch;
  for (int64_t j = 0; j < t.stride; ++j) key_top[j] = -kInfinity<A>;
  for (int64_t i = 0; i < t.rows; ++i) {
    const A* x = t.x + i * t.stride;
    Vec<A> top = broadcast<A>(-kInfinity<A>);
    for (int64_t j = 0; j < t.stride; j += W) {
      const Vec<A> value = load(x + j);
      top = larger(value, top);
      store(key_top + j, larger(value, load(key_top + j)));
    }
    raise_maximum<A>(rounded(lane_max<A>(top) * t.inverse_temperature[i]), row_max[i], row_sum[i]);
  }
  raise_maxima<A>(key_top, key_factor, t.stride, key_max, key_sum);
  for (int64_t i = 0; i < t.rows; ++i) {
    const A* x = t.x + i * t.stride;
    const Vec<A> m = finite_maximum<A>(broadcast<A>(row_max[i])), f = broadcast<A>(t.inverse_temperature[i]);
    Vec<A> sum = {};
    for (int64_t j = 0; j < t.stride; j += W) {
      const Vec<A> value = load(x + j);
      sum += exp_nonpositive(rounded(value * f) - m);
      const Vec<A> key_m = finite_maximum<A>(load(key_max + j));
      store(key_sum + j, load(key_sum + j) + exp_nonpositive(rounded(value * load(key_factor + j)) - key_m));
    }
    row_sum[i] += lane_sum<A>(sum);
  }
}

template <typename A>
void positives(const Tile<A>& t, A* sum, A* count) {
  constexpr int64_t W = Simd<A>::kLanes;
  for (int64_t i = 0; i < t.rows; ++i) {
    const A* x = t.x + i * t.stride;
    const auto label = row_label(t, i);
    Vec<A> total = {};
    typename Simd<A>::Int found = {};
    for (int64_t j = 0; j < t.stride; j += W) {
      const Vec<A> value = load(x + j);
      const auto positive = positive_lanes(t, label, value, j);
      total += positive ? value : Vec<A>{};
      found -= positive;
    }
    sum[i] += lane_sum<A>(total);
    for (int k = 0; k < W; ++k) count[i] += static_cast<A>(found[k]);
  }
}

template <typename A>
void positives_both(const Tile<A>& t, A* row_sum, A* row_count, A* key_sum, A* key_count) {
  constexpr int64_t W = Simd<A>::kLanes;
  for (int64_t i = 0; i < t.rows; ++i) {
    const A* x = t.x + i * t.stride;
    const auto label = row_label(t, i);
    Vec<A> total = {}, found = {};
    for (int64_t j = 0; j < t.stride; j += W) {
      const Vec<A> value = load(x + j);
      const auto positive = positive_lanes(t, label, value, j);
      const Vec<A> product = positive ? value : Vec<A>{}, one = positive ? broadcast<A>(1) : Vec<A>{};
      total += product, found += one;
      store(key_sum + j, load(key_sum + j) + product);
      store(key_count + j, load(key_count + j) + one);
    }
    row_sum[i] += lane_sum<A>(total);
    row_count[i] += lane_sum<A>(found);
  }
}

template <typename A, typename F>
LTK_INLINE void for_each_positive(const Tile<A>& t, int64_t i, F f) {
  if (t.label[i] < 0) return;
  const A* x = t.x + i * t.stride;
  for (int64_t j = 0; j < t.keys; ++j) {
    if (t.key_label[j] == t.label[i] && x[j] != -kInfinity<A>) f(j, rounded(x[j] * t.inverse_temperature[i]));
  }
}

template <typename A>
LTK_INLINE A sigmoid(A z) {
  return A(1) / (A(1) + static_cast<A>(__builtin_exp(-z)));
}

template <typename A>
void softplus(const Tile<A>& t, const A* lse, A* loss, A* slope) {
  for (int64_t i = 0; i < t.rows; ++i) {
    if (lse[i] == -kInfinity<A>) continue;
    for_each_positive(t, i, [&](int64_t, A s) {
      const A gap = lse[i] - s;
      loss[i] += (gap > 0 ? gap : 0) + static_cast<A>(__builtin_log1p(__builtin_exp(gap > 0 ? -gap : gap)));
      slope[i] += sigmoid(gap);
    });
  }
}

// exp(l - lse), 0 for rows that have no key.
template <typename A>
LTK_INLINE Vec<A> probability(const A* l, A factor, A lse) {
  if (lse == -kInfinity<A>) return Vec<A>{};
  // Rounding may leave the largest logit a little above the log-sum-exp.
  const Vec<A> z = rounded(load(l) * factor) - lse;
  return exp_nonpositive(z > 0 ? Vec<A>{} : z);
}

template <typename A>
void expected(const Tile<A>& t, const A* lse, A* expectation) {
  constexpr int64_t W = Simd<A>::kLanes;
  for_each_row(t, [&](int64_t i, const A* l, A factor) __attribute__((always_inline)) {
    const A* x = t.x + i * t.stride;
    Vec<A> sum = {};
    for (int64_t j = 0; j < t.stride; j += W) {
      const Vec<A> p = probability(l + j, factor, lse[i]);
      sum += p == 0 ? Vec<A>{} : p * load(x + j);
    }
    expectation[i] += lane_sum<A>(sum) * t.inverse_temperature[i];
  });
}

template <typename A>
void key_sums(const Tile<A>& t, const A* lse, const A* row_weight, A* sums) {
  constexpr int64_t W = Simd<A>::kLanes;
  for_each_row(t, [&](int64_t i, const A* l, A factor) __attribute__((always_inline)) {
    for (int64_t j = 0; j < t.stride; j += W) {
      store(sums + j, load(sums + j) + probability(l + j, factor, lse[i]) * row_weight[i]);
    }
  });
}

template <bool kLabels, typename A>
LTK_INLINE void gradient_of_row(
    const Tile<A>& t, int64_t i, const A* l, A factor, const ContrastiveCoefficients<A>& c, A* products) {
  constexpr int64_t W = Simd<A>::kLanes;
  A* x = t.x + i * t.stride;
  typename Simd<A>::Int label = {};
  if constexpr (kLabels) label = row_label(t, i);
  const A negative = c.negative[i], positive = kLabels ? c.positive[i] : A(0), lse = c.lse[i];
  Vec<A> product = {};
  for (int64_t j = 0; j < t.stride; j += W) {
    const Vec<A> value = load(x + j);
    Vec<A> g = probability(l + j, factor, lse) * negative;
    if constexpr (kLabels) g -= positive_lanes(t, label, value, j) ? broadcast<A>(positive) : Vec<A>{};
    product += g == 0 ? Vec<A>{} : g * value;
    store(x + j, g);
  }
  products[i] += lane_sum<A>(product);
}

template <typename A>
void gradient(const Tile<A>& t, const ContrastiveCoefficients<A>& c, A* products) {
  const bool labels = t.label != nullptr && c.positive != nullptr;
  for_each_row(t, [&](int64_t i, const A* l, A factor) __attribute__((always_inline)) {
    if (!labels) return gradient_of_row<false>(t, i, l, factor, c, products);
    if (!c.own) return gradient_of_row<true>(t, i, l, factor, c, products);
    // Positives are few: their sigmoids are taken one by one, before x is overwritten by the gradient of the others.
    A* x = t.x + i * t.stride;
    const A coefficient = c.positive[i], lse = c.lse[i];
    A* kept = t.logits + i * t.stride;  // -inf at positives: room for their gradients
    for_each_positive(t, i, [&](int64_t j, A s) {
      kept[j] = lse == -kInfinity<A> ? A(0) : -coefficient * sigmoid(lse - s);
      products[i] += kept[j] * x[j];
      x[j] = -kInfinity<A>;
    });
    for (int64_t j = 0; j < t.keys; ++j) {
      const bool same = t.label[i] >= 0 && t.key_label[j] == t.label[i];
      if (same) {
        x[j] = kept[j] == -kInfinity<A> ? A(0) : kept[j];
        continue;
      }
      const A z = kept[j] - lse;
      const A g = lse == -kInfinity<A> ? A(0) : c.negative[i] * static_cast<A>(__builtin_exp(z));
      products[i] += g == 0 ? A(0) : g * x[j];
      x[j] = g;
    }
    for (int64_t j = t.keys; j < t.stride; ++j) x[j] = 0;
  });
}

template <bool kLabels, typename A>
LTK_INLINE void gradient_of_both(
    const Tile<A>& t, const Mirror<A>& mirror, const ContrastiveCoefficients<A>& rows,
    const ContrastiveCoefficients<A>& keys, A* h, A* row_products, A* key_products) {
  constexpr int64_t W = Simd<A>::kLanes;
  for (int64_t i = 0; i < t.rows; ++i) {
    const A* x = t.x + i * t.stride;
    typename Simd<A>::Int label = {};
    if constexpr (kLabels) label = row_label(t, i);
    const Vec<A> factor = broadcast<A>(t.inverse_temperature[i]), lse = broadcast<A>(rows.lse[i]);
    const Vec<A> negative = broadcast<A>(rows.negative[i]), positive = broadcast<A>(kLabels ? rows.positive[i] : A(0));
    Vec<A> product = {};
    for (int64_t j = 0; j < t.stride; j += W) {
      const Vec<A> value = load(x + j);
      const Vec<A> z = rounded(value * factor) - lse,
                   mirror_z = rounded(value * load(mirror.inverse_temperature + j)) - load(keys.lse + j);
      Vec<A> g = exp_nonpositive(z > 0 ? Vec<A>{} : z) * negative;
      Vec<A> mirror_g = exp_nonpositive(mirror_z > 0 ? Vec<A>{} : mirror_z) * load(keys.negative + j);
      if constexpr (kLabels) {
        const auto same = positive_lanes(t, label, value, j);
        g -= same ? positive : Vec<A>{};
        mirror_g -= same ? load(keys.positive + j) : Vec<A>{};
      }
      product += g == 0 ? Vec<A>{} : g * value;
      store(key_products + j, load(key_products + j) + (mirror_g == 0 ? Vec<A>{} : mirror_g * value));
      store(h + i * t.stride + j, g + mirror_g);
    }
    row_products[i] += lane_sum<A>(product);
  }
}

template <typename A>
void gradient_both(
    const Tile<A>& t, const Mirror<A>& mirror, const ContrastiveCoefficients<A>& rows,
    const ContrastiveCoefficients<A>& keys, A* h, A* row_products, A* key_products) {
  const bool labels = t.label != nullptr && rows.positive != nullptr;
  if (labels) gradient_of_both<true>(t, mirror, rows, keys, h, row_products, key_products);
  else gradient_of_both<false>(t, mirror, rows, keys, h, row_products, key_products);
}

// In squares that stay in registers or L1.
template <bool kAdd, typename A>
LTK_INLINE void transpose_to(const A* x, int64_t rows, int64_t keys, int64_t stride, A* out, int64_t out_stride) {
  constexpr int64_t B = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += B) {
    const int64_t i1 = i0 + B < rows ? i0 + B : rows;
    for (int64_t j0 = 0; j0 < keys; j0 += B) {
      const int64_t j1 = j0 + B < keys ? j0 + B : keys;
      for (int64_t j = j0; j < j1; ++j) {
        for (int64_t i = i0; i < i1; ++i) {
          if constexpr (kAdd) out[j * out_stride + i] += x[i * stride + j];
          else out[j * out_stride + i] = x[i * stride + j];
        }
      }
    }
  }
}

template <typename A>
void transpose(const A* x, int64_t rows, int64_t keys, int64_t stride, A* out, int64_t out_stride) {
  transpose_to<false>(x, rows, keys, stride, out, out_stride);
}

template <typename A>
void add_transposed(const A* x, int64_t rows, int64_t keys, int64_t stride, A* out, int64_t out_stride) {
  transpose_to<true>(x, rows, keys, stride, out, out_stride);
}

}  // namespace

#define LTK_KERNELS(A)                                                                               \
  {prepare<A>,  accumulate<A>, accumulate_both<A>, positives<A>,     positives_both<A>, softplus<A>, \
   expected<A>, key_sums<A>,   gradient<A>,        gradient_both<A>, transpose<A>,      add_transposed<A>}
extern const ContrastiveKernels<float> contrastive_float = LTK_KERNELS(float);
extern const ContrastiveKernels<double> contrastive_double = LTK_KERNELS(double);
#undef LTK_KERNELS

}  // namespace LTK_CAPABILITY
}  // namespace ltkernels
