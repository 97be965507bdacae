// The losses of an InfoNCEProblem on the CPU, and their gradients.
#pragma once

#include "info_nce_problem.h"

namespace avppc {

struct Wanted {
  bool contexts, targets, weights, scale;
  bool any() const { return contexts || targets || weights || scale; }
};

struct Statistics {
  Tensor rows, correct;        // [K, N]: losses, and 1 where the positive beats every negative
  Tensor row_lse, column_lse;  // [2, K, N]: maximum and log of the sum; [2, K, M] of a symmetric loss, else empty
};

struct Gradients {
  Tensor contexts, targets, weights, scale;  // float32; empty where not wanted
};

// Losses and statistics of all rows; with du [K, N], the gradient by each row's loss, the gradients wanted as well.
Statistics info_nce_forward(const InfoNCEProblem& problem, const float* du, const Wanted& wanted, Gradients* gradients);

// The gradients wanted, from du and the log-sum-exps of an earlier forward.
Gradients info_nce_backward(const InfoNCEProblem& problem, const float* du, const Tensor& row_lse,
                            const Tensor& column_lse, const Wanted& wanted);

}  // namespace avppc
