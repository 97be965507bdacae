// The operators of the bilinear InfoNCE loss on the CPU: their schemas, their arguments, what they return.
#include <memory>
#include <numeric>
#include <tuple>

#include "info_nce_cpu_moments.h"
#include "info_nce_cpu_solver.h"

namespace avppc {
namespace {

using Optional = std::optional<Tensor>;

Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return dtype == ScalarType::Float ? tensor : torch::stable::to(tensor, dtype);
}

LogSumExp halves(const Tensor& lse) {  // [2, ...]
  float* maximum = lse.mutable_data_ptr<float>();
  return {maximum, maximum + lse.numel() / 2};
}

// What an operator returns of each row (and column): losses and hits [K, N], log-sum-exps [2, K, N] and [2, K, M].
struct Rows {
  explicit Rows(const InfoNCEProblem& p)
      : loss(empty_floats({p.K, p.N})),
        correct(empty_floats({p.K, p.N})),
        row_lse(empty_floats({2, p.K, p.N})),
        column_lse(empty_floats({2, p.K, p.symmetric ? p.M : 0})) {}

  Statistics statistics() const {
    return {loss.mutable_data_ptr<float>(), correct.mutable_data_ptr<float>(), halves(row_lse), halves(column_lse)};
  }

  Tensor loss, correct, row_lse, column_lse;
};

// drows [K, N], contiguous; checks the log-sum-exps of the forward beside it.
Tensor gradient_of_rows(const InfoNCEProblem& p, const Tensor& drows, const Tensor& row_lse) {
  check_dtype("drows", drows, ScalarType::Float);
  AVPPC_CHECK(drows.dim() == 2 && drows.size(0) == p.K && drows.size(1) == p.N, "drows must have shape [", p.K, ", ",
              p.N, "]");
  AVPPC_CHECK(row_lse.numel() == 2 * p.K * p.N && row_lse.is_contiguous(), "row_lse must be what the forward returned");
  return torch::stable::contiguous(drows);
}

using FourGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Empty where not wanted.
FourGradients four(const Gradients& d, ScalarType dtype) {
  const auto found = [](const std::optional<Tensor>& x, ScalarType to) {
    return x.has_value() ? in_dtype(*x, to) : empty_floats({0});
  };
  return {found(d.contexts, dtype), found(d.targets, dtype), found(d.weights, dtype), found(d.scale, ScalarType::Float)};
}

// The share of each sub-task's loss in the mean; equal ones where none are given.
std::vector<float> read_shares(const Optional& shares, int64_t tasks) {
  if (!shares.has_value()) return std::vector<float>(tasks, static_cast<float>(1.0 / static_cast<double>(tasks)));
  check_dtype("shares", *shares, ScalarType::Float);
  check_contiguous("shares", *shares);
  AVPPC_CHECK(shares->dim() == 1 && shares->numel() == tasks, "shares must have shape [", tasks, "]");
  const float* share = shares->const_data_ptr<float>();
  return {share, share + tasks};
}

// means[k] = the mean of x [K, N] over its rows.
void average_rows(const InfoNCEProblem& p, const float* x, float* means) {
  for (int64_t k = 0; k < p.K; ++k, x += p.N) {
    means[k] = static_cast<float>(std::accumulate(x, x + p.N, 0.0) / static_cast<double>(p.N));
  }
}

using MeanAndGradients = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

// loss = sum_k shares[k] mean_i rows[k, i], statistics [2, K] and the gradients wanted, by forward(result, du), which
// writes each row's loss and hit, and knows from du the gradient by that loss.
template <class Forward>
MeanAndGradients mean_and_gradients(const InfoNCEProblem& p, const Optional& shares, const Forward& forward) {
  const std::vector<float> share = read_shares(shares, p.K);
  const int64_t rows = p.K * p.N, columns = p.symmetric ? p.K * p.M : 0;
  std::vector<float> du(rows);
  for (int64_t n = 0; n < rows; ++n) du[n] = share[n / p.N] / static_cast<float>(p.N);
  const auto memory = std::make_unique_for_overwrite<float[]>(4 * rows + 2 * columns);
  float *row = memory.get(), *column = row + 4 * rows;
  const Statistics result{row, row + rows, {row + 2 * rows, row + 3 * rows}, {column, column + columns}};
  const Gradients d = forward(result, du.data());

  const Tensor loss = empty_floats({}), statistics = empty_floats({2, p.K});
  float* task_loss = statistics.mutable_data_ptr<float>();
  average_rows(p, result.loss, task_loss);
  average_rows(p, result.correct, task_loss + p.K);
  *loss.mutable_data_ptr<float>() = static_cast<float>(std::inner_product(share.begin(), share.end(), task_loss, 0.0));
  // float16 gradients would lose their digits, or all, before the backward multiplies them by what comes upstream
  const ScalarType dtype = p.dtype == ScalarType::Half ? ScalarType::Float : p.dtype;
  std::vector<Tensor> gradients;
  for (const auto* x : {&d.contexts, &d.targets, &d.weights}) {
    if (x->has_value()) gradients.push_back(in_dtype(**x, dtype));
  }
  if (d.scale.has_value()) gradients.push_back(*d.scale);
  return {loss, statistics, gradients};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_cpu(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Optional& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, bool symmetric) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, positive_offset, context_ids, target_ids, symmetric);
  const Rows rows(p);
  info_nce_forward(p, rows.statistics(), nullptr, {});
  return {rows.loss, rows.correct, rows.row_lse, rows.column_lse};
}

MeanAndGradients info_nce_cpu_mean(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Optional& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, bool symmetric,
    const Optional& shares, bool need_contexts, bool need_targets, bool need_weights, bool need_scale) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, positive_offset, context_ids, target_ids, symmetric);
  AVPPC_CHECK(positive_offset != NO_POSITIVE, "positive_offset must be at least 0, got ", positive_offset);
  const Wanted wanted{need_contexts, need_targets, need_weights && weights.has_value(), need_scale};
  return mean_and_gradients(
      p, shares, [&](const Statistics& result, const float* du) { return info_nce_forward(p, result, du, wanted); });
}

FourGradients info_nce_cpu_backward(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Optional& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, bool symmetric,
    const Tensor& row_lse, const Tensor& column_lse, const Tensor& drows, bool need_contexts, bool need_targets,
    bool need_weights, bool need_scale) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, positive_offset, context_ids, target_ids, symmetric);
  AVPPC_CHECK(column_lse.numel() == (symmetric ? 2 * p.K * p.M : 0) && column_lse.is_contiguous(),
              "column_lse must be what info_nce_cpu returned");
  const Tensor du = gradient_of_rows(p, drows, row_lse);
  const Wanted wanted{need_contexts, need_targets, need_weights && weights.has_value(), need_scale};
  return four(info_nce_backward(p, du.const_data_ptr<float>(), halves(row_lse), halves(column_lse), wanted), p.dtype);
}

std::tuple<Tensor, Tensor, Tensor> info_nce_moments_cpu(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Optional& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, int64_t rows, int64_t columns,
    const Tensor& candidates, const Tensor& shifts) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, NO_POSITIVE, {}, {}, false);
  const Moments m(p, rows, columns, positive_offset, candidates, shifts, context_ids, target_ids);
  const Rows found(p);
  info_nce_moments_forward(p, m, found.statistics(), nullptr, {});
  return {found.loss, found.correct, found.row_lse};
}

MeanAndGradients info_nce_moments_cpu_mean(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Optional& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, int64_t rows, int64_t columns,
    const Tensor& candidates, const Tensor& shifts, const Optional& shares, bool need_contexts, bool need_targets,
    bool need_weights, bool need_scale) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, NO_POSITIVE, {}, {}, false);
  const Moments m(p, rows, columns, positive_offset, candidates, shifts, context_ids, target_ids);
  const Wanted wanted{need_contexts, need_targets, need_weights && weights.has_value(), need_scale};
  return mean_and_gradients(p, shares, [&](const Statistics& result, const float* du) {
    return info_nce_moments_forward(p, m, result, du, wanted);
  });
}

FourGradients info_nce_moments_cpu_backward(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Optional& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, int64_t rows, int64_t columns,
    const Tensor& candidates, const Tensor& shifts, const Tensor& row_lse, const Tensor& drows, bool need_contexts,
    bool need_targets, bool need_weights, bool need_scale) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, NO_POSITIVE, {}, {}, false);
  const Moments m(p, rows, columns, positive_offset, candidates, shifts, context_ids, target_ids);
  const Tensor du = gradient_of_rows(p, drows, row_lse);
  const Wanted wanted{need_contexts, need_targets, need_weights && weights.has_value(), need_scale};
  return four(info_nce_moments_backward(p, m, du.const_data_ptr<float>(), halves(row_lse), wanted), p.dtype);
}

}  // namespace
}  // namespace avppc

// The arguments up to `symmetric` are those of avppc.bilinear_info_nce, which checks them one by one where these
// operators refuse them.
#define AVPPC_INFO_NCE_PROBLEM                                                                          \
  "Tensor contexts, Tensor targets, Tensor? weights, Tensor? pairs, Tensor scale, int positive_offset, " \
  "Tensor? context_ids, Tensor? target_ids, bool symmetric"
#define AVPPC_INFO_NCE_MOMENTS                                                                               \
  "Tensor contexts, Tensor targets, Tensor? weights, Tensor? pairs, Tensor scale, int positive_offset, "      \
  "Tensor? context_ids, Tensor? target_ids, int rows, int columns, Tensor candidates, Tensor shifts"
#define AVPPC_INFO_NCE_NEEDS "bool need_contexts, bool need_targets, bool need_weights, bool need_scale"

STABLE_TORCH_LIBRARY_FRAGMENT(avppc, library) {
  library.def("info_nce_cpu(" AVPPC_INFO_NCE_PROBLEM
              ") -> (Tensor rows, Tensor correct, Tensor row_lse, Tensor column_lse)");
  library.def("info_nce_cpu_backward(" AVPPC_INFO_NCE_PROBLEM
              ", Tensor row_lse, Tensor column_lse, Tensor drows, " AVPPC_INFO_NCE_NEEDS
              ") -> (Tensor dcontexts, Tensor dtargets, Tensor dweights, Tensor dscale)");
  // loss = sum_k shares[k] mean_i rows[k, i]; the mean loss and the share of hits of each sub-task, [2, K]; the
  // gradients needed, in the order of their flags, and of float16 embeddings in float32
  library.def("info_nce_cpu_mean(" AVPPC_INFO_NCE_PROBLEM ", Tensor? shares, " AVPPC_INFO_NCE_NEEDS
              ") -> (Tensor loss, Tensor statistics, Tensor[] gradients)");
  library.def("info_nce_moments_cpu(" AVPPC_INFO_NCE_MOMENTS ") -> (Tensor rows, Tensor correct, Tensor row_lse)");
  library.def("info_nce_moments_cpu_backward(" AVPPC_INFO_NCE_MOMENTS ", Tensor row_lse, Tensor drows, "
              AVPPC_INFO_NCE_NEEDS ") -> (Tensor dcontexts, Tensor dtargets, Tensor dweights, Tensor dscale)");
  library.def("info_nce_moments_cpu_mean(" AVPPC_INFO_NCE_MOMENTS ", Tensor? shares, " AVPPC_INFO_NCE_NEEDS
              ") -> (Tensor loss, Tensor statistics, Tensor[] gradients)");
}

STABLE_TORCH_LIBRARY_IMPL(avppc, CPU, library) {
  library.impl("info_nce_cpu", TORCH_BOX(&avppc::info_nce_cpu));
  library.impl("info_nce_cpu_backward", TORCH_BOX(&avppc::info_nce_cpu_backward));
  library.impl("info_nce_cpu_mean", TORCH_BOX(&avppc::info_nce_cpu_mean));
  library.impl("info_nce_moments_cpu", TORCH_BOX(&avppc::info_nce_moments_cpu));
  library.impl("info_nce_moments_cpu_backward", TORCH_BOX(&avppc::info_nce_moments_cpu_backward));
  library.impl("info_nce_moments_cpu_mean", TORCH_BOX(&avppc::info_nce_moments_cpu_mean));
}
