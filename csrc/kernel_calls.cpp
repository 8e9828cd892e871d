#include "kernel_calls.h"

#include <ATen/Version.h>
#include <ATen/core/Dict.h>
#include <torch/library.h>

#include <mutex>
#include <vector>

namespace ltkernels {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<const KernelCounter*> counters;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

c10::Dict<std::string, int64_t> kernel_calls() {
  c10::Dict<std::string, int64_t> calls;
  const std::lock_guard<std::mutex> lock(registry().mutex);
  for (const KernelCounter* counter : registry().counters) calls.insert(counter->name(), counter->count());
  return calls;
}

}  // namespace

KernelCounter::KernelCounter(std::string name) : name_(std::move(name)) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().counters.push_back(this);
}

TORCH_LIBRARY_FRAGMENT(ltkernels, m) {
  m.def("kernel_calls() -> Dict(str, int)", &kernel_calls);
  m.def("cpu_capability() -> str", [] { return at::get_cpu_capability(); });
}

}  // namespace ltkernels
