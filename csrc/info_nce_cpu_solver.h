// The losses of an InfoNCEProblem on the CPU, and their gradients.
#pragma once

#include "info_nce_cpu_kernel.h"
#include "info_nce_problem.h"

namespace avppc {

struct Wanted {
  bool contexts, targets, weights, scale;
  bool any() const { return contexts || targets || weights || scale; }
};

// Where a forward writes what it finds of all rows: memory of the caller.
struct Statistics {
  float *loss, *correct;          // [K, N]; `correct` is 1 where the positive beats every negative
  LogSumExp row_lse, column_lse;  // [K, N]; [K, M] of a symmetric loss
};

struct Gradients {
  std::optional<Tensor> contexts, targets, weights, scale;  // float32, shaped like what they belong to; where wanted
};

// Losses and statistics of all rows; with du [K, N], the gradient by each row's loss, the gradients wanted as well.
Gradients info_nce_forward(const InfoNCEProblem& problem, const Statistics& result, const float* du,
                           const Wanted& wanted);

// The gradients wanted, from du and the log-sum-exps of an earlier forward.
Gradients info_nce_backward(const InfoNCEProblem& problem, const float* du, const LogSumExp& row_lse,
                            const LogSumExp& column_lse, const Wanted& wanted);

}  // namespace avppc
