// Counts of kernel launches by name: tests and `ltkernels doctor` see which kernel served a call.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace ltkernels {

// One counter, registered on construction under `name` and counted without a lock. Must have static storage.
class KernelCounter {
 public:
  explicit KernelCounter(std::string name);
  void add() { count_.fetch_add(1, std::memory_order_relaxed); }
  const std::string& name() const { return name_; }
  int64_t count() const { return count_.load(std::memory_order_relaxed); }

 private:
  std::string name_;
  std::atomic<int64_t> count_{0};
};

}  // namespace ltkernels
