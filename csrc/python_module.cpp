// The Python module ltkernels._C: direct calls of the operators that training steps make; ops.cpp registers all of
// them.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include "margin_softmax_op.h"
#include "python_binding.h"

namespace ltkernels {
namespace {

PyObject* pack(const at::Tensor& first, const at::Tensor& second) {
  PyObject* pair = PyTuple_New(2);
  if (pair == nullptr) return nullptr;
  PyTuple_SET_ITEM(pair, 0, THPVariable_Wrap(first));
  PyTuple_SET_ITEM(pair, 1, THPVariable_Wrap(second));
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
  return pack(loss, lse);
  END_HANDLE_TH_ERRORS
}

PyMethodDef kMarginSoftmax = {
    "margin_softmax", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&margin_softmax)), METH_FASTCALL, nullptr};

// direct(overload): the direct call of an operator, given the generic one.
PyObject* direct(PyObject*, PyObject* overload) { return PyCFunction_New(&kMarginSoftmax, overload); }

PyMethodDef kMethods[] = {
    {"direct", &direct, METH_O, "direct(overload): margin_softmax without the generic call's argument matching."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "ltkernels._C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace ltkernels

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&ltkernels::kModule); }
