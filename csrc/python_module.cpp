// The Python module ltkernels._C: direct calls of the operators that training steps make; ops.cpp registers all of
// them.
#include <c10/util/Exception.h>

#include "margin_options.h"
#include "python_binding.h"

namespace ltkernels {
namespace {

PyObject* pair_of(const at::Tensor& first, const at::Tensor& second) {
  PyObject* pair = PyTuple_New(2);
  if (pair == nullptr) return nullptr;
  PyTuple_SET_ITEM(pair, 0, THPVariable_Wrap(first));
  PyTuple_SET_ITEM(pair, 1, THPVariable_Wrap(second));
  return pair;
}

// The operator for rows of classes: what ltkernels.functional.margin_cross_entropy returns, or NotImplemented for a
// call that Python has to look at first. To find out in Python takes half as long as the loss of a small batch.
PyObject* margin_softmax(PyObject*, PyObject* const* values, Py_ssize_t size) {
  HANDLE_TH_ERRORS
  using Signature = std::tuple<at::Tensor, at::Tensor>(LTK_MARGIN_PARAMETERS, bool);
  static const auto op = typed_operator<Signature>("ltkernels::margin_softmax");
  PythonArguments next(values, size);
  const at::Tensor logits = next.tensor(), target = next.tensor();
  const OptionalTensor weight = next.optional_tensor(), logit_scale = next.optional_tensor(),
                       logit_bias = next.optional_tensor(), target_margin = next.optional_tensor(),
                       pairwise_margin = next.optional_tensor(), mask = next.optional_tensor(),
                       sample_weight = next.optional_tensor(), row_class = next.optional_tensor(),
                       neighbor_offsets = next.optional_tensor(), neighbor_classes = next.optional_tensor();
  const double scale = next.real(), neighbor_weight = next.real();
  const int64_t back_from = next.integer();
  const int64_t reduction = next.word({"none", "mean", "sum"}), ignore_index = next.integer();
  const double label_smoothing = next.real();
  const bool return_lse = next.boolean();
  const bool rows = next.plain() && logits.dim() == 2 && (logits.is_cpu() || logits.is_cuda());
  if (!rows || (target_margin.has_value() && target_margin->dim() == 0)) return Py_NewRef(Py_NotImplemented);
  const auto [loss, lse] = [&] {
    const pybind11::gil_scoped_release no_gil;
    return op.call(LTK_MARGIN_ARGUMENTS, return_lse);
  }();
  return return_lse ? pair_of(loss, lse) : THPVariable_Wrap(loss);
  END_HANDLE_TH_ERRORS
}

// `overload` is torch.ops.ltkernels.log_prior.default.
PyObject* log_prior(PyObject* overload, PyObject* const* values, Py_ssize_t size) {
  HANDLE_TH_ERRORS
  static const auto op = typed_operator<at::Tensor(const at::Tensor&, double)>("ltkernels::log_prior");
  PythonArguments next(values, size);
  const at::Tensor counts = next.tensor();
  const double tau = next.real();
  if (!next.plain()) return PyObject_Vectorcall(overload, values, static_cast<size_t>(size), nullptr);
  return THPVariable_Wrap([&] {
    const pybind11::gil_scoped_release no_gil;
    return op.call(counts, tau);
  }());
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*kCall)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fast_call() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(kCall));
}

PyObject* direct_log_prior(PyObject*, PyObject* overload) {
  static PyMethodDef method = {"direct_log_prior", fast_call<log_prior>(), METH_FASTCALL, nullptr};
  return PyCFunction_New(&method, overload);
}

PyMethodDef kMethods[] = {
    {"margin_softmax", fast_call<margin_softmax>(), METH_FASTCALL,
     "The operator's arguments, reduction in words: the loss, or (loss, lse) where it is asked for; NotImplemented for "
     "arguments that are not plain."},
    {"direct_log_prior", &direct_log_prior, METH_O,
     "direct_log_prior(overload): the operator without the generic call's argument matching."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "ltkernels._C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace ltkernels

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&ltkernels::kModule); }
