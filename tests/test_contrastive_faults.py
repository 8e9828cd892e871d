"""Does the suite fail when the contrastive kernel is wrong? Faults planted in its source must break the rule.

Each fault is a replacement in the text of the CPU operators (csrc/cpu/contrastive*) or of the vector code under them.
They are compiled with the few parts of ATen that they use written anew below, which takes a second instead of half a
minute, and take the place of the real operators: autograd, the public functions and the rule are those of the suite.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import contrastive_oracle
import pytest
import torch
from contrastive_oracle import KERNEL, Case, check
from contrastive_problems import COMPLETE, FEATURES, LOGSUMEXP_FEATURES, make_case, possible
from problems import covering_set
from torch import Tensor

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(COMPILER is None or not CSRC.exists(), reason="needs a compiler and the native sources"),
    pytest.mark.skipif(not KERNEL, reason="needs the operators that the faulty ones stand in for"),
]

# name: (text of the sources, what stands there instead). Each text must occur exactly once, and no fault may write out
# of bounds: it would take down the process of the tests.
FAULTS_OF_THE_SWEEPS: dict[str, tuple[str, str]] = {
    "no label is a label": ("t.label[i] < 0 ? INT32_MIN : t.label[i];", "t.label[i];"),
    "no label is a label of the denominator": (
        "const bool same = t.label[i] >= 0 && t.key_label[j] == t.label[i];\n      l[j]",
        "const bool same = t.key_label[j] == t.label[i];\n      l[j]",
    ),
    "keys out of sight are positives": (" & (x != -kInfinity<A>);", ";"),
    "allowed ignored": ("allowed[j * t.allowed_key_stride] ? x[j] : -kInfinity<A>;", "x[j];"),
    "forget the key bias": ("l[j] += t.key_bias[j];", ";"),
    "pair margin with the other sign": ("l[j] += t.key_label[j] >= 0 ? margin", "l[j] -= t.key_label[j] >= 0 ? margin"),
    "pair margin of another label": ("t.pair_margin + t.label[i] * t.num_labels;", "t.pair_margin;"),
    "keys without label have a margin": (
        "t.key_label[j] >= 0 ? margin[t.key_label[j]] : A(0);",
        "margin[t.key_label[j] >= 0 ? t.key_label[j] : 0];",
    ),
    "the other labels in the denominator": ("l[j] = same == same_only ?", "l[j] = same != same_only ?"),
    "skip every other vector": ("      more += exp_nonpositive(rounded(load(l + j + W) * f) - m);", ""),
    "the maximum of every other vector": ("      other = larger(load(l + j + W), other);", ""),
    "no maximum subtracted": ("rounded(lane_max<A>(larger(top, other)) * factor);", "0;"),
    "the sum keeps its old maximum": (
        "row_sum[i] *= row_max[i] == -kInfinity<A>",
        "if (row_max[i] == -kInfinity<A>) row_sum[i] *= true",
    ),
    "NaN alone is nothing": ("row_sum[i] += z != z ? z : A(0);", ";"),
    "both: the sum keeps its old maximum": ("  sum *= max == -kInfinity<A>", "  if (max == -kInfinity<A>) sum *= true"),
    "both: the keys' sum keeps its old maximum": (
        "load(sum + j) * exp_nonpositive(known - finite_maximum<A>(top))",
        "load(sum + j)",
    ),
    "both: maximum of the row's temperature": ("load(largest_x + j) * load(factor + j)", "load(largest_x + j)"),
    "both: temperature of the other side": ("value * load(key_factor + j)) - key_m", "value * f) - key_m"),
    "count the positives of one lane": ("count[i] += static_cast", "count[i] = static_cast"),
    "both: positives of the last tile": ("row_count[i] += lane_sum<A>(found);", "row_count[i] = lane_sum<A>(found);"),
    "both: keys have the last row's positive": ("load(key_count + j) + one", "one"),
    "softplus overflows": ("__builtin_exp(gap > 0 ? -gap : gap)", "__builtin_exp(-gap)"),
    "slope of the other sign": ("slope[i] += sigmoid(gap);", "slope[i] += sigmoid(-gap);"),
    "rows without keys have a probability": ("  if (lse == -kInfinity<A>) return Vec<A>{};", ""),
    "0 * -inf in the expectation": ("sum += p == 0 ? Vec<A>{} : p * load(x + j);", "sum += p * load(x + j);"),
    "expectation of products": ("lane_sum<A>(sum) * t.inverse_temperature[i];", "lane_sum<A>(sum);"),
    "key bias: forget the weight": ("lse[i]) * row_weight[i]);", "lse[i]));"),
    "gradient of positives with the other sign": ("g -= positive_lanes(", "g += positive_lanes("),
    "own: slope of the other sign": ("-coefficient * sigmoid(lse - s);", "-coefficient * sigmoid(s - lse);"),
    "own: positives without temperature gradient": ("products[i] += kept[j] * x[j];", ";"),
    "own: the row itself has a gradient": ("kept[j] == -kInfinity<A> ? A(0) : kept[j];", "kept[j];"),
    "both: gradient with the other temperature": (
        "rounded(value * load(mirror.inverse_temperature + j)) - load(keys.lse + j);",
        "rounded(value * factor) - load(keys.lse + j);",
    ),
    "both: gradient with the other weight": ("mirror_z) * load(keys.negative + j);", "mirror_z) * negative;"),
    "both: positives with the other weight": ("same ? load(keys.positive + j)", "same ? positive"),
    "both: drop the mirror image": ("store(h + i * t.stride + j, g + mirror_g);", "store(h + i * t.stride + j, g);"),
    "both: products of the other side": ("mirror_g * value));", "g * value));"),
    "both: forget the products so far": ("row_products[i] += lane_sum", "row_products[i] = lane_sum"),
    "skip the last key of what is added": ("for (int64_t j = j0; j < j1;", "for (int64_t j = j0; j < j1 - kAdd;"),
    "transpose forgets what is there": ("out[j * out_stride + i] += x", "out[j * out_stride + i] = x"),
    "exp without its second constant": ("x[k] - n[k] * c.ln2_low;", "x[k];"),
    "exp of NaN is a number": ("larger(c.lowest, x[k]);", "larger(x[k], c.lowest);"),
}
FAULTS_OF_THE_OPERATORS: dict[str, tuple[str, str]] = {
    "the row itself is a key": ("if (exclude_self_ && i == j) {", "if (false) {"),
    "use products masked for another role": ("(self_ && !one_sweep()) || ", ""),
    "use products without the positive": (" || without_positive_index_ || bytes", " || bytes"),
    "drop the transposed half": ("kernels_.add_transposed(", "if (false) kernels_.add_transposed("),
    "drop the transposed diagonal": ("} else if (self_ && of_rows != nullptr) {", "} else if (false) {"),
    "tiles half way round twice": ("&& 2 * round == rows ? rows / 2 : rows;", "&& false ? rows / 2 : rows;"),
    "padding is seen": ("x + (r + 1) * stride_, -kInfinite);", "x + (r + 1) * stride_, 0);"),
    "mirror image with the first temperatures": ("{inverse_tau_.data() + j * block_, ", "{inverse_tau_.data(), "),
    "positives out of sight": ("const bool seen = t.allowed == nullptr || ", "const bool seen = true || "),
    "positives stay in the denominator": ("if (without_positive_index_) product = -kInfinite;", ""),
    "labels: positives stay in it": ("s_ = denominator == kOwn || denominator == kNegatives;", "s_ = false;"),
    "no gradient of positives by index": ("x[p.row * stride_ + p.key] += positive(p.of, num", "positive(p.of, num"),
    "both: no gradient of positives by index": ("transposed[p.row * stride_ + p.key] += positive(", "positive("),
    "forget the sample weight in backward": ("* weight(i) * factor : 0;", "* factor : 0;"),
    "wrong Z": ("total += counts(i) ? double(weight(i)) : 0;", "total += double(weight(i));"),
    "temperature's gradient with the other sign": ("out[i] = -row_product_[i]", "out[i] = row_product_[i]"),
    "log_normalizer ignored": ("lse_[i] - positive_[i] - normalizer_[i]", "lse_[i] - positive_[i]"),
    "extra positive in every denominator": ("if (denominator_ == kAll) join(i, extra", "join(i, extra"),
    "extra positive: no gradient to the query": ("dq[d] += g * e[d];", ";"),
    "extra positive: wrong in backward": ("= positive_[i] * count_[i] * tau_[i];", "= positive_[i] * tau_[i];"),
    "rows without positives have a loss": ("{ return count_[i] > 0; }", "{ return true; }"),
    "sums of two maxima": ("sum : sum * std::exp(max - max_[i]);", "sum : sum;"),
    "transposed pair margin": ("[tile.label[i] * L + tile.key_label[j]]", "[tile.key_label[j] * L + tile.label[i]]"),
    "key bias: gradient of one role": ("key_sum_[j] = sums[0][j] + sums[1][j];", "key_sum_[j] = sums[0][j];"),
}  # fmt: skip
FAULTS = FAULTS_OF_THE_SWEEPS | FAULTS_OF_THE_OPERATORS

# --------------------------------------------------------------------------------------------------------------- driver

# What the operators use of ATen, for one thread and arguments of the types that the kernel works in.
ATEN = """
#pragma once
#include <sys/mman.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>
#define TORCH_CHECK_VALUE(...)
#define TORCH_LIBRARY_IMPL(library, key, m) template <typename M> void define(M& m)
namespace at {
enum ScalarType { kFloat, kDouble, kLong, kByte };
using TensorOptions = ScalarType;
using IntArrayRef = std::initializer_list<int64_t>;
template <typename T>
struct ArrayRef { ArrayRef(const T* x, size_t n) : first(x), size(n) {} const T* first; size_t size; };
struct AutoDispatchBelowADInplaceOrView { AutoDispatchBelowADInplaceOrView() {} };
struct Tensor {  // of which nobody counts the owners: run() frees what the last call has left
  char* memory = nullptr;
  int64_t dims = 0, sizes[2] = {1, 1}, strides[2] = {1, 1};
  ScalarType type = kFloat;
  Tensor to(ScalarType) const { return *this; }
  Tensor contiguous() const { return *this; }
  Tensor t() const { return {memory, 2, {sizes[1], sizes[0]}, {strides[1], strides[0]}, type}; }
  bool defined() const { return memory != nullptr; }
  ScalarType scalar_type() const { return type; }
  int64_t dim() const { return dims; }
  int64_t size(int64_t d) const { return sizes[d]; }
  int64_t stride(int64_t d) const { return strides[d < 0 ? d + dims : d]; }
  int64_t numel() const { return sizes[0] * sizes[1]; }
  int64_t nbytes() const { return numel(); }
  void* mutable_data_ptr() const { return memory; }
  template <typename T> T* mutable_data_ptr() const { return reinterpret_cast<T*>(memory); }
  template <typename T> const T* const_data_ptr() const { return reinterpret_cast<const T*>(memory); }
  float& at(int64_t i, int64_t j) const { return mutable_data_ptr<float>()[i * strides[0] + j * strides[1]]; }
  void add_(const Tensor& x) {
    for (int64_t i = 0; i < numel(); ++i) mutable_data_ptr<float>()[i] += x.mutable_data_ptr<float>()[i];
  }
  void addmm_(const Tensor& a, const Tensor& b) {
    for (int64_t i = 0; i < sizes[0]; ++i) {
      for (int64_t j = 0; j < sizes[1]; ++j) {
        double sum = at(i, j);
        for (int64_t k = 0; k < a.sizes[1]; ++k) sum += double(a.at(i, k)) * b.at(k, j);
        at(i, j) = static_cast<float>(sum);
      }
    }
  }
};
inline Tensor from_blob(void* x, IntArrayRef sizes, IntArrayRef strides, ScalarType type) {
  const int64_t *n = sizes.begin(), *s = strides.begin();
  return {static_cast<char*>(x), 2, {n[0], n[1]}, {s[0], s[1]}, type};
}
inline Tensor from_blob(void* x, IntArrayRef sizes, ScalarType t) {
  return from_blob(x, sizes, {sizes.begin()[1], 1}, t);
}
inline std::vector<char*> left;
inline Tensor filled(IntArrayRef sizes, ScalarType type, int byte) {
  Tensor x{nullptr, static_cast<int64_t>(sizes.size())};
  std::copy(sizes.begin(), sizes.end(), x.sizes);
  if (x.dims == 2) x.strides[0] = x.sizes[1];
  x.memory = static_cast<char*>(std::malloc(8 * (x.numel() + 1)));
  std::memset(x.memory, byte, 8 * (x.numel() + 1));
  if (type != kByte) left.push_back(x.memory);  // a workspace outlives the call
  return x;
}
inline Tensor empty(IntArrayRef sizes, ScalarType type) { return filled(sizes, type, 0xff); }  // NaN
inline Tensor zeros(IntArrayRef sizes, ScalarType type) { return filled(sizes, type, 0); }
inline Tensor full(IntArrayRef sizes, double value, ScalarType type) {
  Tensor x = empty(sizes, type);
  *x.mutable_data_ptr<float>() = static_cast<float>(value);
  return x;
}
template <typename T>
Tensor tensor(ArrayRef<T> values, ScalarType type) {
  Tensor x = empty({static_cast<int64_t>(values.size)}, type);
  std::memcpy(x.memory, values.first, values.size * sizeof(T));
  return x;
}
inline void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < out.sizes[0]; ++i) {
    for (int64_t j = 0; j < out.sizes[1]; ++j) out.at(i, j) = 0;
  }
  out.addmm_(a, b);
}
namespace detail { inline Tensor empty_cpu(IntArrayRef sizes, ScalarType type) { return empty(sizes, type); } }
inline int get_num_threads() { return 1; }
inline int get_thread_num() { return 0; }
inline std::string get_cpu_capability() { return "DEFAULT"; }
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, F f) { f(begin, end); }
}  // namespace at
namespace c10 {
template <typename T> struct CppTypeToScalarType { static constexpr auto value = at::kFloat; };
template <> struct CppTypeToScalarType<double> { static constexpr auto value = at::kDouble; };
}
"""
ATEN_FILES = ("ATen/ATen", "ATen/Parallel", "ATen/EmptyTensor", "ATen/core/LegacyTypeDispatch", "ATen/core/Tensor")

# Tensors come as pointers (null: none) and as (dimensions, sizes, strides); the first two are those of backward.
DRIVER = """
namespace ltkernels {
KernelCounter::KernelCounter(std::string name) : name_(name) {}
#define LTK_NO_KERNELS(CAPABILITY)                          \\
  namespace CAPABILITY {                                    \\
  extern const ContrastiveKernels<float> contrastive_float{};   \\
  extern const ContrastiveKernels<double> contrastive_double{}; \\
  }
LTK_NO_KERNELS(AVX2)
LTK_NO_KERNELS(AVX512)
}
extern "C" __attribute__((visibility("default"))) void run(
    char* const* data, const int64_t (*shapes)[5], const int64_t* n, char* const* out) {
  const auto x = [&](int k) {
    const int64_t* s = shapes[k];
    return at::Tensor{data[k], s[0], {s[1], s[2]}, {s[3], s[4]}};
  };
  const auto maybe = [&](int k) { return data[k] == nullptr ? std::optional<at::Tensor>() : x(k); };
  const auto write = [&](const auto&... results) {
    int k = 0;
    (..., std::memcpy(out[k++], results.memory, results.numel() * sizeof(float)));
  };
  const auto call = [&](auto f, const auto&... first) {
    const auto results = f(
        first..., x(2), maybe(3), x(4), maybe(5), maybe(6), maybe(7), maybe(8), maybe(9), maybe(10), maybe(11),
        maybe(12), maybe(13), n[0], n[1] != 0, n[2] != 0, n[3], n[4]);
    std::apply(write, results);
  };
  for (char* memory : at::left) std::free(memory);
  at::left.clear();
  if (data[0] == nullptr) call(&ltkernels::forward<float>);
  else call(&ltkernels::backward<float>, x(0), x(1));
}
"""


def patched(fault: str | None) -> dict[str, str]:
    """The text of the sources, with the fault."""
    names = ("contrastive_kernel.cpp", "simd.h", "contrastive.cpp", "contrastive_tiles.h")
    files = {name: (CSRC / "cpu" / name).read_text() for name in names}
    # Without the entry points, which would compile the operators for float64 too.
    files["contrastive.cpp"] = files["contrastive.cpp"].partition("\nForward contrastive_fwd(")[0] + "\n}\n}\n"
    if fault is not None:
        old, new = FAULTS[fault]
        assert sum(text.count(old) for text in files.values()) == 1, f"not found exactly once: {old}"
        files = {name: text.replace(old, new) for name, text in files.items()}
    return files


def headers(directory: Path) -> None:
    """ATEN, in place of every file of torch that the operators include; precompiled."""
    for name in (*ATEN_FILES, "torch/library"):
        path = directory / f"{name}.h"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ATEN if name == "ATen/ATen" else "#include <ATen/ATen.h>\n")
    compiled("-x c++-header", directory / "ATen/ATen.h", directory / "ATen/ATen.h.gch")


def compile_half(root: Path, half: str, fault: str | None) -> Path:
    """The object of the sweeps or of the operators around them."""
    directory = root / (half if fault is None else str(list(FAULTS).index(fault)))
    directory.mkdir()
    for name, text in patched(fault).items():
        (directory / name).write_text(text)
    included = '#include "contrastive_kernel.cpp"\n'
    if half == "operators":
        included = f'#include <ATen/ATen.h>\n#include "contrastive.cpp"\n{DRIVER}'
    (directory / "half.cpp").write_text(included)
    compiled("-c", directory / "half.cpp", directory / "half.o", f"-I{root / 'include'}", f"-I{CSRC / 'cpu'}")
    return directory / "half.o"


def compiled(kind: str, source: Path, target: Path, *flags: str) -> None:
    # Hidden: static variables of inline functions, as in new_tensors.h, would be those of the real operators.
    flags += ("-std=c++20", "-O0", "-w", "-fPIC", "-fvisibility=hidden", "-DLTK_CAPABILITY=DEFAULT")
    subprocess.run([COMPILER, *flags, *kind.split(), str(source), "-o", str(target)], check=True)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str | None, ctypes.CDLL]]:
    root = tmp_path_factory.mktemp("faults")
    headers(root / "include")

    def build(fault: str | None) -> ctypes.CDLL:
        half, other = ("sweeps", "operators") if fault in FAULTS_OF_THE_SWEEPS else ("operators", "sweeps")
        faulty = sound[half].result() if fault is None else compile_half(root, half, fault)
        library = faulty.with_suffix(".so")
        objects = map(str, (faulty, sound[other].result()))
        subprocess.run([COMPILER, "-shared", *objects, "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sound = {half: pool.submit(compile_half, root, half, None) for half in ("operators", "sweeps")}
        names = [None, *FAULTS_OF_THE_OPERATORS, *FAULTS_OF_THE_SWEEPS]
        yield dict(zip(names, pool.map(build, names), strict=True))


class Replacement:
    """Stands in for contrastive_fwd and contrastive_bwd on the CPU: those of ``library``."""

    library: ctypes.CDLL | None = None

    def forward(self, *arguments: object) -> tuple[Tensor, ...]:
        rows, reduction = len(arguments[0]), arguments[-2]
        loss, stats = torch.empty((rows,) if reduction == 0 else ()), torch.empty(5, rows)
        grads = empty_gradients(*arguments)
        self.run((None, None, *arguments), (loss, stats, *grads))
        return loss, stats, *grads

    def backward(self, *arguments: object) -> tuple[Tensor, ...]:
        grads = empty_gradients(*arguments[2:])
        self.run(arguments, grads)
        return grads

    def run(self, arguments: tuple, out: tuple[Tensor, ...]) -> None:
        tensors, numbers = arguments[:14], arguments[14:]
        held = [x if x is None or x.dtype == torch.bool else x.contiguous() for x in tensors]
        held = [x.long() if k in (5, 6, 7) and x is not None else x for k, x in enumerate(held)]
        shapes = (ctypes.c_int64 * 5 * 14)()
        for shape, x in zip(shapes, held, strict=True):
            if x is not None:
                shape[1:] = (1, 1, 1, 1)
                shape[0], shape[1 : 1 + x.dim()], shape[3 : 3 + x.dim()] = x.dim(), x.shape, x.stride()
        self.library.run(pointers(held), shapes, (ctypes.c_int64 * 5)(*map(int, numbers)), pointers(out))


def empty_gradients(*arguments: object) -> tuple[Tensor, ...]:
    query, key, temperature, *_ = arguments
    leaves = (query, key, temperature, arguments[7], arguments[8], arguments[11])
    return tuple(
        torch.empty(leaf.shape if leaf is not None and arguments[-1] >> bit & 1 else (0,))
        for bit, leaf in enumerate(leaves)
    )


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


@pytest.fixture(scope="module")
def replacement() -> Iterator[Replacement]:
    """Takes the place of the CPU operators until the last test of this file."""
    instead, library = Replacement(), torch.library.Library("ltkernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel is overridden, says torch
        library.impl("contrastive_fwd", instead.forward, "CPU", allow_override=True)
        library.impl("contrastive_bwd", instead.backward, "CPU", allow_override=True)
    yield instead
    library._destroy()


@pytest.fixture
def finds_fault(
    libraries: dict, replacement: Replacement, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str | None, Case], str | None]:
    """What the comparison says of a case under a fault."""
    monkeypatch.setattr(contrastive_oracle, "KERNEL", False)  # it counts calls of the real operators

    def find(fault: str | None, case: Case) -> str | None:
        replacement.library = libraries[fault]
        try:
            check(case)
        except AssertionError as error:
            return str(error)
        return None

    return find


# --------------------------------------------------------------------------------------------------------------- tests

SMALL = FEATURES | {
    "rows": (5, 70, 130),
    "keys": ("self", "fewer", "more"),
    "width": (3, 9),
    "dtype": (torch.float32,),
    "normalize": (False,),
    "layout": ("contiguous",),
    "grads": ("all", "query"),
}
LOGSUMEXP = LOGSUMEXP_FEATURES | {name: SMALL[name] for name in ("rows", "keys", "width", "dtype", "layout", "grads")}
PLAIN = COMPLETE | {"rows": 70, "width": 9, "temperature": "vector"}


def cases() -> list[Case]:
    """Small cases of the suite, self-contrast in which one sweep serves two tiles, and some edges."""
    some = [{}, {"positives": "index"}, {"rows": 130, "scaled": True, "sample_weight": "weight"}, {"rows": 200}]
    chosen = [make_case(PLAIN | features) for features in some]
    chosen += [make_case(features) for features in covering_set(SMALL, possible)]
    chosen += [make_case(features) for features in covering_set(LOGSUMEXP, possible)]
    for keys in ("self", "more"):
        near = make_case(PLAIN | {"keys": keys, "grads": "none"})
        near.arguments["temperature"] *= 0.005
        chosen.append(near)
    plain = make_case(PLAIN | {"rows": 5, "keys": "more", "grads": "none"})
    for undefined in (2, slice(None)):
        key = plain.arguments["key"].clone()
        key[undefined] = torch.nan
        chosen.append(replace(plain, arguments=plain.arguments | {"key": key}))
    return chosen


CASES = cases()


def test_kernel_without_fault_passes(finds_fault: Callable) -> None:
    """The driver is right: otherwise every fault would be found."""
    for case in CASES:
        assert finds_fault(None, case) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(finds_fault: Callable, fault: str) -> None:
    assert any(finds_fault(fault, case) for case in CASES)
