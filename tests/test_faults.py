"""Does the suite fail when the kernel is wrong? Faults planted in its source, compiled apart, must break the rule.

Each fault is a replacement in the text of the CPU row kernel. The patched kernel runs the problems of the suite through
a thin driver and is compared with the definition by the same function as the real one.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import Problem, Results, deviations, upstream_of
from problems import FEATURES, covering_set, make_problem, one_at_a_time
from torch import Tensor

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or not SOURCES.exists(), reason="needs a compiler and the native sources"),
]

# name: (text of the kernel, what stands there instead). Each text must occur exactly once, and no fault may write out
# of bounds: it would take down the process of the tests.
FAULTS: dict[str, tuple[str, str]] = {
    "skip the tail of the logits": ("    store(v + j, y);", "    store(v + j, padding);"),
    "skip the tail of the gradient": ("    store(out + C - W, scale(", "    (void)(scale("),
    "padding takes part in the sum": (
        "padding = broadcast<A>(-kInfinity<A>);",
        "padding = broadcast<A>(0);",
    ),
    "drop the margin": ("    v[y] = before - p.margin[y];", "    v[y] = before;"),
    "margin on every row of probabilities": ("v[j] -= p.margin[j] * t[j];", "v[j] -= p.margin[j];"),
    "wrong Z": (
        "return (p.sample_weight == nullptr ? 1 : p.sample_weight[i]) * p.inverse_normalizer;",
        "return (p.sample_weight == nullptr ? 1 : p.sample_weight[i]) / A(p.rows);",
    ),
    "wrong Z in backward": ("p.grad_loss_stride] * u * p.inverse_normalizer;", "p.grad_loss_stride] * u;"),
    "no maximum subtracted": (
        "const A top = load_row(p, i, v, static_cast<A*>(nullptr));",
        "load_row(p, i, v, static_cast<A*>(nullptr)); const A top = 0;",
    ),
    "no maximum subtracted under a distribution": (
        "const A top = load_row(p, i, v, t);",
        "load_row(p, i, v, t); const A top = 0;",
    ),
    "rows together in one scratch": (
        "    A* v = scratch + (i - begin) * size;\n    const A top",
        "    A* v = scratch;\n    const A top",
    ),
    "a row between those together": ("i < end; i += together) {", "i < end; i += together + 1) {"),
    "the sum of another row": ("c * mass / p.row_logsum[i];", "c * mass / p.row_logsum[begin];"),
    "a maximum of at least 0": ("  return top;\n}\n\n// ---", "  return top > 0 ? top : 0;\n}\n\n// ---"),
    "the maximum forgets the margin": ("    if (v[y] > top) top = v[y];", "    if (false) top = v[y];"),
    "forget the class weight": ("return p.weight == nullptr ? 1 : p.weight[y];", "return 1;"),
    "forget the class weight of the target's logit": ("0 : mass * (v[y] - top);", "0 : v[y] - top;"),
    "forget the class weight of the gradient": ("= c * mass / p.row_logsum[i];", "= c / p.row_logsum[i];"),
    "forget the class weight in backward": ("const A k = c * mass + e;", "const A k = c + e;"),
    "forget the class weight under smoothing": ("t[j] *= p.weight[j];", "t[j] *= 1;"),
    "forget the sample weight in backward": ("A u = p.sample_weight == nullptr ? 1 : p.sample_weight[i];", "A u = 1;"),
    "scale multiplies the bias": ("x = x * scale + load(bias + j);", "x = (x + load(bias + j)) * scale;"),
    "forget the bias of vectors": ("x = x * load(scaled + j) + load(bias + j);", "x = x * load(scaled + j);"),
    "forget the scale of the gradient": ("p.scaled == nullptr ? coefficient * p.scale : coefficient", "coefficient"),
    "pairwise margin of another class": ("p.pairwise + p.index[i] * C;", "p.pairwise + 0 * C;"),
    "mask ignored": ("v[j] = mask[j] ? v[j] : -kInfinity<A>;", "v[j] = mask[j] ? v[j] : v[j];"),
    "smoothing spread over removed classes": ("allowed += mask[j];", "allowed += 1;"),
    "silenced classes stay": ("excluded ? -kInfinity<A> : v[j] +", "excluded ? v[j] : v[j] +"),
    "the maximum of silenced classes": ("    if (top_lost) top = max_of(v, padded<A>(C));", "    // "),
    "forget the neighbor weight": (": v[j] + p.log_neighbor_weight;", ": v[j];"),
    "the last neighbor stays": ("e < p.neighbor_offsets[y + 1]; ++e", "e + 1 < p.neighbor_offsets[y + 1]; ++e"),
    "forget back_from": ("    if (j != y) f(j);", "    // "),
    "back silences the row's own class": ("    if (j != y) f(j);", "    f(j);"),
    "back in rows of target classes": ("  if (y < p.back_from) return;", "  // "),
    "silenced by the class of another row": ("p.row_class[i] : p.index[i];", "p.row_class[0] : p.index[i];"),
    "target mass of silenced classes stays": ("  zero_silenced(p, i, t);", "  // "),
    "a neighbor weight above 0 drops target mass": ("if (p.log_neighbor_weight == -kInfinity<A>) {", "{"),
    "gradient of silenced classes not zeroed": (
        "  if (k - k != 0) zero_",
        "  if (false) zero_",
    ),
    "gradient of silenced classes not zeroed in backward": ("  zero_silenced(p, i, g);", "  // "),
    "ignored rows have a loss": ("p.row_max[i] = p.row_logsum[i] = p.row_loss[i] = 0;", "p.row_loss[i] = 1;"),
    "gradient of ignored rows not written": (
        "= p.row_loss[i] = 0;\n  if (p.grad != nullptr) zero_gradient(p, i);",
        "= p.row_loss[i] = 0;",
    ),
    "gradient of ignored rows not written in backward": (
        "zero_gradient(p, i);\n      continue;\n    }\n    if (p.grad",
        ";\n      continue;\n    }\n    if (p.grad",
    ),
    "rows taken for contiguous": ("logits) + i * p.logits_stride;", "logits) + i * p.classes;"),
    "log-sum-exp has no gradient": ("const A e = p.grad_lse == nullptr ? 0 : p.grad_lse[i];", "const A e = 0;"),
    "column sums keep the last row": ("db[j] += g[j];", "db[j] = g[j];"),
    "scale's gradient without s": ("-kInfinity<A> ? 0 : p.raw_scale * row[j]", "-kInfinity<A> ? 0 : row[j]"),
    "margin's gradient has the other sign": ("dm[p.index[i]] -= ", "dm[p.index[i]] += "),
    "pairwise gradient at another row": ("grad + p.index[order[n]] * p.classes;", "grad + 0 * p.classes;"),
    "exp without its second constant": ("x[k] - n[k] * c.ln2_low;", "x[k];"),
    "exp wrong in the 5th digit": ("4.1668388993e-2f", "4.1e-2f"),
    "exp of NaN is a number": ("larger(c.lowest, x[k]);", "larger(x[k], c.lowest);"),
    "groups of three left out": ("j += 3 * W) step(j, Number<3>());", "j += 3 * W) {}"),
    "single vectors left out": ("j += W) step(j, Number<1>());", "j += W) {}"),
    "the pair after pairs of pairs left out": (
        "  if (j + kPair <= size) {\n    step(j);",
        "  if (j + kPair <= size) {",
    ),
    "a mask is no option": ("= p.mask != nullptr || p.pairwise", "= p.pairwise"),
    "a pairwise margin is no option": ("|| p.pairwise != nullptr || p.neighbor", "|| p.neighbor"),
    "neighbors are no option": ("|| p.neighbor_offsets != nullptr ||", "||"),
    "a margin is no option": ("p.margin != nullptr || p.scaled", "p.scaled"),
    "a scale is no option": ("|| p.scaled != nullptr || p.weight", "|| p.weight"),
    "a class weight is no option": ("|| p.weight != nullptr ||", "||"),
    "a sample weight is no option": ("p.sample_weight != nullptr;\n  if (has", "false;\n  if (has"),
    "half of the vectors in the sum": ("sums[k % 2] += e[k];", "sums[k % 2] = sums[0] + e[k];"),
    "the last rows without a logarithm": ("sums[i] = log_of_sums<A>(broadcast<A>(sums[i]))[0];", ";"),
    "the logarithm of NaN is a number": ("return x > 0 ? log_positive(", "return true ? log_positive("),
}

DRIVER = """
extern "C" int64_t scratch_size(int64_t classes) {
  return ltkernels::DEFAULT::margin_softmax_float.scratch_size(classes);
}

extern "C" void run(
    int64_t rows, int64_t classes, int64_t stride, const float* logits, const int64_t* index, const float* probability,
    int64_t ignore_index, float scale, const float* scaled, const float* bias, const float* margin,
    const float* pairwise, const float* weight, const float* sample_weight, const bool* mask,
    const int64_t* row_class, const int32_t* neighbor_offsets, const int32_t* neighbor_classes, int64_t back_from,
    float log_neighbor_weight, int64_t mask_stride, float smoothing, float inverse_normalizer, float* stats,
    float* grad, const float* upstream, int64_t upstream_stride, const float* upstream_lse, float raw_scale,
    const int64_t* order, float* class_grad, float* pairwise_grad, float* scratch) {
  ltkernels::MarginSoftmaxArgs<float> p;
  p.rows = rows; p.classes = classes; p.logits = logits; p.logits_stride = stride; p.index = index;
  p.probability = probability; p.probability_stride = classes; p.ignore_index = ignore_index; p.scale = scale;
  p.scaled = scaled; p.bias = bias; p.margin = margin; p.pairwise = pairwise; p.weight = weight;
  p.sample_weight = sample_weight; p.mask = mask; p.mask_stride = mask_stride; p.smoothing = smoothing;
  p.row_class = row_class; p.neighbor_offsets = neighbor_offsets; p.neighbor_classes = neighbor_classes;
  p.log_neighbor_weight = log_neighbor_weight;
  if (back_from >= 0) p.back_from = back_from;
  p.inverse_normalizer = inverse_normalizer; p.row_max = stats; p.row_logsum = stats + rows;
  p.row_loss = stats + 2 * rows; p.grad = grad; p.grad_stride = classes; p.grad_loss = upstream;
  p.grad_loss_stride = upstream_stride;
  p.grad_lse = upstream_lse; p.raw_scale = raw_scale;
  const auto& kernels = ltkernels::DEFAULT::margin_softmax_float;
  if (upstream == nullptr) return kernels.forward(p, 0, rows, scratch);
  kernels.backward(p, 0, rows, scratch, class_grad);
  if (pairwise_grad != nullptr) kernels.pairwise(p, order, 0, rows, scratch, pairwise_grad);
}
"""


def patched(fault: str | None) -> dict[str, str]:
    """The text of the kernel's files, with the fault."""
    files = {
        name: (SOURCES / name).read_text() for name in ("margin_softmax_kernel.cpp", "margin_softmax_row.h", "simd.h")
    }
    if fault is not None:
        old, new = FAULTS[fault]
        assert sum(text.count(old) for text in files.values()) == 1, f"not found exactly once: {old}"
        files = {name: text.replace(old, new) for name, text in files.items()}
    return files


def build(directory: Path, fault: str | None) -> ctypes.CDLL:
    directory.mkdir()
    for name, text in patched(fault).items():
        (directory / name).write_text(text)
    source, library = directory / "driver.cpp", directory / "kernel.so"
    source.write_text('#include "margin_softmax_kernel.cpp"\n' + DRIVER)
    flags = ["-std=c++20", "-O0", "-w", "-fPIC", "-shared", "-DLTK_CAPABILITY=DEFAULT", f"-I{SOURCES}"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str | None, ctypes.CDLL]]:
    root = tmp_path_factory.mktemp("faults")
    names: list[str | None] = [None, *FAULTS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = pool.map(lambda k: build(root / str(k), names[k]), range(len(names)))
        yield dict(zip(names, built, strict=True))


# -------------------------------------------------------------------------------------------------------------- driver

NO_MAP = (None, None, -1)


def run(library: ctypes.CDLL, problem: Problem) -> Results:
    """What csrc/cpu/margin_softmax.cpp and the autograd node do around the kernel, in Python."""
    options, logits, target = problem.options, problem.logits, problem.target
    rows, classes = logits.shape
    indices = not target.is_floating_point()
    a, m, u = options.get("logit_scale"), options.get("target_margin"), options.get("sample_weight")
    mask, s = options.get("mask"), options["scale"]
    vector = a is not None and a.dim() == 1
    bias = options.get("logit_bias", torch.zeros(classes) if vector else None)
    kept = target != -100 if indices else torch.ones(rows, dtype=torch.bool)
    stats, grad = torch.full((3, rows), torch.nan), torch.full((rows, classes), torch.nan)
    held = [target.long() if indices else None, None if indices else target]
    vectors = [a * s if vector else None, bias, None if m is None else m * s]
    offsets, neighbors, back_from = options["neighbors"].rows(options["mode"]) if "neighbors" in options else NO_MAP
    vectors += [options.get("pairwise_margin"), options.get("weight"), u, mask, options.get("row_class")]
    vectors += [offsets, neighbors]
    weight = options.get("neighbor_weight", 1.0)
    log_weight = math.log(weight) if weight else -math.inf
    order = target.argsort(stable=True) if indices else None

    def call(
        upstream: Tensor | None, lse: Tensor | None, sums: Tensor | None, pairwise: Tensor | None, out: Tensor | None
    ):
        scratch = torch.empty(library.scratch_size(ctypes.c_int64(classes)))
        library.run(
            *map(ctypes.c_int64, (rows, classes, logits.stride(0))), pointer(logits), *map(pointer, held),
            ctypes.c_int64(-100), ctypes.c_float(s * (a if a is not None and not vector else 1)),
            *map(pointer, vectors), ctypes.c_int64(back_from), ctypes.c_float(log_weight),
            ctypes.c_int64(classes if mask is not None and mask.dim() == 2 else 0),
            ctypes.c_float(options["label_smoothing"]), ctypes.c_float(1 / z), pointer(stats), pointer(out),
            pointer(upstream), ctypes.c_int64(int(upstream is not None and upstream.dim() > 0)), pointer(lse),
            ctypes.c_float(s), pointer(order), pointer(sums), pointer(pairwise), pointer(scratch),
        )  # fmt: skip

    k = kept * (options["weight"][target.long() * kept] if indices and "weight" in options else 1.0)
    z = ((1 if u is None else u) * k).sum().item() if options["reduction"] == "mean" else 1.0
    with_grad = problem.requires_grad == ("logits",) and options["reduction"] != "none" and not options["return_lse"]
    call(None, None, None, None, grad if with_grad else None)
    row_loss = stats[2] if u is None else torch.where(kept, stats[2] * u, stats[2])
    loss = row_loss if options["reduction"] == "none" else row_loss[kept].double().sum().div(z).float()
    results = {"loss": loss} | ({"lse": stats[0] + stats[1]} if options["return_lse"] else {})
    if with_grad:
        return results | {"dlogits": grad * upstream_of(loss)}
    sums, pairwise = torch.zeros(3, classes), torch.zeros(classes, classes) if indices else None
    call(upstream_of(loss), upstream_of(stats[0]) if options["return_lse"] else None, sums, pairwise, grad)
    grads = {"logits": grad, "logit_scale": sums[0] if vector else sums[0].sum(), "logit_bias": sums[1]}
    grads |= {"target_margin": sums[2], "pairwise_margin": pairwise}
    return results | {f"d{name}": grads[name] for name in problem.requires_grad}


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


# --------------------------------------------------------------------------------------------------------------- tests

SMALL = FEATURES | {
    "rows": (1, 5, 19),  # more than are swept together
    "classes": (1, 3, 4, 9, 30),
    "dtype": (torch.float32,),
    "layout": ("contiguous", "row_sliced"),
    "target": ("int64", "ignored", "probabilities"),
    "affine": ("no_affine", "scale", "bias", "scale_bias", "scalar"),
    "weight": ("no_weight", "class_weight", "sample_weight", "both_weights"),
    "grads": ("grad_logits", "grad_all"),
}


def problems() -> list[Problem]:
    """Problems of the suite that the driver can run, and two of its edge cases."""
    chosen = [make_problem(features, seed) for seed in range(3) for features in covering_set(SMALL, seed=seed)]
    chosen += [make_problem(features) for features in one_at_a_time(SMALL, rows=5, classes=30)]
    # The gradient of a sample weight is the autograd node's work, and so is the mean over no rows.
    names = [tuple(name for name in problem.requires_grad if name != "sample_weight") for problem in chosen]
    chosen = [replace(problem, requires_grad=kept) for problem, kept in zip(chosen, names, strict=True)]
    chosen = [problem for problem in chosen if problem.target.is_floating_point() or (problem.target >= 0).any()]
    plain = make_problem({name: values[0] for name, values in SMALL.items()} | {"rows": 5, "classes": 9})
    far = [replace(plain, logits=plain.logits + offset) for offset in (-120.0, 1e4)]
    margin = plain.options | {"target_margin": torch.full((9,), -1e3)}
    silenced = make_problem({name: values[0] for name, values in SMALL.items()} | {"rows": 5, "classes": 9} | SILENCE)
    silenced.logits[:, 5:] += 100 * (silenced.target < 5)[:, None]
    undefined = replace(silenced, logits=silenced.logits.clone())
    undefined.logits[torch.arange(5), silenced.target] = torch.nan
    return [*chosen, *far, replace(plain, options=margin), silenced, undefined]


SILENCE = {"neighbors": "silence"}
PROBLEMS = problems()


def test_kernel_without_fault_passes(libraries: dict) -> None:
    """The driver is right: otherwise every fault would be found."""
    for problem in PROBLEMS:
        assert deviations(problem, run(libraries[None], problem)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(libraries: dict, fault: str) -> None:
    assert any(deviations(problem, run(libraries[fault], problem)) for problem in PROBLEMS)
