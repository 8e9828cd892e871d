// Linear classifier and margin softmax in row chunks, on any device: the N x C logits never exist.
//
// For each chunk of rows x:  f = x W^T + bias;  the row kernel, which turns f into G = dloss/df where f lies;
//                            dx = G W;  dW += G^T x;  dbias += sum of rows of G.
// That is 6 N D C operations. With the gradient for another upstream gradient than 1 the logits are computed twice.
//
// On CPUs 16-bit features and classifiers are multiplied in float32, as torch's products are ten times slower where the
// processor has none, and the logits are not rounded; bfloat16 is multiplied as such where the processor does
// (product_type).
//
// The cosine classifier is f = <x / |x|, W_j / |W_j|>: rows of x are divided by their length in the chunk, and 1 /
// |W_j| goes into the scale of each class, so that no normalised W is stored. With c_j = the gradient to W_j as if
// |W_j| were constant, the exact one is c_j - <c_j, W_j> W_j / |W_j|^2; likewise for x.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/new_tensors.h"
#include "linear_margin_softmax.h"
#include "margin_options.h"

namespace ltkernels {
namespace {

using at::Tensor;

// A vector no longer than this has no direction: its cosines and its gradient are 0, as in ltkernels.nn.CosineLinear.
constexpr double kSmallestLength = 1e-8;

// Autocast has seen the inputs already; it must not turn sums in float32 into 16 bits.
struct AutocastOff {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// On CPUs a product is computed in blocks of its result, one thread a block, which is up to half as fast again as all
// threads at one product. Their sizes are such that one core runs at its full speed.
struct Block {
  int64_t rows, columns;
};
constexpr Block kLogitBlock{256, 1024}, kInputBlock{256, 256}, kWeightBlock{1024, INT64_MAX};

// Calls f(block, first row, first column) for each block of `product`, or once for all of it where there are fewer
// blocks than threads.
template <typename F>
void in_blocks(const Tensor& product, Block size, F f) {
  const int64_t rows = product.size(0), columns = product.size(1);
  const int64_t height = std::min(size.rows, rows), width = std::min(size.columns, columns);
  const auto count = [](int64_t whole, int64_t part) { return part == 0 ? 0 : (whole + part - 1) / part; };
  const int64_t down = count(rows, height), blocks = down * count(columns, width);
  if (!product.is_cpu() || blocks < at::get_num_threads()) return f(product, 0, 0);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const AutocastOff autocast_off;  // this thread may not have the caller's
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = k % down * height, column = k / down * width;
      const int64_t block_rows = std::min(height, rows - row), block_columns = std::min(width, columns - column);
      f(product.narrow(0, row, block_rows).narrow(1, column, block_columns), row, column);
    }
  });
}

// (rows, 1) lengths, infinite for rows without a direction.
Tensor length_of_rows(const Tensor& x) {
  const at::ScalarType type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor length = at::linalg_vector_norm(x, 2, {1}, /*keepdim=*/true, type);
  return at::where(length > kSmallestLength, length, std::numeric_limits<double>::infinity());
}

std::tuple<Tensor, Tensor> call_fwd_(LTK_MARGIN_PARAMETERS) {
  static const auto op =
      typed_operator<std::tuple<Tensor, Tensor>(LTK_MARGIN_PARAMETERS)>("ltkernels::margin_softmax_fwd_");
  return op.call(LTK_MARGIN_ARGUMENTS);
}

std::tuple<Tensor, Tensor, Tensor> call_fwd(LTK_MARGIN_PARAMETERS, bool with_grad) {
  static const auto op =
      typed_operator<std::tuple<Tensor, Tensor, Tensor>(LTK_MARGIN_PARAMETERS, bool)>("ltkernels::margin_softmax_fwd");
  return op.call(LTK_MARGIN_ARGUMENTS, with_grad);
}

std::tuple<Tensor, Tensor, Tensor> call_bwd(
    const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& stats, LTK_MARGIN_PARAMETERS,
    int64_t grads) {
  static const auto op = typed_operator<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const Tensor&, LTK_MARGIN_PARAMETERS, int64_t)>(
      "ltkernels::margin_softmax_bwd");
  return op.call(grad_loss, grad_lse, stats, LTK_MARGIN_ARGUMENTS, grads);
}

at::ScalarType accumulation_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// What chunks of so many rows are multiplied in. On CPUs oneDNN may have products of bfloat16, which are worth their
// calls from some multiply-adds on.
at::ScalarType product_type(const Tensor& x, int64_t chunk, int64_t classes) {
  if (!x.is_cpu()) return x.scalar_type();
#if defined(__x86_64__)
  static const bool has_bfloat16 = at::hasMKLDNN() && __builtin_cpu_supports("avx512bf16");
  constexpr double kLeast = 1 << 22;
  const bool worth_it = static_cast<double>(chunk) * static_cast<double>(classes) * x.size(1) >= kLeast;
  if (x.scalar_type() == at::kBFloat16 && has_bfloat16 && worth_it && at::globalContext().userEnabledMkldnn())
    return at::kBFloat16;
#endif
  return accumulation_type(x);
}

OptionalTensor rows_of(const OptionalTensor& x, int64_t begin, int64_t size) {
  return x.has_value() ? OptionalTensor(x->narrow(0, begin, size)) : std::nullopt;
}

// As many rows as give a GEMM its full speed: fewer repack the classifier too often (on CPUs, 128 rows take a quarter
// more time than 384). A chunk of small C stays in the caches; one of large C is at most about an eighth of the logits.
int64_t automatic_chunk_rows(const Tensor& input, int64_t classes) {
  const bool cpu = input.is_cpu();
  const int64_t elements = int64_t(1) << (cpu ? 23 : 26);
  const int64_t least = std::clamp<int64_t>(input.size(0) / 8, 64, cpu ? 384 : 1024);
  return std::max(least, elements / std::max<int64_t>(classes, 1) / 64 * 64);
}

class Chunks {
 public:
  Chunks(LTK_LINEAR_PARAMETERS)
      : input_(input),
        cosine_(cosine),
        rows_(input.size(0)),
        classes_(linear_weight.size(0)),
        chunk_(
            std::min(std::max<int64_t>(rows_, 1), chunk_rows > 0 ? chunk_rows : automatic_chunk_rows(input, classes_))),
        type_(product_type(input, chunk_, classes_)),
        weight_type_(linear_weight.scalar_type()),
        weight_(linear_weight.to(type_)),
        options_{LTK_MARGIN_OPTION_ARGUMENTS},
        acc_(input.options().dtype(accumulation_type(input))) {
    if (linear_bias.has_value()) {
      bias_type_ = linear_bias->scalar_type();
      bias_ = linear_bias->to(type_);
    }
    if (cosine) {
      input_length_ = length_of_rows(input);
      weight_length_ = length_of_rows(weight_);
      const Tensor inverse = weight_length_.squeeze(1).reciprocal();
      options_.logit_scale = logit_scale.has_value() ? inverse * *logit_scale : inverse;
    }
    if (reduction == kMean) {
      // Each row brings its share of the mean along, so that chunks add up to it.
      const Tensor u = sample_weight.has_value() ? sample_weight->to(acc_.dtype()) : at::ones({rows_}, acc_);
      normalizer_ = normalizer_of(options_, u);
      options_.sample_weight = u / normalizer_;
      options_.reduction = kSum;
    }
    buffer_ = new_buffer();
  }

  int64_t rows() const { return rows_; }
  int64_t chunk() const { return chunk_; }
  int64_t count() const { return (rows_ + chunk_ - 1) / chunk_; }
  const at::TensorOptions& acc() const { return acc_; }
  const Tensor& normalizer() const { return normalizer_; }

  // Rows of x from `begin` on, of length 1 for the cosine classifier.
  Tensor input_rows(int64_t begin, int64_t size) const {
    const Tensor x = input_.narrow(0, begin, size);
    return (cosine_ ? x / input_length_.narrow(0, begin, size) : x).to(type_);
  }

  Tensor logits(const Tensor& x) {
    const Tensor f = buffer_.narrow(0, 0, x.size(0));
    in_blocks(f, kLogitBlock, [&](Tensor out, int64_t row, int64_t column) {
      const Tensor part = x.narrow(0, row, out.size(0)), weight = weight_.narrow(0, column, out.size(1)).t();
      if (bias_.defined()) at::addmm_out(out, bias_.narrow(0, column, out.size(1)), part, weight);
      else at::mm_out(out, part, weight);
    });
    return f;
  }

  MarginOptions options(int64_t begin, int64_t size) const {
    MarginOptions o = options_;
    o.target = o.target.narrow(0, begin, size);
    if (o.mask.has_value() && o.mask->dim() == 2) o.mask = rows_of(o.mask, begin, size);
    o.sample_weight = rows_of(o.sample_weight, begin, size);
    o.row_class = rows_of(o.row_class, begin, size);
    return o;
  }

  // The most likely of the first `classes` classes, or of all there are, margins aside.
  Tensor predict(const Tensor& f, int64_t classes) const {
    classes = std::min(classes, classes_);
    const Tensor first = f.narrow(1, 0, classes);
    return (cosine_ ? first / weight_length_.squeeze(1).narrow(0, 0, classes) : first).argmax(1);
  }

  // ---- gradients

  void start_gradients(int64_t grads) {
    if (grads & kGradInput) grad_input_ = new_matrix(input_.sizes(), input_.scalar_type());
    if (grads & kGradWeight) grad_weight_ = rows_ == 0 ? at::zeros_like(weight_, acc_) : Tensor();
    if (grads & kGradBias) grad_bias_ = at::zeros({classes_}, acc_);
    grads_ = grads;
  }

  void add_gradients(int64_t begin, const Tensor& x, const Tensor& g) {
    if (grads_ & kGradInput) {
      const Tensor rows = grad_input_.narrow(0, begin, x.size(0));
      Tensor dx = rows.scalar_type() == type_ ? rows : at::empty(rows.sizes(), x.options());
      in_blocks(dx, kInputBlock, [&](Tensor out, int64_t row, int64_t column) {
        at::mm_out(out, g.narrow(0, row, out.size(0)), weight_.narrow(1, column, out.size(1)));
      });
      if (cosine_) project(dx, x, Tensor(), input_length_.narrow(0, begin, x.size(0)));
      if (!dx.is_same(rows)) rows.copy_(dx);
    }
    if (grads_ & kGradWeight) add_weight_gradient(x, g);
    if (grads_ & kGradBias) grad_bias_ += g.sum(0, false, acc_.dtype().toScalarType());
  }

  // In the dtypes of the inputs; empty where not asked for.
  std::tuple<Tensor, Tensor, Tensor> finish_gradients() {
    if (cosine_ && grad_weight_.defined()) project(grad_weight_, weight_, weight_length_, weight_length_);
    // A tensor each: results of an operator may not share memory.
    const auto none = [this] { return at::empty({0}, input_.options()); };
    return {
        grad_input_.defined() ? grad_input_ : none(), grad_weight_.defined() ? grad_weight_.to(weight_type_) : none(),
        grad_bias_.defined() ? grad_bias_.to(bias_type_) : none()};
  }

  // d/da of a class scale that went in as a / |W|.
  void rescale_class_gradient(Tensor& sums) const {
    if (cosine_) sums.select(0, 0).div_(weight_length_.squeeze(1));
  }

 private:
  Tensor input_;
  bool cosine_;
  int64_t rows_, classes_, chunk_;
  at::ScalarType type_, weight_type_, bias_type_ = at::kFloat;  // of the products, and of what was given
  Tensor weight_, bias_;                                        // in type_
  MarginOptions options_;
  at::TensorOptions acc_;
  Tensor input_length_, weight_length_;  // (N, 1) and (C, 1)
  Workspace workspace_;
  Tensor normalizer_, buffer_, grad_input_, grad_weight_, grad_bias_;
  int64_t grads_ = 0;

  // Memory of a chunk of logits. What is small stays for the next call; large memory that is used again and again is
  // worth the time that the system takes to find huge pages, unlike gradients. On CPUs rows begin at a cache line:
  // where they do not, a product writes them at three quarters of its speed.
  Tensor new_buffer() {
    if (!input_.is_cpu()) return new_matrix({chunk_, classes_}, type_);
    const int64_t element = static_cast<int64_t>(c10::elementSize(type_)), line = 64 / element;
    const int64_t stride = (classes_ + line - 1) / line * line;
    Tensor rows;
    if (chunk_ * stride * element <= Workspace::kMost && workspace_.acquire(chunk_ * stride * element)) {
      rows = at::from_blob(workspace_.data(), {chunk_, stride}, at::TensorOptions(type_));
    } else {
      rows = new_matrix({chunk_, stride}, type_);
      if (chunk_ < rows_) advise_huge_pages(rows);
    }
    return rows.narrow(1, 0, classes_);
  }

  Tensor new_matrix(at::IntArrayRef sizes, at::ScalarType type) const {
    return at::empty(sizes, input_.options().dtype(type));
  }

  // dW in float32 (float64): a sum of many chunks in 16 bits would lose the small ones. On CPUs torch has no
  // product of 16-bit matrices in float32: there each chunk's is rounded before it is added.
  void add_weight_gradient(const Tensor& x, const Tensor& g) {
    const at::ScalarType type = accumulation_type(x);
    const bool first = !grad_weight_.defined();
    if (x.scalar_type() == type) {
      if (first) grad_weight_ = new_matrix(weight_.sizes(), type);
      in_blocks(grad_weight_, kWeightBlock, [&](Tensor out, int64_t row, int64_t) {
        const Tensor part = g.narrow(1, row, out.size(0)).t();
        if (first) at::mm_out(out, part, x);
        else out.addmm_(part, x);
      });
    } else if (x.is_cpu()) {
      // Of a single chunk nothing is added up.
      const bool only = count() == 1 && !cosine_ && weight_type_ == x.scalar_type();
      if (first) grad_weight_ = new_matrix(weight_.sizes(), only ? weight_type_ : type);
      in_blocks(grad_weight_, kWeightBlock, [&](Tensor out, int64_t row, int64_t) {
        Tensor part = g.narrow(1, row, out.size(0)).t();
        if (only) at::mm_out(out, part, x);
        else if (first) out.copy_(at::mm(part, x));
        else out.add_(at::mm(part, x));
      });
    } else {
      const Tensor part = at::mm(g.t(), x, type);
      if (first) grad_weight_ = part;
      else grad_weight_ += part;
    }
  }

  // grad, with respect to rows of constant length, made that with respect to `rows` themselves, which have been divided
  // by `length` already unless row_length is given.
  void project(Tensor& grad, const Tensor& rows, const Tensor& row_length, const Tensor& length) const {
    // Dot products of rows, without a matrix of products but for 16 bits on a CPU, where bmm takes several times as
    // long.
    const at::ScalarType type = accumulation_type(grad);
    const Tensor wide = rows.to(grad.scalar_type());
    const bool direct = grad.is_cpu() && grad.scalar_type() != type;
    Tensor along = direct ? (grad.to(type) * wide).sum(1, /*keepdim=*/true)
                          : at::bmm(grad.unsqueeze(1), wide.unsqueeze(2)).squeeze(2).to(type);
    if (row_length.defined()) along = along / row_length.square();
    grad.addcmul_(wide, along.to(grad.scalar_type()), -1);
    if (!row_length.defined()) grad.div_(length);
  }
};

// The row kernel's error once more, for all rows: it counts them from the beginning of the chunk.
void report_index(LTK_LINEAR_PARAMETERS) {
  const Tensor row = at::zeros({1, linear_weight.size(0)}, input.options());
  call_fwd(row.expand({input.size(0), -1}), LTK_MARGIN_OPTION_ARGUMENTS, /*with_grad=*/false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_margin_softmax_fwd(
    LTK_LINEAR_PARAMETERS, int64_t predict, int64_t grads) {
  const AutocastOff autocast_off;
  Chunks chunks(LTK_LINEAR_ARGUMENTS);
  chunks.start_gradients(grads);
  const int64_t rows = chunks.rows();
  Tensor stats = at::empty({3, rows}, chunks.acc());
  Tensor losses = at::empty({reduction == kNone ? rows : chunks.count()}, chunks.acc());  // of rows, or of chunks
  Tensor predicted = at::empty({predict > 0 ? rows : 0}, input.options().dtype(at::kLong));
  for (int64_t begin = 0; begin < rows; begin += chunks.chunk()) {
    const int64_t size = std::min(chunks.chunk(), rows - begin);
    const Tensor x = chunks.input_rows(begin, size);
    const Tensor f = chunks.logits(x);
    if (predict > 0) predicted.narrow(0, begin, size).copy_(chunks.predict(f, predict));
    const MarginOptions o = chunks.options(begin, size);
    Tensor part, part_stats, none;
    try {
      if (grads != 0) std::tie(part, part_stats) = call_fwd_(f, LTK_OPTIONS_OF(o));
      else std::tie(part, part_stats, none) = call_fwd(f, LTK_OPTIONS_OF(o), /*with_grad=*/false);
    } catch (const c10::IndexError&) {
      report_index(LTK_LINEAR_ARGUMENTS);
      throw;
    }
    if (grads != 0) chunks.add_gradients(begin, x, f);
    stats.narrow(1, begin, size).copy_(part_stats);
    if (reduction == kNone) losses.narrow(0, begin, size).copy_(part);
    else losses.select(0, begin / chunks.chunk()).copy_(part);
  }
  Tensor loss = reduction == kNone ? losses : losses.sum(at::kDouble).to(chunks.acc().dtype());
  // 0 / 0 where no row is kept, as in torch.
  if (reduction == kMean) loss += chunks.normalizer().reciprocal() * 0;
  const auto [grad_input, grad_weight, grad_bias] = chunks.finish_gradients();
  return {loss, stats, predicted, grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_margin_softmax_bwd(
    const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& stats, LTK_LINEAR_PARAMETERS,
    int64_t grads) {
  const AutocastOff autocast_off;
  Chunks chunks(LTK_LINEAR_ARGUMENTS);
  chunks.start_gradients(grads);
  const int64_t rows = chunks.rows(), classes = linear_weight.size(0);
  const bool logits_wanted = grads & (kGradInput | kGradWeight | kGradBias), class_wanted = grads & kGradClasses,
             pairwise_wanted = grads & kGradPairs;
  int64_t wanted = 0;
  if (logits_wanted) wanted |= kGradLogits;
  if (class_wanted) wanted |= kGradClass;
  if (pairwise_wanted) wanted |= kGradPairwise;
  Tensor sums = class_wanted ? at::zeros({3, classes}, chunks.acc()) : at::empty({0}, chunks.acc());
  Tensor pairs = pairwise_wanted ? at::zeros({classes, classes}, chunks.acc()) : at::empty({0}, chunks.acc());
  for (int64_t begin = 0; begin < rows; begin += chunks.chunk()) {
    const int64_t size = std::min(chunks.chunk(), rows - begin);
    const Tensor x = chunks.input_rows(begin, size);
    const MarginOptions o = chunks.options(begin, size);
    const Tensor upstream = grad_loss.dim() == 0 ? grad_loss : grad_loss.narrow(0, begin, size);
    const auto [g, part_sums, part_pairs] = call_bwd(
        upstream, rows_of(grad_lse, begin, size), stats.narrow(1, begin, size), chunks.logits(x), LTK_OPTIONS_OF(o),
        wanted);
    if (logits_wanted) chunks.add_gradients(begin, x, g);
    if (class_wanted) sums += part_sums;
    if (pairwise_wanted) pairs += part_pairs;
  }
  if (class_wanted) chunks.rescale_class_gradient(sums);
  const auto [grad_input, grad_weight, grad_bias] = chunks.finish_gradients();
  return {grad_input, grad_weight, grad_bias, sums, pairs};
}

TORCH_LIBRARY_IMPL(ltkernels, CompositeExplicitAutograd, m) {
  m.impl("linear_margin_softmax_fwd", &linear_margin_softmax_fwd);
  m.impl("linear_margin_softmax_bwd", &linear_margin_softmax_bwd);
}

}  // namespace
}  // namespace ltkernels
