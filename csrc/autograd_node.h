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

// Makes the second derivative of `results` raise: a gradient penalty must not lose its second-order term without a
// word. `edges` lead to what the results were computed from, so that the error lies on every path back to it (and on
// the path of the enclosing level under nested torch.func.grad). Does nothing where no graph is being recorded.
inline void differentiable_once(
    const std::string& what, const torch::autograd::variable_list& results, torch::autograd::edge_list edges) {
  if (!at::GradMode::is_enabled()) return;
  auto error = make_node<torch::autograd::Error>(
      "ltkernels: " + what +
          " can be differentiated once only; second derivatives are not implemented. "
          "LTKERNELS_BACKEND=reference computes them.",
      std::move(edges));
  for (const at::Tensor& result : results) {
    if (result.defined()) torch::autograd::set_history(result, error);
  }
}

// The same for what a node returns, while a graph of the backward pass is being recorded.
inline void differentiable_once(
    const std::string& what, const torch::autograd::variable_list& grads, const torch::autograd::Node& node,
    const torch::autograd::variable_list& upstream) {
  if (!at::GradMode::is_enabled()) return;
  torch::autograd::edge_list edges = node.next_edges();
  for (const at::Tensor& x : upstream) {
    if (x.defined() && x.requires_grad()) edges.push_back(torch::autograd::impl::gradient_edge(x));
  }
  differentiable_once(what, grads, std::move(edges));
}

}  // namespace ltkernels
