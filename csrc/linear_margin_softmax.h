// Which gradients linear_margin_softmax_fwd (the first three) and _bwd are asked for.
#pragma once

#include <cstdint>

namespace ltkernels {

enum LinearGradBit : int64_t { kGradInput = 1, kGradWeight = 2, kGradBias = 4, kGradClasses = 8, kGradPairs = 16 };

}  // namespace ltkernels
