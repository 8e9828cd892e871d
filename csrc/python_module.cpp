// The Python module ltkernels._C: direct calls of the operators that training steps make; ops.cpp registers all of
// them.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include "log_prior.h"
#include "margin_softmax_op.h"
#include "python_binding.h"

namespace ltkernels {
namespace {

// (first, second), or (first, None): a Python object for a tensor that nobody wants costs as much as a small kernel.
PyObject* pack(const at::Tensor& first, const at::Tensor& second, bool with_second) {
  PyObject* pair = PyTuple_New(2);
  if (pair == nullptr) return nullptr;
  PyTuple_SET_ITEM(pair, 0, THPVariable_Wrap(first));
  PyTuple_SET_ITEM(pair, 1, with_second ? THPVariable_Wrap(second) : Py_NewRef(Py_None));
  return pair;
}

// `overload` is torch.ops.ltkernels.margin_softmax.default: it takes every call that is not plain.
PyObject* margin_softmax(PyObject* overload, PyObject* const* values, Py_ssize_t size) {
  HANDLE_TH_ERRORS
  using Signature = std::tuple<at::Tensor, at::Tensor>(LTK_MARGIN_PARAMETERS, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("ltkernels::margin_softmax", "").typed<Signature>();
  PythonArguments next(values, size);
  const at::Tensor logits = next.tensor(), target = next.tensor();
  const OptionalTensor weight = next.optional_tensor(), logit_scale = next.optional_tensor(),
                       logit_bias = next.optional_tensor(), target_margin = next.optional_tensor(),
                       pairwise_margin = next.optional_tensor(), mask = next.optional_tensor(),
                       sample_weight = next.optional_tensor(), row_class = next.optional_tensor(),
                       neighbor_offsets = next.optional_tensor(), neighbor_classes = next.optional_tensor();
  const double scale = next.real(), neighbor_weight = next.real();
  const int64_t back_from = next.integer();
  const int64_t reduction = next.integer(), ignore_index = next.integer();
  const double label_smoothing = next.real();
  const bool return_lse = next.boolean();
  if (!next.plain()) return PyObject_Vectorcall(overload, values, static_cast<size_t>(size), nullptr);
  const auto [loss, lse] = [&] {
    const pybind11::gil_scoped_release no_gil;
    return op.call(LTK_MARGIN_ARGUMENTS, return_lse);
  }();
  return pack(loss, lse, return_lse);
  END_HANDLE_TH_ERRORS
}

// `overload` is torch.ops.ltkernels.log_prior.default. The operator is a composite one: no dispatch is skipped.
PyObject* log_prior(PyObject* overload, PyObject* const* values, Py_ssize_t size) {
  HANDLE_TH_ERRORS
  PythonArguments next(values, size);
  const at::Tensor counts = next.tensor();
  const double tau = next.real();
  if (!next.plain()) return PyObject_Vectorcall(overload, values, static_cast<size_t>(size), nullptr);
  return THPVariable_Wrap([&] {
    const pybind11::gil_scoped_release no_gil;
    return ltkernels::log_prior(counts, tau);
  }());
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*kCall)(PyObject*, PyObject* const*, Py_ssize_t)>
PyObject* direct(PyObject*, PyObject* overload) {
  static PyMethodDef method = {
      "direct", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(kCall)), METH_FASTCALL, nullptr};
  return PyCFunction_New(&method, overload);
}

PyMethodDef kMethods[] = {
    {"direct_margin_softmax", &direct<margin_softmax>, METH_O,
     "direct_margin_softmax(overload): the operator without the generic call's argument matching, and with None for "
     "an lse that is not asked for."},
    {"direct_log_prior", &direct<log_prior>, METH_O, "direct_log_prior(overload): as direct_margin_softmax."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "ltkernels._C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace ltkernels

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&ltkernels::kModule); }
