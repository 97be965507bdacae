// The losses of clips with moments on the CPU, and their gradients; see info_nce_cpu_moments.cpp.
#pragma once

#include "info_nce_cpu_solver.h"

namespace avppc {

// Which targets a sub-task's contexts look among, beside their positive; one or both.
enum Candidates : int64_t { OWN_CLIP = 1, SAME_MOMENT = 2 };

// What sets moments apart from an InfoNCEProblem of N Tc rows and M Tz columns.
struct Moments {
  Moments(const InfoNCEProblem& flat, int64_t rows_of_clip, int64_t columns_of_clip, int64_t offset,
          const Tensor& candidates_tensor, const Tensor& shifts_tensor, const std::optional<Tensor>& context_ids,
          const std::optional<Tensor>& target_ids);

  int64_t rows, columns;                // Tc and Tz of each clip
  int64_t clips, target_clips;          // N and M
  int64_t positive_offset;              // in clips
  std::vector<int64_t> candidates;      // [K]
  std::vector<int64_t> shifts;          // [K]: moments from a context to its positive
  std::vector<int64_t> ids, other_ids;  // of the clips of contexts [N] and of targets [M], or empty

  bool looks_inside(int64_t task) const { return (candidates[task] & OWN_CLIP) != 0; }
  bool looks_across(int64_t task) const { return (candidates[task] & SAME_MOMENT) != 0; }
  // Columns of a row's logits: its own clip's moments, then the same moment of all clips.
  int64_t inside(int64_t task) const { return looks_inside(task) ? columns : 0; }
  int64_t width(int64_t task) const { return inside(task) + (looks_across(task) ? target_clips : 0); }
  int64_t widest() const;
};

// As info_nce_forward and info_nce_backward; `problem` has no positive_offset, ids or symmetric loss of its own.
Gradients info_nce_moments_forward(const InfoNCEProblem& problem, const Moments& moments, const Statistics& result,
                                   const float* du, const Wanted& wanted);
Gradients info_nce_moments_backward(const InfoNCEProblem& problem, const Moments& moments, const float* du,
                                    const LogSumExp& row_lse, const Wanted& wanted);

}  // namespace avppc
