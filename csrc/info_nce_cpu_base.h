// What the solvers of the bilinear InfoNCE on the CPU share: a thread's memory, q = c W^T, and the sums of gradients.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "info_nce_cpu_kernel.h"
#include "info_nce_cpu_solver.h"
#include "parallel_work.h"
#include "rounding.h"

namespace avppc {

class SolverBase {
 protected:
  struct Scratch {
    float *s, *q, *dq;           // its logits, [rows, Dz] twice
    uint16_t *q_half, *dq_half;  // what products take of q and dq, where that is bfloat16
  };

  // Blocks of up to `rows` rows.
  SolverBase(const InfoNCEProblem& problem, int64_t threads, int64_t rows)
      : p_(problem), threads_(threads), rows_(rows), row_blocks_(p_.row_blocks(rows_)), blocks_per_task_(ceil_div(p_.N, rows_)) {}

  // Memory for `blocks` blocks at once, each with s_size logits.
  void allocate(int64_t blocks, int64_t s_size) {
    s_size_ = round_up(s_size, 16);
    q_size_ = round_up(rows_ * p_.Dz, 16);
    scratch_ = empty_floats({blocks, s_size_ + (p_.element == Element::float32 ? 2 : 3) * q_size_});
  }

  Scratch scratch_of(int64_t block) const {
    float* s = scratch_.mutable_data_ptr<float>() + block * scratch_.size(1);
    float* q = s + s_size_;
    auto* halves = reinterpret_cast<uint16_t*>(q + 2 * q_size_);
    return {s, q, q + q_size_, halves, halves + q_size_};
  }

  // What belongs to the rows or columns from n on.
  static LogSumExp at(const LogSumExp& lse, int64_t n) { return {lse.maximum + n, lse.log_sum + n}; }

  static bool any(const float* x, int64_t count) {
    return std::any_of(x, x + count, [](float value) { return value != 0.0f; });
  }

  // q = c W^T, left in the scratch.
  void project(const RowBlock& block, const Scratch& scratch) const {
    if (p_.weights == nullptr) return;
    multiply(p_.element, p_.context_rows(block), p_.weight(block).transpose(), 1.0f, 0.0f, scratch.q, p_.Dz);
    to_element(block, scratch.q, scratch.q_half);
  }

  // A projected q as the products take it.
  Factor projected(const RowBlock& block, const Scratch& scratch) const {
    return p_.weights == nullptr ? p_.context_rows(block) : as_factor(block, scratch.q, scratch.q_half);
  }

  void to_element(const RowBlock& block, const float* x, uint16_t* half) const {
    if (p_.element == Element::bfloat16) AVPPC_CPU_SELECT(float_to_bfloat16)(x, half, block.rows * p_.Dz);
  }

  Factor as_factor(const RowBlock& block, const float* x, const uint16_t* half) const {
    const void* data = p_.element == Element::float32 ? static_cast<const void*>(x) : half;
    return {data, block.rows, p_.Dz, p_.Dz};
  }

  // Memory for the gradients wanted; contexts that no sub-task has get zeros.
  void start(const Wanted& wanted) {
    if (wanted.contexts) gradients_.contexts = empty_floats(p_.contexts_shape);
    if (wanted.targets) gradients_.targets = empty_floats(p_.targets_shape);
    if (wanted.weights) gradients_.weights = empty_floats(p_.weights_shape);
    if (wanted.scale) gradients_.scale = empty_floats({});
    wanted_ = wanted;
    scale_terms_.assign(row_blocks_.size(), 0.0);
    std::vector<bool> used(p_.C);
    for (const Pair& pair : p_.pairs) used[pair.context] = true;
    for (int64_t c = 0; wanted.contexts && c < p_.C; ++c) {
      if (!used[c]) std::fill_n(dcontexts(c), p_.N * p_.Dc, 0.0f);
    }
  }

  float* dcontexts(int64_t c) const { return gradients_.contexts->mutable_data_ptr<float>() + c * p_.N * p_.Dc; }
  float* dtargets(int64_t u) const { return gradients_.targets->mutable_data_ptr<float>() + u * p_.M * p_.Dz; }
  float* dweights(int64_t k) const { return gradients_.weights->mutable_data_ptr<float>() + k * p_.Dz * p_.Dc; }

  Gradients finish() const {
    if (wanted_.scale) {
      const double sum = std::accumulate(scale_terms_.begin(), scale_terms_.end(), 0.0);
      *gradients_.scale->mutable_data_ptr<float>() = static_cast<float>(sum);
    }
    return gradients_;
  }

  // The locks of a block of dc and of dW.
  int64_t context_lock(const RowBlock& block) const { return block.context * blocks_per_task_ + block.first / rows_; }
  int64_t task_lock(const RowBlock& block) const { return p_.C * blocks_per_task_ + block.task; }

  void add_to_contexts(const RowBlock& block, const Factor& dq, const Scratch& scratch, bool any, TicketLocks& locks) {
    if (!wanted_.contexts) return;
    const TicketLocks::Turn turn(locks, context_lock(block), block.context_turn);
    float* dc = dcontexts(block.context) + block.first * p_.Dc;
    if (p_.weights != nullptr) {
      add(dq, p_.weight(block), block.context_turn, any, dc);
    } else {
      if (block.context_turn == 0) std::fill_n(dc, block.rows * p_.Dc, 0.0f);
      if (any) AVPPC_CPU_SELECT(add_scaled)(dc, scratch.dq, p_.scale, block.rows * p_.Dc);
    }
  }

  void add_to_weights(const RowBlock& block, const Factor& dq, bool any, TicketLocks& locks) {
    if (!wanted_.weights) return;
    const TicketLocks::Turn turn(locks, task_lock(block), block.task_turn);
    add(dq.transpose(), p_.context_rows(block), block.task_turn, any, dweights(block.task));
  }

  // sum += scale a b, where any. The first turn overwrites what is there.
  void add(const Factor& a, const Factor& b, int64_t turn, bool any, float* sum) const {
    if (any) {
      multiply(p_.element, a, b, p_.scale, turn == 0 ? 0.0f : 1.0f, sum, b.columns);
    } else if (turn == 0) {
      std::fill_n(sum, a.rows * b.columns, 0.0f);
    }
  }

  // A block's dq, in the scratch, as the products take it; its term of dscale is kept.
  Factor finish_dq(int64_t index, const Factor& q, const Scratch& scratch) {
    if (wanted_.scale) scale_terms_[index] = q_dot_dq(q, scratch);
    const RowBlock& block = row_blocks_[index];
    if (p_.weights == nullptr) return {nullptr, block.rows, p_.Dz, p_.Dz};
    to_element(block, scratch.dq, scratch.dq_half);
    return as_factor(block, scratch.dq, scratch.dq_half);
  }

  // A block's term of dscale, for s = scale q z^T and dq = dS z.
  double q_dot_dq(const Factor& q, const Scratch& scratch) const {
    const int64_t count = q.rows * p_.Dz;
    const auto* floats = static_cast<const float*>(q.data);
    if (p_.element == Element::bfloat16) {
      AVPPC_CPU_SELECT(bfloat16_to_float)(static_cast<const uint16_t*>(q.data), scratch.q, count);
      floats = scratch.q;
    }
    return AVPPC_CPU_SELECT(dot)(floats, scratch.dq, count);
  }

  const InfoNCEProblem& p_;
  const int64_t threads_, rows_;
  const std::vector<RowBlock> row_blocks_;
  const int64_t blocks_per_task_;  // of each context's rows
  int64_t s_size_ = 0, q_size_ = 0;
  Tensor scratch_;
  Wanted wanted_{};
  Gradients gradients_;
  std::vector<double> scale_terms_;  // one a block, so that they are summed in one order
};

}  // namespace avppc
