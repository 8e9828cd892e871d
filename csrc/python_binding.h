// Operators as plain C functions of Python: torch.ops' generic call, which matches every argument with the schema at
// run time, costs several times what a small kernel does.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/python_headers.h>

#include <initializer_list>
#include <optional>

namespace ltkernels {

// The arguments of one call. Each accessor reads the next one; `plain` turns false at one that is not of the exact
// type expected (a tensor subclass, a sparse tensor, a symbolic number, a mistake): then the generic call must decide.
class PythonArguments {
 public:
  PythonArguments(PyObject* const* values, Py_ssize_t size) : next_(values), end_(values + size) {}

  bool plain() const { return plain_ && next_ == end_ && !at::impl::torch_function_mode_enabled(); }

  at::Tensor tensor() {
    PyObject* x = next();
    if (x == nullptr || !THPVariable_CheckExact(x)) return fail<at::Tensor>();
    const at::Tensor& value = THPVariable_Unpack(x);
    return value.layout() == at::kStrided && !value.is_nested() ? value : fail<at::Tensor>();
  }

  std::optional<at::Tensor> optional_tensor() {
    if (next_ != end_ && *next_ == Py_None) {
      ++next_;
      return std::nullopt;
    }
    return tensor();
  }

  double real() {
    PyObject* x = next();
    return x != nullptr && PyFloat_CheckExact(x) ? PyFloat_AS_DOUBLE(x) : fail<double>();
  }

  int64_t integer() {
    PyObject* x = next();
    if (x == nullptr || !PyLong_CheckExact(x)) return fail<int64_t>();
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
    return overflow == 0 ? value : fail<int64_t>();
  }

  // Which of the words, counted from 0.
  int64_t word(std::initializer_list<const char*> words) {
    PyObject* x = next();
    if (x == nullptr || !PyUnicode_CheckExact(x)) return fail<int64_t>();
    for (const char* const& word : words) {
      if (PyUnicode_CompareWithASCIIString(x, word) == 0) return &word - words.begin();
    }
    return fail<int64_t>();
  }

  bool boolean() {
    PyObject* x = next();
    return x == Py_True || (x != Py_False && fail<bool>());
  }

 private:
  PyObject* const* next_;
  PyObject* const* end_;
  bool plain_ = true;

  PyObject* next() { return next_ == end_ ? nullptr : *next_++; }

  template <typename T>
  T fail() {
    plain_ = false;
    return T();
  }
};

}  // namespace ltkernels
