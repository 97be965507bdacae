// The bilinear InfoNCE loss and its gradients on the CPU, with one block of logits for each thread.
//
// For each block of rows of a sub-task: q = c W^T, s = scale q z^T, one pass that turns s into losses and, in place,
// into the gradient dS; then dq = dS z and the sums dz += scale dS^T q, dc += scale dq W, dW += scale dq^T c. Where the
// weight of each row's loss is known beforehand, one round over the blocks does it all; otherwise the backward computes
// s again. The symmetric loss needs the log-sum-exp of whole columns before dS: a second round, which finds the logits
// of the first where they are few.
#include "info_nce_cpu_solver.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "info_nce_cpu_base.h"

namespace avppc {
namespace {

constexpr int64_t LOGITS_PER_THREAD = 1 << 20;
constexpr int64_t KEPT_LOGITS = 1 << 22;          // of all sub-tasks, from a symmetric loss's first round to its second
constexpr int64_t WHOLE_LOGITS = 1 << 16;         // of a sub-task that is one block
constexpr int64_t SHARED_LOGITS = 1 << 13;        // of one block, for each thread that takes part in a pass over them
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 21;  // multiplications of one q and s
constexpr int64_t TARGET_SLICE = 128;             // rows of dz that one block adds to while the next one waits for them

// Threads that have a twentieth of a millisecond's work each, or more.
int64_t choose_threads(const InfoNCEProblem& p) {
  const int64_t products = p.K * p.N * p.Dz * (p.M + (p.weights == nullptr ? 0 : p.Dc));
  return std::clamp<int64_t>(products / PRODUCTS_PER_THREAD, 1, torch::stable::get_num_threads());
}

// Rows of a block. Wide targets get fewer: 4 MiB of logits a thread are about as fast as more (Xeon with 2 MiB of
// second-level cache, D = 256: 96% of torch.mm's speed at M = 2048; 1 MiB 86%, 8 MiB 98%). Few sub-tasks get fewer,
// too, so that each thread has something to do.
int64_t choose_rows(const InfoNCEProblem& p, int64_t threads) {
  int64_t rows = std::min(std::max<int64_t>(LOGITS_PER_THREAD / p.M, 128), round_up(p.N, 16));
  const auto blocks = [&] { return ceil_div(p.N, rows) * p.K; };
  while (rows > 64 && blocks() < threads) rows /= 2;
  return std::min(round_up(rows, 16), p.N);
}

// Whether a small single sub-task is one block, whose products the threads share. With a block each they would wait for
// each other: without weights a third of the products are sums of dz, which are added one after another.
bool is_whole(const InfoNCEProblem& p) {
  return p.K == 1 && p.weights == nullptr && p.N * p.M <= WHOLE_LOGITS && products_share_threads(p.element);
}

class Solver : SolverBase {
 public:
  Solver(const InfoNCEProblem& problem, bool gradients) : Solver(problem, gradients, choose_threads(problem)) {}

  // Losses and statistics of all rows; with du [K, N], the gradient by each row's loss, the other gradients as well.
  Gradients forward(const Statistics& result, const float* du, const Wanted& wanted) {
    const int64_t columns = p_.symmetric ? p_.M : 0;
    const bool any_wanted = du != nullptr && wanted.any();
    const bool at_once = any_wanted && !p_.symmetric;
    if (at_once) start(wanted);
    const auto& [losses, correct, row_lse, column_lse] = result;
    std::fill_n(column_lse.maximum, p_.K * columns, std::numeric_limits<float>::lowest());
    std::fill_n(column_lse.log_sum, p_.K * columns, 0.0f);  // the sum, until it is whole
    run_in_order(row_blocks_.size(), threads_, lock_count(), [&](int64_t index, int64_t thread, TicketLocks& locks) {
      const OnThisThread products(!is_single());
      const RowBlock& block = row_blocks_[index];
      const int64_t row = block.task * p_.N + block.first, column = block.task * p_.M;
      const Scratch scratch = scratch_of(keeps_logits_ ? index : thread);
      project(block, scratch);
      const Factor q = projected(block, scratch);
      compute_logits(block, q, scratch);
      const LogitBlock s = logits(block, scratch);
      const bool gradient = at_once && any(du + row, block.rows);
      if (p_.symmetric) {
        const TicketLocks::Turn turn(locks, task_lock(block), block.task_turn);
        merge_columns(s, at(column_lse, column));
      }
      for_rows(s, [&](int64_t n, const LogitBlock& part) {
        AVPPC_CPU_SELECT(info_nce_rows)
        (part, at(result.row_lse, row + n), result.loss + row + n, result.correct + row + n, gradient ? du + row + n : nullptr, p_.element);
      });
      if (at_once) add_gradients(index, q, scratch, gradient, locks);
    });
    if (p_.symmetric) finish_columns(result);
    if (any_wanted && p_.symmetric) return backward(du, result.row_lse, result.column_lse, wanted, keeps_logits_);
    return finish();
  }

  // Gradients from du and the log-sum-exps of an earlier forward; the logits are there where it has left them.
  Gradients backward(const float* du, const LogSumExp& row_lse, const LogSumExp& column_lse, const Wanted& wanted,
                     bool has_logits = false) {
    start(wanted);
    std::vector<float> half(p_.symmetric ? p_.K * p_.N : 0);  // the loss is the mean of a row's and a column's
    std::transform(du, du + half.size(), half.begin(), [](float x) { return x / 2; });
    const float* weight = p_.symmetric ? half.data() : du;
    run_in_order(row_blocks_.size(), threads_, lock_count(), [&](int64_t index, int64_t thread, TicketLocks& locks) {
      const OnThisThread products(!is_single());
      const RowBlock& block = row_blocks_[index];
      const int64_t row = block.task * p_.N + block.first, column = block.task * p_.M;
      const Scratch scratch = scratch_of(keeps_logits_ ? index : thread);
      const bool gradient = p_.symmetric ? any(du + column, p_.M) : any(du + row, block.rows);
      Factor q{nullptr, block.rows, p_.Dz, p_.Dz};
      if (gradient) {
        if (!has_logits) project(block, scratch);
        q = projected(block, scratch);
        if (!has_logits) compute_logits(block, q, scratch);
        for_rows(logits(block, scratch), [&](int64_t n, const LogitBlock& part) {
          AVPPC_CPU_SELECT(info_nce_gradient)
          (part, at(row_lse, row + n), weight + row + n, at(column_lse, column),
           p_.symmetric ? weight + column : nullptr, p_.element);
        });
      }
      add_gradients(index, q, scratch, gradient, locks);
    });
    return finish();
  }

 private:
  // With a single block the threads share each product instead.
  bool is_single() const { return row_blocks_.size() == 1; }

  // The locks of the sums that blocks add to: a block of dc; dW, or the statistics of the columns; a slice of dz.
  int64_t lock_count() const { return p_.C * blocks_per_task_ + p_.K + p_.U * slices_; }
  int64_t target_lock(const RowBlock& block, int64_t slice) const {
    return p_.C * blocks_per_task_ + p_.K + block.target * slices_ + slice;
  }

  void compute_logits(const RowBlock& block, const Factor& q, const Scratch& scratch) const {
    multiply(p_.element, q, p_.target_rows(block).transpose(), p_.scale, 0.0f, scratch.s, p_.M);
    p_.leave_out(block, scratch.s);
  }

  LogitBlock logits(const RowBlock& block, const Scratch& scratch) const {
    return {scratch.s, block.rows, p_.M, p_.M, p_.first_positive(block)};
  }

  // body(first, part) for parts of the rows of s, on all threads where this is the only block.
  template <class Body>
  void for_rows(const LogitBlock& s, const Body& body) const {
    share(s.rows, s.columns, [&](int64_t begin, int64_t end) {
      const int64_t positive = s.positive < 0 ? s.positive : s.positive + begin;
      body(begin, LogitBlock{s.s + begin * s.stride, end - begin, s.columns, s.stride, positive});
    });
  }

  void merge_columns(const LogitBlock& s, const LogSumExp& lse) const {
    share(s.columns, s.rows, [&](int64_t begin, int64_t end) {
      const LogitBlock part{s.s + begin, s.rows, end - begin, s.stride, NO_POSITIVE};
      AVPPC_CPU_SELECT(info_nce_columns)(part, lse.maximum + begin, lse.log_sum + begin);
    });
  }

  // body(begin, end) for parts of 0..count - 1, each of `logits` logits; where there are other blocks, for all at once.
  template <class Body>
  void share(int64_t count, int64_t logits, const Body& body) const {
    if (!is_single()) return body(0, count);
    torch::stable::parallel_for(0, count, ceil_div(SHARED_LOGITS, logits), body);
  }

  void finish_columns(const Statistics& result) const {
    const auto& [loss, correct, row_lse, column_lse] = result;
    for (int64_t n = 0; n < p_.K * p_.N; ++n) {
      column_lse.log_sum[n] = std::log(column_lse.log_sum[n]);
      const float maxima = column_lse.maximum[n] - row_lse.maximum[n];
      loss[n] += (maxima + column_lse.log_sum[n] - row_lse.log_sum[n]) / 2;  // (row_lse + column_lse) / 2 - positive
    }
  }

  void start(const Wanted& wanted) {
    SolverBase::start(wanted);
    // the first block overwrites what it adds to; what no block adds to is zero
    std::vector<bool> used(p_.U);
    for (const Pair& pair : p_.pairs) used[pair.target] = true;
    for (int64_t u = 0; wanted.targets && u < p_.U; ++u) {
      if (!used[u]) std::fill_n(dtargets(u), p_.M * p_.Dz, 0.0f);
    }
  }

  // Adds a block's terms to the gradients, from the dS in scratch.s. Without any, the next block only gets its turn.
  void add_gradients(int64_t index, const Factor& q, const Scratch& scratch, bool any, TicketLocks& locks) {
    const RowBlock& block = row_blocks_[index];
    const Factor ds{scratch.s, block.rows, p_.M, p_.element == Element::float32 ? p_.M : 2 * p_.M};
    Factor dq{nullptr, block.rows, p_.Dz, p_.Dz};
    if (any && (wanted_.contexts || wanted_.weights || wanted_.scale)) {
      multiply(p_.element, ds, p_.target_rows(block), 1.0f, 0.0f, scratch.dq, p_.Dz);
      dq = finish_dq(index, q, scratch);
    }
    // Two blocks of one target on two threads need not wait: one adds to dz, dW, dc, the other to dc, dz, dW.
    const bool contexts_first = block.target_turn % 2 == 1;
    if (contexts_first) add_to_contexts(block, dq, scratch, any, locks);
    if (wanted_.targets) add_to_targets(block, ds.transpose(), q, any, locks);
    add_to_weights(block, dq, any, locks);
    if (!contexts_first) add_to_contexts(block, dq, scratch, any, locks);
  }

  void add_to_targets(const RowBlock& block, const Factor& ds_transposed, const Factor& q, bool any,
                      TicketLocks& locks) {
    for (int64_t slice = 0; slice < slices_; ++slice) {
      const TicketLocks::Turn turn(locks, target_lock(block, slice), block.target_turn);
      const int64_t first = slice * TARGET_SLICE;
      Factor part = ds_transposed;
      part.rows = std::min(TARGET_SLICE, p_.M - first);
      part.data = static_cast<const char*>(part.data) + first * (p_.element == Element::float32 ? 4 : 2);
      add(part, q, block.target_turn, any, dtargets(block.target) + first * p_.Dz);
    }
  }

  Solver(const InfoNCEProblem& problem, bool gradients, int64_t threads)
      : SolverBase(problem, threads,
                   gradients && is_whole(problem) ? problem.N : choose_rows(problem, threads)),
        slices_(ceil_div(p_.M, TARGET_SLICE)),
        keeps_logits_(gradients && p_.symmetric && p_.K * p_.N * p_.M <= KEPT_LOGITS) {
    allocate(keeps_logits_ ? static_cast<int64_t>(row_blocks_.size()) : threads_, rows_ * p_.M);
  }

  const int64_t slices_;  // of each target's rows
  const bool keeps_logits_;
};

}  // namespace

Gradients info_nce_forward(const InfoNCEProblem& problem, const Statistics& result, const float* du,
                           const Wanted& wanted) {
  return Solver(problem, du != nullptr && wanted.any()).forward(result, du, wanted);
}

Gradients info_nce_backward(const InfoNCEProblem& problem, const float* du, const LogSumExp& row_lse,
                            const LogSumExp& column_lse, const Wanted& wanted) {
  return Solver(problem, true).backward(du, row_lse, column_lse, wanted);
}

}  // namespace avppc
