// The bilinear InfoNCE loss on the CPU where clips have moments, and a row's candidates are not all moments of all clips:
// contexts [C, N Tc, Dc], targets [U, M Tz, Dz], the moments of a clip one after another.
//
// The positive of moment t of clip n is moment t + shift of clip n + positive_offset. It is told from the other moments
// of its own clip (the first Tz columns of a row's logits), from the same moment of all other clips (M columns), or from
// both. So cost and memory grow with N Tc Tz, N Tc M or both, where all pairs would take N Tc M Tz. For each block of
// whole clips of a sub-task there are products of all its rows for q = c W^T, dc and dW, and small ones, a clip's or a
// moment's, for the logits, dq and dz.
#include "info_nce_cpu_moments.h"

#include <limits>

#include "info_nce_cpu_base.h"

namespace avppc {
namespace {

constexpr int64_t BLOCK_ROWS = 256;               // a block's q, dq, c and z stay in the second-level cache
constexpr int64_t LOGITS_PER_THREAD = 1 << 19;    // fewer rows where each has many columns
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 21;  // multiplications of one q and s

std::vector<int64_t> read_integers(const char* name, const Tensor& tensor, int64_t count) {
  check_dtype(name, tensor, ScalarType::Long);
  AVPPC_CHECK(tensor.dim() == 1 && tensor.numel() == count, name, " must have shape [", count, "]");
  const Tensor values = torch::stable::contiguous(tensor);
  return {values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + count};
}

int64_t choose_threads(const InfoNCEProblem& p, const Moments& m) {
  const int64_t products = p.K * p.N * p.Dz * (m.widest() + (p.weights == nullptr ? 0 : p.Dc));
  return std::clamp<int64_t>(products / PRODUCTS_PER_THREAD, 1, torch::stable::get_num_threads());
}

// Rows of a block: whole clips, and enough blocks for the threads.
int64_t choose_rows(const InfoNCEProblem& p, const Moments& m, int64_t threads) {
  int64_t clips = std::max<int64_t>(1, std::min(BLOCK_ROWS, LOGITS_PER_THREAD / m.widest()) / m.rows);
  while (clips > 1 && ceil_div(m.clips, clips) * p.K < threads) clips /= 2;
  return std::min(clips, m.clips) * m.rows;
}

class MomentSolver : SolverBase {
 public:
  MomentSolver(const InfoNCEProblem& problem, const Moments& moments)
      : MomentSolver(problem, moments, choose_threads(problem, moments)) {}

  // Losses and statistics of all rows; with du [K, N Tc], the gradient by each row's loss, the other gradients as well.
  Gradients forward(const Statistics& result, const float* du, const Wanted& wanted) {
    const bool at_once = du != nullptr && wanted.any();
    if (at_once) start(wanted);
    run_in_order(row_blocks_.size(), threads_, lock_count(), [&](int64_t index, int64_t thread, TicketLocks& locks) {
      const OnThisThread products(true);
      const RowBlock& block = row_blocks_[index];
      const int64_t row = block.task * p_.N + block.first;
      const Scratch scratch = scratch_of(thread);
      const Factor q = compute_logits(block, scratch);
      const bool gradient = at_once && any(du + row, block.rows);
      for_logit_blocks(block, scratch, [&](int64_t n, const LogitBlock& part) {
        AVPPC_CPU_SELECT(info_nce_rows)
        (part, at(result.row_lse, row + n), result.loss + row + n, result.correct + row + n,
         gradient ? du + row + n : nullptr, p_.element);
      });
      if (at_once) add_gradients(index, q, scratch, gradient, locks);
    });
    return finish();
  }

  // The gradients from du and the log-sum-exps of an earlier forward.
  Gradients backward(const float* du, const LogSumExp& row_lse, const Wanted& wanted) {
    start(wanted);
    run_in_order(row_blocks_.size(), threads_, lock_count(), [&](int64_t index, int64_t thread, TicketLocks& locks) {
      const OnThisThread products(true);
      const RowBlock& block = row_blocks_[index];
      const int64_t row = block.task * p_.N + block.first;
      const Scratch scratch = scratch_of(thread);
      Factor q{nullptr, block.rows, p_.Dz, p_.Dz};
      const bool gradient = any(du + row, block.rows);
      if (gradient) {
        q = compute_logits(block, scratch);
        for_logit_blocks(block, scratch, [&](int64_t n, const LogitBlock& part) {
          AVPPC_CPU_SELECT(info_nce_gradient)
          (part, at(row_lse, row + n), du + row + n, {nullptr, nullptr}, nullptr,
           p_.element);
        });
      }
      add_gradients(index, q, scratch, gradient, locks);
    });
    return finish();
  }

 private:
  MomentSolver(const InfoNCEProblem& problem, const Moments& moments, int64_t threads)
      : SolverBase(problem, threads, choose_rows(problem, moments, threads)), m_(moments) {
    allocate(threads_, rows_ * m_.widest());
    number_targets();
  }

  // Targets that some sub-task tells apart across clips get terms in all rows from each block: one lock each. All other
  // targets get a block's terms in its own clips alone: one lock for each block of them.
  void number_targets() {
    across_.assign(p_.U, false);
    for (int64_t k = 0; k < p_.K; ++k) {
      if (m_.looks_across(k)) across_[p_.pairs[k].target] = true;
    }
    std::vector<int64_t> tickets(p_.U * blocks_per_task_);
    for (const RowBlock& block : row_blocks_) target_tickets_.push_back(tickets[target_lock(block) - target_locks()]++);
  }

  int64_t lock_count() const { return p_.C * blocks_per_task_ + p_.K + p_.U * blocks_per_task_; }
  int64_t target_locks() const { return p_.C * blocks_per_task_ + p_.K; }
  int64_t target_lock(const RowBlock& block) const {
    return target_locks() + block.target * blocks_per_task_ + (across_[block.target] ? 0 : block.first / rows_);
  }

  int64_t element_bytes() const { return p_.element == Element::float32 ? 4 : 2; }

  // `count` rows of a factor from row `first` on, every step-th.
  Factor part(const Factor& factor, int64_t first, int64_t count, int64_t step = 1) const {
    const auto* data = static_cast<const char*>(factor.data) + first * factor.stride * element_bytes();
    return {data, count, factor.columns, factor.stride * step};
  }

  // Columns [first, first + count) of dS, in rows from `row` on, every step-th.
  Factor gradient_part(const RowBlock& block, const Scratch& scratch, int64_t row, int64_t count, int64_t step,
                       int64_t first, int64_t columns) const {
    const int64_t stride = m_.width(block.task) * (4 / element_bytes());
    const auto* data = reinterpret_cast<const char*>(scratch.s) + (row * stride + first) * element_bytes();
    return {data, count, columns, stride * step};
  }

  int64_t first_clip(const RowBlock& block) const { return block.first / m_.rows; }
  int64_t clips_of(const RowBlock& block) const { return block.rows / m_.rows; }

  // body(clip of the block, first row of its targets) for each clip, where the sub-task looks inside clips.
  template <class Body>
  void for_clips(const RowBlock& block, const Body& body) const {
    for (int64_t i = 0; m_.looks_inside(block.task) && i < clips_of(block); ++i) {
      body(i, (first_clip(block) + i + m_.positive_offset) * m_.columns);
    }
  }

  // body(t, t + shift) for each moment of the contexts, where the sub-task looks across clips.
  template <class Body>
  void for_moments(const RowBlock& block, const Body& body) const {
    for (int64_t t = 0; m_.looks_across(block.task) && t < m_.rows; ++t) body(t, t + m_.shifts[block.task]);
  }

  // q = c W^T and s = scale q z^T; returns q as the products take it.
  Factor compute_logits(const RowBlock& block, const Scratch& scratch) const {
    project(block, scratch);
    const Factor q = projected(block, scratch), z = p_.target_rows(block);
    const int64_t width = m_.width(block.task), inside = m_.inside(block.task);
    for_clips(block, [&](int64_t i, int64_t target) {
      multiply(p_.element, part(q, i * m_.rows, m_.rows), part(z, target, m_.columns).transpose(), p_.scale, 0.0f,
               scratch.s + i * m_.rows * width, width);
    });
    for_moments(block, [&](int64_t t, int64_t target) {
      multiply(p_.element, part(q, t, clips_of(block), m_.rows),
               part(z, target, m_.target_clips, m_.columns).transpose(), p_.scale, 0.0f, scratch.s + t * width + inside,
               m_.rows * width);
    });
    if (m_.looks_across(block.task)) leave_out(block, scratch);
    return q;
  }

  // -inf where another clip's moment is no negative: equal ids, or the positive a second time.
  void leave_out(const RowBlock& block, const Scratch& scratch) const {
    const int64_t width = m_.width(block.task), inside = m_.inside(block.task);
    for (int64_t i = 0; i < clips_of(block); ++i) {
      const int64_t clip = first_clip(block) + i, own = clip + m_.positive_offset;
      for (int64_t other = 0; other < m_.target_clips; ++other) {
        if (other == own ? inside == 0 : m_.ids.empty() || m_.ids[clip] != m_.other_ids[other]) continue;
        for (int64_t t = 0; t < m_.rows; ++t) {
          scratch.s[(i * m_.rows + t) * width + inside + other] = -std::numeric_limits<float>::infinity();
        }
      }
    }
  }

  // body(first row, block) for blocks whose positive moves by a column a row: clips, or single rows across clips.
  template <class Body>
  void for_logit_blocks(const RowBlock& block, const Scratch& scratch, const Body& body) const {
    const int64_t width = m_.width(block.task), shift = m_.shifts[block.task];
    const bool inside = m_.looks_inside(block.task);
    const int64_t rows = inside ? m_.rows : 1;
    for (int64_t n = 0; n < block.rows; n += rows) {
      const int64_t positive = inside ? shift : first_clip(block) + n / m_.rows + m_.positive_offset;
      body(n, LogitBlock{scratch.s + n * width, rows, width, width, positive});
    }
  }

  void start(const Wanted& wanted) {
    SolverBase::start(wanted);
    if (wanted.targets) std::fill_n(dtargets(0), p_.U * p_.M * p_.Dz, 0.0f);  // few moments may be all that is added
  }

  // Adds a block's terms to the gradients, from the dS in scratch.s. Without any, the next block only gets its turn.
  void add_gradients(int64_t index, const Factor& q, const Scratch& scratch, bool any, TicketLocks& locks) {
    const RowBlock& block = row_blocks_[index];
    Factor dq{nullptr, block.rows, p_.Dz, p_.Dz};
    if (any && (wanted_.contexts || wanted_.weights || wanted_.scale)) {
      multiply_gradient(block, scratch);
      dq = finish_dq(index, q, scratch);
    }
    // Two blocks of one target on two threads need not wait: one adds to dz, dW, dc, the other to dc, dz, dW.
    const bool contexts_first = target_tickets_[index] % 2 == 1;
    if (contexts_first) add_to_contexts(block, dq, scratch, any, locks);
    if (wanted_.targets) {
      const TicketLocks::Turn turn(locks, target_lock(block), target_tickets_[index]);
      if (any) add_to_targets(block, q, scratch);
    }
    add_to_weights(block, dq, any, locks);
    if (!contexts_first) add_to_contexts(block, dq, scratch, any, locks);
  }

  // dq = dS z
  void multiply_gradient(const RowBlock& block, const Scratch& scratch) const {
    const Factor z = p_.target_rows(block);
    const int64_t inside = m_.inside(block.task);
    for_clips(block, [&](int64_t i, int64_t target) {
      const Factor ds = gradient_part(block, scratch, i * m_.rows, m_.rows, 1, 0, m_.columns);
      multiply(p_.element, ds, part(z, target, m_.columns), 1.0f, 0.0f, scratch.dq + i * m_.rows * p_.Dz, p_.Dz);
    });
    for_moments(block, [&](int64_t t, int64_t target) {
      const Factor ds = gradient_part(block, scratch, t, clips_of(block), m_.rows, inside, m_.target_clips);
      multiply(p_.element, ds, part(z, target, m_.target_clips, m_.columns), 1.0f, inside == 0 ? 0.0f : 1.0f,
               scratch.dq + t * p_.Dz, m_.rows * p_.Dz);
    });
  }

  // dz += scale dS^T q
  void add_to_targets(const RowBlock& block, const Factor& q, const Scratch& scratch) const {
    float* dz = dtargets(block.target);
    const int64_t inside = m_.inside(block.task);
    for_clips(block, [&](int64_t i, int64_t target) {
      const Factor ds = gradient_part(block, scratch, i * m_.rows, m_.rows, 1, 0, m_.columns);
      multiply(p_.element, ds.transpose(), part(q, i * m_.rows, m_.rows), p_.scale, 1.0f, dz + target * p_.Dz, p_.Dz);
    });
    for_moments(block, [&](int64_t t, int64_t target) {
      const Factor ds = gradient_part(block, scratch, t, clips_of(block), m_.rows, inside, m_.target_clips);
      multiply(p_.element, ds.transpose(), part(q, t, clips_of(block), m_.rows), p_.scale, 1.0f, dz + target * p_.Dz,
               m_.columns * p_.Dz);
    });
  }

  const Moments& m_;
  std::vector<bool> across_;             // [U]
  std::vector<int64_t> target_tickets_;  // one a block
};

}  // namespace

Moments::Moments(const InfoNCEProblem& flat, int64_t rows_of_clip, int64_t columns_of_clip, int64_t offset,
                 const Tensor& candidates_tensor, const Tensor& shifts_tensor,
                 const std::optional<Tensor>& context_ids, const std::optional<Tensor>& target_ids)
    : rows(rows_of_clip), columns(columns_of_clip), positive_offset(offset) {
  AVPPC_CHECK(rows > 0 && flat.N % rows == 0 && columns > 0 && flat.M % columns == 0,
              "contexts and targets must hold whole clips of ", rows, " and ", columns, " moments, got ", flat.N,
              " and ", flat.M, " rows");
  clips = flat.N / rows;
  target_clips = flat.M / columns;
  AVPPC_CHECK(0 <= offset && offset <= target_clips - clips, "positive_offset must be from 0 to M - N = ",
              target_clips - clips, ", got ", offset);
  candidates = read_integers("candidates", candidates_tensor, flat.K);
  shifts = read_integers("shifts", shifts_tensor, flat.K);
  for (const int64_t value : candidates) {
    AVPPC_CHECK(OWN_CLIP <= value && value <= (OWN_CLIP | SAME_MOMENT), "candidates must be 1, 2 or 3, got ", value);
  }
  for (const int64_t shift : shifts) {
    AVPPC_CHECK(0 <= shift && shift <= columns - rows, "shifts must be from 0 to Tz - Tc = ", columns - rows,
                ", got ", shift);
  }
  AVPPC_CHECK(context_ids.has_value() == target_ids.has_value(), "context_ids and target_ids must be given together");
  if (!context_ids.has_value()) return;
  ids = read_integers("context_ids", *context_ids, clips);
  other_ids = read_integers("target_ids", *target_ids, target_clips);
}

int64_t Moments::widest() const {
  int64_t result = 0;
  for (size_t k = 0; k < candidates.size(); ++k) result = std::max(result, width(static_cast<int64_t>(k)));
  return result;
}

Gradients info_nce_moments_forward(const InfoNCEProblem& problem, const Moments& moments, const Statistics& result,
                                   const float* du, const Wanted& wanted) {
  return MomentSolver(problem, moments).forward(result, du, wanted);
}

Gradients info_nce_moments_backward(const InfoNCEProblem& problem, const Moments& moments, const float* du,
                                    const LogSumExp& row_lse, const Wanted& wanted) {
  return MomentSolver(problem, moments).backward(du, row_lse, wanted);
}

}  // namespace avppc
