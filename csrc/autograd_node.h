// Autograd nodes across torch versions, and nodes that can be differentiated once only.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/version.h>

#include <memory>
#include <string>
#include <utility>

namespace ltkernels {

// Node is held by shared_ptr up to torch 2.11 and by intrusive_ptr later: take the type from what torch declares.
using NodePtr = std::decay_t<decltype(std::declval<torch::autograd::Edge>().function)>;

template <typename T>
struct IsSharedPtr : std::false_type {};
template <typename T>
struct IsSharedPtr<std::shared_ptr<T>> : std::true_type {};

template <typename N, typename... Args>
auto make_node(Args&&... args) {
  if constexpr (IsSharedPtr<NodePtr>::value) {
    // deleteNode exists in such versions only: a generic lambda looks the name up when it is instantiated.
    return std::shared_ptr<N>(new N(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<N>(std::forward<Args>(args)...);
  }
}

// `results` as they are, but differentiating them raises: a gradient penalty must not lose its second-order term
// without a word. Identity where no graph is being recorded.
inline torch::autograd::variable_list differentiable_once(
    const std::string& what, torch::autograd::variable_list results) {
  if (!at::GradMode::is_enabled()) return results;
  torch::autograd::variable_list inputs;
  for (const at::Tensor& result : results) {
    at::Tensor input = result.defined() ? result.detach() : result;
    if (input.defined()) input.set_requires_grad(true);
    inputs.push_back(std::move(input));
  }
  auto error = make_node<torch::autograd::DelayedError>(
      "ltkernels: " + what +
          " can be differentiated once only; second derivatives are not implemented. "
          "LTKERNELS_BACKEND=reference computes them.",
      static_cast<int64_t>(inputs.size()));
  return (*error)(std::move(inputs));
}

}  // namespace ltkernels
