#include "info_nce_problem.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "rounding.h"

namespace avppc {
namespace {

Tensor as_contiguous(const Tensor& tensor, ScalarType dtype) {
  const Tensor converted = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);  // asked, it takes 1 us
}

// The shape of a tensor of matrices, or of a single one.
std::vector<int64_t> read_shape(const char* name, const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  AVPPC_CHECK(dim == 2 || dim == 3, name, " must have 2 or 3 dimensions, got ", dim);
  std::vector<int64_t> shape(dim);
  for (int64_t d = 0; d < dim; ++d) shape[d] = tensor.size(d);
  return shape;
}

int64_t matrices(const std::vector<int64_t>& shape) { return shape.size() == 3 ? shape[0] : 1; }

// Sub-task k uses context k and target k.
std::vector<Pair> own_pairs(int64_t contexts, int64_t targets) {
  AVPPC_CHECK(contexts == targets, "pairs may be left out only where each context has its target, got ", contexts,
              " contexts and ", targets, " targets");
  std::vector<Pair> pairs(contexts);
  for (int64_t k = 0; k < contexts; ++k) pairs[k] = {k, k};
  return pairs;
}

std::vector<Pair> read_pairs(const Tensor& tensor, int64_t contexts, int64_t targets) {
  check_dim("pairs", tensor, 2);
  check_dtype("pairs", tensor, ScalarType::Long);
  AVPPC_CHECK(tensor.size(0) > 0 && tensor.size(1) == 2, "pairs must have shape [K, 2], got [", tensor.size(0), ", ",
              tensor.size(1), "]");
  const Tensor contiguous = as_contiguous(tensor, ScalarType::Long);
  const int64_t* data = contiguous.const_data_ptr<int64_t>();
  std::vector<Pair> pairs;
  for (int64_t k = 0; k < tensor.size(0); ++k) {
    pairs.push_back({data[2 * k], data[2 * k + 1]});
    AVPPC_CHECK(0 <= pairs[k].context && pairs[k].context < contexts, "pairs must hold context indices from 0 to ",
                contexts - 1, ", got ", pairs[k].context);
    AVPPC_CHECK(0 <= pairs[k].target && pairs[k].target < targets, "pairs must hold target indices from 0 to ",
                targets - 1, ", got ", pairs[k].target);
  }
  return pairs;
}

// The sub-tasks, each as far as possible behind the last one that has its context or its target. Only the first so many
// that remain are looked at: among all, the time would grow with the square of their number.
std::vector<int64_t> spread(const std::vector<Pair>& pairs, int64_t contexts, int64_t targets) {
  constexpr size_t LOOKED_AT = 64;
  std::vector<int64_t> remaining(std::min(pairs.size(), LOOKED_AT)), order;
  std::vector<int64_t> context_used(contexts, -1), target_used(targets, -1);
  std::iota(remaining.begin(), remaining.end(), 0);
  for (size_t next = remaining.size(); !remaining.empty();) {
    const auto last_use = [&](int64_t k) {
      return std::max(context_used[pairs[k].context], target_used[pairs[k].target]);
    };
    const auto best = std::min_element(remaining.begin(), remaining.end(),
                                       [&](int64_t a, int64_t b) { return last_use(a) < last_use(b); });
    context_used[pairs[*best].context] = target_used[pairs[*best].target] = order.size();
    order.push_back(*best);
    remaining.erase(best);
    if (next < pairs.size()) remaining.push_back(next++);
  }
  return order;
}

}  // namespace

Tensor empty_floats(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                                                  aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  return Tensor(handle);
}

InfoNCEProblem::InfoNCEProblem(const Tensor& contexts_tensor, const Tensor& targets_tensor,
                               const std::optional<Tensor>& weights_tensor,
                               const std::optional<Tensor>& pairs_tensor, const Tensor& scale_tensor, int64_t offset, const std::optional<Tensor>& context_ids,
                               const std::optional<Tensor>& target_ids, bool both_ways)
    : contexts_shape(read_shape("contexts", contexts_tensor)),
      targets_shape(read_shape("targets", targets_tensor)),
      positive_offset(offset),
      symmetric(both_ways),
      dtype(contexts_tensor.scalar_type()) {
  C = matrices(contexts_shape), N = contexts_tensor.size(-2), Dc = contexts_tensor.size(-1);
  U = matrices(targets_shape), M = targets_tensor.size(-2), Dz = targets_tensor.size(-1);
  AVPPC_CHECK(contexts_tensor.numel() > 0 && targets_tensor.numel() > 0, "contexts and targets must not be empty");
  AVPPC_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
              "contexts must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  check_dtype("targets", targets_tensor, dtype);
  constexpr int64_t LARGEST_SIDE = (int64_t{1} << 30) - 1;  // of a matrix that MKL multiplies, doubled as a stride
  AVPPC_CHECK(std::max({N, M, Dc, Dz}) <= LARGEST_SIDE, "contexts and targets must have sides of at most ",
              LARGEST_SIDE, ", got ", std::max({N, M, Dc, Dz}));
  AVPPC_CHECK(offset == NO_POSITIVE || (0 <= offset && offset <= M - N), "positive_offset must be from 0 to M - N = ",
              M - N, ", got ", offset);
  AVPPC_CHECK(!symmetric || (M == N && offset == 0), "symmetric needs M == N, got ", M, " and ", N);
  pairs = pairs_tensor.has_value() ? read_pairs(*pairs_tensor, C, U) : own_pairs(C, U);
  K = pairs.size();
  check_dim("scale", scale_tensor, 0);
  check_dtype("scale", scale_tensor, ScalarType::Float);
  scale = *scale_tensor.const_data_ptr<float>();

  const bool halves = dtype == ScalarType::BFloat16 && has_bfloat16_products();
  element = halves ? Element::bfloat16 : Element::float32;
  const ScalarType factor_dtype = halves ? ScalarType::BFloat16 : ScalarType::Float;
  const auto hold = [&](const Tensor& tensor) {
    held_.push_back(as_contiguous(tensor, factor_dtype));
    return held_.back().data_ptr();
  };
  contexts = hold(contexts_tensor);
  targets = hold(targets_tensor);
  weights = nullptr;
  if (weights_tensor.has_value()) {
    weights_shape = read_shape("weights", *weights_tensor);
    check_dtype("weights", *weights_tensor, dtype);
    AVPPC_CHECK(matrices(weights_shape) == K && weights_tensor->size(-2) == Dz && weights_tensor->size(-1) == Dc,
                "weights must have shape [", K, ", ", Dz, ", ", Dc, "]");
    weights = hold(*weights_tensor);
  } else {
    AVPPC_CHECK(Dc == Dz, "without weights contexts and targets must be equally wide, got ", Dc, " and ", Dz);
  }

  AVPPC_CHECK(context_ids.has_value() == target_ids.has_value(), "context_ids and target_ids must be given together");
  if (!context_ids.has_value()) return;
  check_dtype("context_ids", *context_ids, ScalarType::Long);
  check_dtype("target_ids", *target_ids, ScalarType::Long);
  AVPPC_CHECK(context_ids->dim() == 1 && context_ids->numel() == N, "context_ids must have shape [", N, "]");
  AVPPC_CHECK(target_ids->dim() == 1 && target_ids->numel() == M, "target_ids must have shape [", M, "]");
  const Tensor rows = as_contiguous(*context_ids, ScalarType::Long);
  const Tensor columns = as_contiguous(*target_ids, ScalarType::Long);
  const int64_t* id = columns.const_data_ptr<int64_t>();
  columns_by_id_.resize(M);
  std::iota(columns_by_id_.begin(), columns_by_id_.end(), 0);
  std::sort(columns_by_id_.begin(), columns_by_id_.end(),
            [&](int64_t a, int64_t b) { return std::pair(id[a], a) < std::pair(id[b], b); });
  const auto begin = columns_by_id_.begin(), end = columns_by_id_.end();
  for (int64_t i = 0; i < N; ++i) {
    const int64_t own = rows.const_data_ptr<int64_t>()[i];
    const auto first = std::partition_point(begin, end, [&](int64_t j) { return id[j] < own; });
    const auto last = std::partition_point(first, end, [&](int64_t j) { return id[j] == own; });
    same_id_.emplace_back(first - begin, last - begin);
  }
}

std::vector<RowBlock> InfoNCEProblem::row_blocks(int64_t rows) const {
  const int64_t blocks = ceil_div(N, rows);
  std::vector<int64_t> context_turns(C * blocks), target_turns(U), task_turns(K);
  const std::vector<int64_t> order = spread(pairs, C, U);
  std::vector<RowBlock> result;
  for (int64_t block = 0; block < blocks; ++block) {
    for (const int64_t k : order) {
      const auto [context, target] = pairs[k];
      result.push_back({k, context, target, block * rows, std::min(rows, N - block * rows),
                       context_turns[context * blocks + block]++, target_turns[target]++, task_turns[k]++});
    }
  }
  return result;
}

const void* InfoNCEProblem::at(const void* data, int64_t offset) const {
  return static_cast<const char*>(data) + offset * (element == Element::float32 ? 4 : 2);
}

Factor InfoNCEProblem::context_rows(const RowBlock& block) const {
  return {at(contexts, (block.context * N + block.first) * Dc), block.rows, Dc, Dc};
}

Factor InfoNCEProblem::target_rows(const RowBlock& block) const {
  return {at(targets, block.target * M * Dz), M, Dz, Dz};
}

Factor InfoNCEProblem::weight(const RowBlock& block) const { return {at(weights, block.task * Dz * Dc), Dz, Dc, Dc}; }

int64_t InfoNCEProblem::first_positive(const RowBlock& block) const {
  return positive_offset == NO_POSITIVE ? NO_POSITIVE : block.first + positive_offset;
}

void InfoNCEProblem::leave_out(const RowBlock& block, float* s) const {
  if (same_id_.empty()) return;
  for (int64_t r = 0; r < block.rows; ++r) {
    const auto [first, last] = same_id_[block.first + r];
    for (int64_t n = first; n < last; ++n) {
      const int64_t column = columns_by_id_[n];
      const bool is_positive = positive_offset != NO_POSITIVE && column == block.first + r + positive_offset;
      if (!is_positive) s[r * M + column] = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace avppc
