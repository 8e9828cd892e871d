// Vectors of the widest register the translation unit is compiled for, on the vector extensions of GCC and Clang.
//
// Everything here is static or always inlined: a kernel file is compiled once per instruction set, and a weak symbol
// shared between those objects could run AVX-512 code on a machine without it.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LTK_INLINE inline __attribute__((always_inline))

namespace ltkernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef int32_t Lane;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Simd<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef int64_t Lane;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vec = typename Simd<T>::Vector;

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

template <typename V, typename T>
LTK_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
LTK_INLINE void store_as(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <typename A>
LTK_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

// The larger of each lane; a NaN in either gives b.
template <typename V>
LTK_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// Of constants GCC makes a comparison and a blend.
#if defined(__AVX512F__)
LTK_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_max_ps(__m512(a), __m512(b))); }
#elif defined(__AVX2__)
LTK_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_max_ps(__m256(a), __m256(b))); }
#endif

// A product as it is rounded. The compiler may fuse `a * b - c` into one operation on the exact product, which is
// another number than the one that a maximum was taken of: by half a unit in the last place, much more than 1 from 2^24
// on.
template <typename T>
LTK_INLINE T rounded(T product) {
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#else
  __asm__("" : "+m"(product));
#endif
  return product;
}

// 0, 1, 2, ... and, as an index of shuffles, lanes of that number.
template <typename A>
LTK_INLINE typename Simd<A>::Int lane_numbers() {
  typename Simd<A>::Int lanes;
  for (int k = 0; k < Simd<A>::kLanes; ++k) lanes[k] = k;
  return lanes;
}

// Lane k of the result is lane index[k] of `low`, or lane index[k] - kLanes of `high`.
template <typename A>
LTK_INLINE Vec<A> shuffle(Vec<A> low, Vec<A> high, typename Simd<A>::Int index) {
#if defined(__clang__)
  constexpr int W = Simd<A>::kLanes;
  Vec<A> result;
  for (int k = 0; k < W; ++k) result[k] = index[k] < W ? low[index[k]] : high[index[k] - W];
  return result;
#else
  return __builtin_shuffle(low, high, index);
#endif
}

template <typename A>
LTK_INLINE Vec<A> shuffle(Vec<A> v, typename Simd<A>::Int index) {
#if defined(__clang__)
  Vec<A> result;
  for (int k = 0; k < Simd<A>::kLanes; ++k) result[k] = v[index[k]];
  return result;
#else
  return __builtin_shuffle(v, index);
#endif
}

// Adds (takes the maximum of) lanes in halves: as many steps as the logarithm of their number.
template <typename A>
LTK_INLINE A lane_sum(Vec<A> v) {
  const auto lanes = lane_numbers<A>();
#pragma GCC unroll 8
  for (int half = Simd<A>::kLanes / 2; half > 0; half /= 2) v += shuffle<A>(v, lanes ^ half);
  return v[0];
}

template <typename A>
LTK_INLINE A lane_max(Vec<A> v) {
  const auto lanes = lane_numbers<A>();
#pragma GCC unroll 8
  for (int half = Simd<A>::kLanes / 2; half > 0; half /= 2) v = larger(v, shuffle<A>(v, lanes ^ half));
  return v[0];
}

// step(0), step(1), ... without a loop.
template <int kTimes, typename F>
LTK_INLINE void unrolled(F step) {
#pragma GCC unroll 8
  for (int k = 0; k < kTimes; ++k) step(k);
}

// A number as a type, for arguments that must be constants.
template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

// Calls step(j) for the places j where two vectors begin, and returns where the last of them end.
template <typename A, typename F>
LTK_INLINE int64_t for_each_pair(int64_t size, F step) {
  constexpr int64_t kPair = 2 * Simd<A>::kLanes;
  int64_t j = 0;
  for (; j + 2 * kPair <= size; j += 2 * kPair) {
    step(j);
    step(j + kPair);
  }
  if (j + kPair <= size) {
    step(j);
    j += kPair;
  }
  return j;
}

// Calls step(j, number) for vectors from j on whose exp is taken together: four, and towards the end three, as single
// ones would wait for their own results.
template <typename A, typename F>
LTK_INLINE void for_each_group(int64_t size, F step) {
  constexpr int64_t W = Simd<A>::kLanes;
  const int64_t of_threes = 3 * W * (-(size / W) & 3);  // leaves a multiple of four
  const int64_t of_fours = size - (of_threes <= size ? of_threes : 0);
  int64_t j = 0;
  for (; j + 4 * W <= of_fours; j += 4 * W) step(j, Number<4>());
  for (; j + 3 * W <= size; j += 3 * W) step(j, Number<3>());
  for (; j < size; j += W) step(j, Number<1>());
}

struct ExpConstants {
  using F = Vec<float>;
  static constexpr F all(float x) { return F{} + x; }

  F lowest = all(-88.0f), per_ln2 = all(1.44269504f), rounder = all(12583039.0f);          // 1 / ln 2; 1.5 * 2^23 + 127
  F ln2 = all(0.69314718f), ln2_high = all(0.693359375f), ln2_low = all(-2.12194440e-4f);  // in two parts: Cody, Waite
  F one = all(1.0f);
  // Minimax polynomials for |x| <= ln 2 / 2, the highest power first, with errors of 3.6e-9 and 1.1e-7.
  F precise[5] = {
      all(1.3814539416e-3f), all(8.3687454462e-3f), all(4.1668388993e-2f), all(1.6666521132e-1f),
      all(4.9999994040e-1f)};
  F narrow[4] = {all(8.3125010133e-3f), all(4.1890330613e-2f), all(1.6667115688e-1f), all(4.9999231100e-1f)};

  // Behind a pointer that the compiler does not see through, instructions take them from memory. It would build each
  // anew for every row and, with more of them than registers, keep it on the stack.
  static LTK_INLINE const ExpConstants& get() {
    static constexpr ExpConstants constants;
    const ExpConstants* pointer = &constants;
    asm("" : "+r"(pointer));
    return *pointer;
  }
};

// x = exp(x) of several vectors, for x <= 0 and NaN, within 1 ulp; below -87.68 the result, less than the smallest
// normal number, is 0. kNarrow: for what is rounded to 16 bits in the end, to 2e-7 + 3e-9 |x| of the result and a
// quarter faster.
//
// Step by step for all of them: a step needs the one before, and the processor looks only so far ahead for work that
// waits for nothing.
template <bool kNarrow, int kVectors>
LTK_INLINE void exp_nonpositive(Vec<float> (&x)[kVectors]) {
  using F = Vec<float>;
  using Bits = Simd<float>::Bits;
  const auto each = [](auto step) __attribute__((always_inline)) { unrolled<kVectors>(step); };
  const ExpConstants& c = ExpConstants::get();
  F shifted[kVectors], n[kVectors], p[kVectors];
  each([&](int k) { x[k] = larger(c.lowest, x[k]); });  // in this order NaN stays NaN
  // n = round(x / ln 2) and the bias of exponents, 127, end up in the low mantissa bits of a sum with 1.5 * 2^23.
  each([&](int k) { shifted[k] = x[k] * c.per_ln2 + c.rounder; });
  each([&](int k) { n[k] = shifted[k] - c.rounder; });
  if constexpr (kNarrow && kFusedMultiplyAdd) {
    each([&](int k) { x[k] = x[k] - n[k] * c.ln2; });
  } else {
    each([&](int k) { x[k] = x[k] - n[k] * c.ln2_high; });
    each([&](int k) { x[k] = x[k] - n[k] * c.ln2_low; });
  }
  if constexpr (kNarrow) {
    each([&](int k) { p[k] = x[k] * c.narrow[0] + c.narrow[1]; });
    each([&](int k) { p[k] = p[k] * x[k] + c.narrow[2]; });
    each([&](int k) { p[k] = p[k] * x[k] + c.narrow[3]; });
  } else {
    each([&](int k) { p[k] = x[k] * c.precise[0] + c.precise[1]; });
    each([&](int k) { p[k] = p[k] * x[k] + c.precise[2]; });
    each([&](int k) { p[k] = p[k] * x[k] + c.precise[3]; });
    each([&](int k) { p[k] = p[k] * x[k] + c.precise[4]; });
  }
  each([&](int k) { p[k] = p[k] * x[k] + c.one; });
  each([&](int k) { p[k] = p[k] * x[k] + c.one; });
  // n = -127 gives the bits of 0: the clamped value, and all of -inf.
  each([&](int k) { x[k] = p[k] * reinterpret_cast<F>(reinterpret_cast<Bits>(shifted[k]) << 23); });
}

template <bool kNarrow, int kVectors>
LTK_INLINE void exp_nonpositive(Vec<double> (&x)[kVectors]) {
  for (Vec<double>& v : x) {
    for (int k = 0; k < Simd<double>::kLanes; ++k) v[k] = __builtin_exp(v[k]);
  }
}

template <typename V>
LTK_INLINE V exp_nonpositive(V x) {
  V only[] = {x};
  exp_nonpositive</*kNarrow=*/false>(only);
  return only[0];
}

// log for positive finite x, within 1 ulp (Cephes): x = 2^e m with m from sqrt(1/2) to sqrt(2), log m by a polynomial.
LTK_INLINE Vec<float> log_positive(Vec<float> x) {
  using F = Vec<float>;
  using Int = Simd<float>::Int;
  const F normal = x < 0x1p-126f ? x * 0x1p24f : x;
  const Int offset = x < 0x1p-126f ? Int{} + 24 : Int{};
  constexpr int32_t kHalfRoot = 0x3f3504f3;  // bits of sqrt(1/2)
  const Int above = reinterpret_cast<Int>(normal) - kHalfRoot;
  const F e = __builtin_convertvector((above >> 23) - offset, F);
  const F f = reinterpret_cast<F>((above & 0x7fffff) + kHalfRoot) - 1.0f;
  F p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const F z = f * f;
  const F low = p * f * z + e * -2.12194440e-4f - z * 0.5f;  // ln 2 in two parts (Cody and Waite)
  const F whole = e * 0.693359375f, sum = whole + f;  // what the sum loses is known exactly: whole is 0 or the larger
  return sum + (low + (f - (sum - whole)));
}

LTK_INLINE Vec<double> log_positive(Vec<double> x) {
  Vec<double> result;
  for (int k = 0; k < Simd<double>::kLanes; ++k) result[k] = __builtin_log(x[k]);
  return result;
}

// 16-bit floats are kept as bits: widening is exact, narrowing rounds to nearest even and keeps NaN.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

LTK_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

LTK_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

LTK_INLINE float widen(float x) { return x; }
LTK_INLINE double widen(double x) { return x; }
LTK_INLINE float widen(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
LTK_INLINE float widen(Half x) {
  // Move the fields into place and let a multiplication by 2^112 rebias the exponent. What is subnormal here would be
  // so in float, and 0 to a processor that flushes such numbers: it is an integer times 2^-24.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  if ((x.bits & 0x7c00) == 0) {
    return bits_to_float(sign | float_to_bits(static_cast<float>(x.bits & 0x3ff) * 0x1p-24f));
  }
  if ((x.bits & 0x7c00) == 0x7c00) return bits_to_float(sign | 0x7f800000u | magnitude);  // inf, NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
}

template <typename T>
T narrow(float x);
template <>
LTK_INLINE float narrow<float>(float x) {
  return x;
}
template <>
LTK_INLINE BFloat16 narrow<BFloat16>(float x) {
  if (x != x) return {0x7fc0};
  const uint32_t bits = float_to_bits(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
LTK_INLINE Half narrow<Half>(float x) {
  const uint16_t sign = static_cast<uint16_t>((float_to_bits(x) >> 16) & 0x8000u);
  uint32_t bits = float_to_bits(x) & 0x7fffffffu;
  if (bits > 0x7f800000u) return {0x7e00};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65520 or above: inf
  if (bits < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the last place of the sum with that of the result, and the addition rounds.
    const uint32_t sum = float_to_bits(bits_to_float(bits) + 0.5f);
    return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13))};
}
template <typename T>
LTK_INLINE T narrow(double x) {
  return x;
}

LTK_INLINE Vec<float> load(const float* p) { return load_as<Vec<float>>(p); }
LTK_INLINE Vec<double> load(const double* p) { return load_as<Vec<double>>(p); }
LTK_INLINE Vec<float> load(const BFloat16* p) {
  const auto wide = __builtin_convertvector(load_as<HalfBits>(p), Simd<float>::Bits);
  return reinterpret_cast<Vec<float>>(wide << 16);
}

LTK_INLINE void store(float* p, Vec<float> v) { store_as(p, v); }
LTK_INLINE void store(double* p, Vec<double> v) { store_as(p, v); }
// Rounded to nearest even. Adding to the bits of a NaN could carry into the sign.
LTK_INLINE void store(BFloat16* p, Vec<float> v) {
  const auto bits = reinterpret_cast<Simd<float>::Bits>(v);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_as(p, __builtin_convertvector(v != v ? (rounded & 0u) + 0x7fc0u : rounded, HalfBits));
}

template <typename V>
struct Pair {
  V low, high;
};

// Two vectors in a row.
template <typename T>
LTK_INLINE auto load_pair(const T* p) {
  using V = decltype(load(p));
  return Pair<V>{load(p), load(p + sizeof(V) / sizeof(V{}[0]))};
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Half the instructions of two loads: interleaving with zeros both widens and shifts.
LTK_INLINE auto load_pair(const BFloat16* p) {
  const __m256i bits = _mm256_permute4x64_epi64(load_as<__m256i>(p), 0xd8);
  const __m256i zero = _mm256_setzero_si256();
  return Pair<Vec<float>>{Vec<float>(_mm256_unpacklo_epi16(zero, bits)), Vec<float>(_mm256_unpackhi_epi16(zero, bits))};
}
#endif

// Two vectors in a row, neither with a NaN: for bfloat16, fewer instructions than two stores.
template <typename T, typename V>
LTK_INLINE void store_pair(T* p, V low, V high) {
  store(p, low);
  store(p + sizeof(V) / sizeof(low[0]), high);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
LTK_INLINE void store_pair(BFloat16* p, Vec<float> low, Vec<float> high) {
  // The upper halves of all lanes in one vector and the lower ones in another, to be rounded sixteen at a time.
  const __m256i halves =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13));
  const __m256i a = _mm256_shuffle_epi8(__m256i(low), halves), b = _mm256_shuffle_epi8(__m256i(high), halves);
  const __m256i upper = _mm256_unpacklo_epi64(a, b), lower = _mm256_unpackhi_epi64(a, b);
  // Up from above 0x8000, and from 0x8000 itself where that makes the number even.
  const __m256i is_even = _mm256_andnot_si256(upper, _mm256_set1_epi16(1));
  const __m256i up = _mm256_srli_epi16(_mm256_subs_epu16(lower, is_even), 15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_add_epi16(upper, up), 0xd8));
}
#endif

#if defined(__AVX512F__)
LTK_INLINE Vec<float> load(const Half* p) { return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(load_as<__m256i>(p))); }
LTK_INLINE void store(Half* p, Vec<float> v) {
  store_as(p, _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
LTK_INLINE Vec<float> load(const Half* p) { return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(load_as<__m128i>(p))); }
LTK_INLINE void store(Half* p, Vec<float> v) {
  store_as(p, _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
LTK_INLINE Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int k = 0; k < Simd<float>::kLanes; ++k) v[k] = widen(p[k]);
  return v;
}
LTK_INLINE void store(Half* p, Vec<float> v) {
  for (int k = 0; k < Simd<float>::kLanes; ++k) p[k] = narrow<Half>(v[k]);
}
#endif

}  // namespace
}  // namespace ltkernels
