// K bilinear InfoNCE losses over shared embeddings, as plain pointers, and the order of the work on their blocks.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "checks.h"
#include "products.h"

namespace avppc {

constexpr int64_t NO_POSITIVE = -1;

struct Pair {
  int64_t context, target;
};

// Rows first..first + rows - 1 of sub-task `task`; the turns number the blocks that add to the same gradient.
struct RowBlock {
  int64_t task, context, target, first, rows;
  int64_t context_turn, target_turn, task_turn;
};

// A float32 tensor on the CPU with whatever was in its memory; new_empty, by way of the dispatcher, takes 1 us more.
Tensor empty_floats(const std::vector<int64_t>& shape);

class InfoNCEProblem {
 public:
  InfoNCEProblem(const Tensor& contexts, const Tensor& targets, const std::optional<Tensor>& weights,
                 const std::optional<Tensor>& pairs, const Tensor& scale, int64_t positive_offset,
                 const std::optional<Tensor>& context_ids, const std::optional<Tensor>& target_ids, bool symmetric);

  int64_t C, N, Dc, U, M, Dz, K;  // contexts [C, N, Dc], targets [U, M, Dz], weights [K, Dz, Dc]
  std::vector<int64_t> contexts_shape, targets_shape, weights_shape;  // as they came: [N, Dc] is a single set
  Element element;                // of the three
  const void* contexts;
  const void* targets;
  const void* weights;  // null: plain dot products
  std::vector<Pair> pairs;
  float scale;
  int64_t positive_offset;  // NO_POSITIVE where these targets are a part that holds no row's positive
  bool symmetric;
  ScalarType dtype;  // of the tensors that came, and of their gradients

  // Blocks of up to `rows` rows of every sub-task; neighbours share contexts and targets as little as possible.
  std::vector<RowBlock> row_blocks(int64_t rows) const;

  // The rows of a block's context, a target, a sub-task's weights.
  Factor context_rows(const RowBlock& block) const;
  Factor target_rows(const RowBlock& block) const;
  Factor weight(const RowBlock& block) const;

  // The column of a block's first row's positive, or NO_POSITIVE.
  int64_t first_positive(const RowBlock& block) const;

  // Puts -inf where a block's logits s [rows, M] belong to no negative: equal ids, but for the positive.
  void leave_out(const RowBlock& block, float* s) const;

 private:
  const void* at(const void* data, int64_t offset) const;

  std::vector<Tensor> held_;                          // what the pointers point into: contiguous, in `element`
  std::vector<int64_t> columns_by_id_;                // target rows sorted by id
  std::vector<std::pair<int64_t, int64_t>> same_id_;  // the range of these whose id a context row shares
};

}  // namespace avppc
