// The operators of the bilinear InfoNCE loss on the CPU: their schemas, their arguments, what they return.
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

// The means over rows of x [K, N].
Tensor mean_of_rows(const Tensor& x) {
  const int64_t K = x.size(0), N = x.size(1);
  Tensor result = empty_floats({K});
  for (int64_t k = 0; k < K; ++k) {
    const float* row = x.const_data_ptr<float>() + k * N;
    const double sum = std::accumulate(row, row + N, 0.0);
    result.mutable_data_ptr<float>()[k] = static_cast<float>(sum / static_cast<double>(N));
  }
  return result;
}

// The gradient of sum_k shares[k] mean_i rows[k, i] by each row's loss, [K, N].
std::vector<float> gradient_of_mean(const InfoNCEProblem& p, const Tensor& shares) {
  check_dtype("shares", shares, ScalarType::Float);
  check_contiguous("shares", shares);
  AVPPC_CHECK(shares.dim() == 1 && shares.numel() == p.K, "shares must have shape [", p.K, "]");
  const float* share = shares.const_data_ptr<float>();
  std::vector<float> du(p.K * p.N);
  for (int64_t n = 0; n < p.K * p.N; ++n) du[n] = share[n / p.N] / static_cast<float>(p.N);
  return du;
}

// drows [K, N], contiguous; checks the log-sum-exps of the forward beside it.
Tensor gradient_of_rows(const InfoNCEProblem& p, const Tensor& drows, const Tensor& row_lse) {
  check_dtype("drows", drows, ScalarType::Float);
  AVPPC_CHECK(drows.dim() == 2 && drows.size(0) == p.K && drows.size(1) == p.N, "drows must have shape [", p.K, ", ",
              p.N, "]");
  AVPPC_CHECK(row_lse.numel() == 2 * p.K * p.N && row_lse.is_contiguous(), "row_lse must be what the forward returned");
  return torch::stable::contiguous(drows);
}

using MeanAndGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the operators of the mean return.
MeanAndGradients mean_and_gradients(const InfoNCEProblem& p, const Tensor& shares, const Statistics& result,
                                    const Gradients& d) {
  const float* share = shares.const_data_ptr<float>();
  const Tensor task_loss = mean_of_rows(result.rows);
  Tensor loss = empty_floats({});
  *loss.mutable_data_ptr<float>() =
      static_cast<float>(std::inner_product(share, share + p.K, task_loss.const_data_ptr<float>(), 0.0));
  // float16 gradients would lose their digits, or all, before the backward multiplies them by what comes upstream
  const ScalarType dtype = p.dtype == ScalarType::Half ? ScalarType::Float : p.dtype;
  return {loss, task_loss, mean_of_rows(result.correct), in_dtype(d.contexts, dtype), in_dtype(d.targets, dtype),
          in_dtype(d.weights, dtype), d.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_cpu(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Tensor& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, bool symmetric) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, positive_offset, context_ids, target_ids, symmetric);
  const Statistics result = info_nce_forward(p, nullptr, {}, nullptr);
  return {result.rows, result.correct, result.row_lse, result.column_lse};
}

MeanAndGradients info_nce_cpu_mean(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Tensor& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, bool symmetric,
    const Tensor& shares, bool need_contexts, bool need_targets, bool need_weights, bool need_scale) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, positive_offset, context_ids, target_ids, symmetric);
  AVPPC_CHECK(positive_offset != NO_POSITIVE, "positive_offset must be at least 0, got ", positive_offset);
  const std::vector<float> du = gradient_of_mean(p, shares);
  Gradients d;
  const Wanted wanted{need_contexts, need_targets, need_weights && weights.has_value(), need_scale};
  const Statistics result = info_nce_forward(p, du.data(), wanted, &d);
  return mean_and_gradients(p, shares, result, d);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_cpu_backward(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Tensor& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, bool symmetric,
    const Tensor& row_lse, const Tensor& column_lse, const Tensor& drows, bool need_contexts, bool need_targets,
    bool need_weights, bool need_scale) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, positive_offset, context_ids, target_ids, symmetric);
  AVPPC_CHECK(column_lse.numel() == (symmetric ? 2 * p.K * p.M : 0) && column_lse.is_contiguous(),
              "column_lse must be what info_nce_cpu returned");
  const Tensor du = gradient_of_rows(p, drows, row_lse);
  const Gradients d = info_nce_backward(
      p, du.const_data_ptr<float>(), row_lse, column_lse,
      {need_contexts, need_targets, need_weights && weights.has_value(), need_scale});
  return {in_dtype(d.contexts, p.dtype), in_dtype(d.targets, p.dtype), in_dtype(d.weights, p.dtype), d.scale};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_moments_cpu(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Tensor& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, int64_t rows, int64_t columns,
    const Tensor& candidates, const Tensor& shifts) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, NO_POSITIVE, {}, {}, false);
  const Moments m(p, rows, columns, positive_offset, candidates, shifts, context_ids, target_ids);
  const Statistics result = info_nce_moments_forward(p, m, nullptr, {}, nullptr);
  return {result.rows, result.correct, result.row_lse};
}

MeanAndGradients info_nce_moments_cpu_mean(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Tensor& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, int64_t rows, int64_t columns,
    const Tensor& candidates, const Tensor& shifts, const Tensor& shares, bool need_contexts, bool need_targets,
    bool need_weights, bool need_scale) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, NO_POSITIVE, {}, {}, false);
  const Moments m(p, rows, columns, positive_offset, candidates, shifts, context_ids, target_ids);
  const std::vector<float> du = gradient_of_mean(p, shares);
  Gradients d;
  const Wanted wanted{need_contexts, need_targets, need_weights && weights.has_value(), need_scale};
  const Statistics result = info_nce_moments_forward(p, m, du.data(), wanted, &d);
  return mean_and_gradients(p, shares, result, d);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_moments_cpu_backward(
    const Tensor& contexts, const Tensor& targets, const Optional& weights, const Tensor& pairs, const Tensor& scale,
    int64_t positive_offset, const Optional& context_ids, const Optional& target_ids, int64_t rows, int64_t columns,
    const Tensor& candidates, const Tensor& shifts, const Tensor& row_lse, const Tensor& drows, bool need_contexts,
    bool need_targets, bool need_weights, bool need_scale) {
  const InfoNCEProblem p(contexts, targets, weights, pairs, scale, NO_POSITIVE, {}, {}, false);
  const Moments m(p, rows, columns, positive_offset, candidates, shifts, context_ids, target_ids);
  const Tensor du = gradient_of_rows(p, drows, row_lse);
  const Gradients d = info_nce_moments_backward(
      p, m, du.const_data_ptr<float>(), row_lse,
      {need_contexts, need_targets, need_weights && weights.has_value(), need_scale});
  return {in_dtype(d.contexts, p.dtype), in_dtype(d.targets, p.dtype), in_dtype(d.weights, p.dtype), d.scale};
}

}  // namespace
}  // namespace avppc

// The arguments up to `symmetric` are those of avppc.bilinear_info_nce, checked there.
#define AVPPC_INFO_NCE_PROBLEM                                                                          \
  "Tensor contexts, Tensor targets, Tensor? weights, Tensor pairs, Tensor scale, int positive_offset, " \
  "Tensor? context_ids, Tensor? target_ids, bool symmetric"
#define AVPPC_INFO_NCE_MOMENTS                                                                               \
  "Tensor contexts, Tensor targets, Tensor? weights, Tensor pairs, Tensor scale, int positive_offset, "      \
  "Tensor? context_ids, Tensor? target_ids, int rows, int columns, Tensor candidates, Tensor shifts"
#define AVPPC_INFO_NCE_NEEDS "bool need_contexts, bool need_targets, bool need_weights, bool need_scale"

STABLE_TORCH_LIBRARY_FRAGMENT(avppc, library) {
  library.def("info_nce_cpu(" AVPPC_INFO_NCE_PROBLEM
              ") -> (Tensor rows, Tensor correct, Tensor row_lse, Tensor column_lse)");
  library.def("info_nce_cpu_backward(" AVPPC_INFO_NCE_PROBLEM
              ", Tensor row_lse, Tensor column_lse, Tensor drows, " AVPPC_INFO_NCE_NEEDS
              ") -> (Tensor dcontexts, Tensor dtargets, Tensor dweights, Tensor dscale)");
  // loss = sum_k shares[k] mean_i rows[k, i], and its gradients along the way; float32 ones of float16 embeddings
  library.def("info_nce_cpu_mean(" AVPPC_INFO_NCE_PROBLEM ", Tensor shares, " AVPPC_INFO_NCE_NEEDS
              ") -> (Tensor loss, Tensor task_loss, Tensor accuracy, "
              "Tensor dcontexts, Tensor dtargets, Tensor dweights, Tensor dscale)");
  library.def("info_nce_moments_cpu(" AVPPC_INFO_NCE_MOMENTS ") -> (Tensor rows, Tensor correct, Tensor row_lse)");
  library.def("info_nce_moments_cpu_backward(" AVPPC_INFO_NCE_MOMENTS ", Tensor row_lse, Tensor drows, "
              AVPPC_INFO_NCE_NEEDS ") -> (Tensor dcontexts, Tensor dtargets, Tensor dweights, Tensor dscale)");
  library.def("info_nce_moments_cpu_mean(" AVPPC_INFO_NCE_MOMENTS ", Tensor shares, " AVPPC_INFO_NCE_NEEDS
              ") -> (Tensor loss, Tensor task_loss, Tensor accuracy, "
              "Tensor dcontexts, Tensor dtargets, Tensor dweights, Tensor dscale)");
}

STABLE_TORCH_LIBRARY_IMPL(avppc, CPU, library) {
  library.impl("info_nce_cpu", TORCH_BOX(&avppc::info_nce_cpu));
  library.impl("info_nce_cpu_backward", TORCH_BOX(&avppc::info_nce_cpu_backward));
  library.impl("info_nce_cpu_mean", TORCH_BOX(&avppc::info_nce_cpu_mean));
  library.impl("info_nce_moments_cpu", TORCH_BOX(&avppc::info_nce_moments_cpu));
  library.impl("info_nce_moments_cpu_backward", TORCH_BOX(&avppc::info_nce_moments_cpu_backward));
  library.impl("info_nce_moments_cpu_mean", TORCH_BOX(&avppc::info_nce_moments_cpu_mean));
}
