// Blocks of k and of columns, so that a packed block of b stays in the second-level cache while all of a passes by;
// inside, 64 columns of it stay in the first while tiles of 6 rows pass (gemm_bfloat16_kernel.h draws the panels).
#include "gemm_bfloat16.h"

#include <algorithm>
#include <memory>
#include <new>

#include "gemm_bfloat16_kernel.h"
#include "rounding.h"

namespace avppc {

#if defined(__x86_64__)

namespace {

using namespace cpu_avx512_bf16;

constexpr int64_t MAX_DEPTH = 512;            // of a block along k; even
constexpr int64_t MAX_RIGHT_WORDS = 1 << 17;  // of a packed block of b: 512 KiB
constexpr int64_t MAX_LEFT_ROWS = 3 * LEFT_WIDTH;
constexpr int64_t MAX_LEFT_WORDS = MAX_LEFT_ROWS * MAX_DEPTH / 2;

struct Deleter {
  void operator()(uint32_t* words) const { ::operator delete[](words, std::align_val_t{64}); }
};

// This thread's packed blocks: of the left factor, then of the right.
uint32_t* buffers() {
  thread_local const std::unique_ptr<uint32_t, Deleter> words(
      new (std::align_val_t{64}) uint32_t[MAX_LEFT_WORDS + MAX_RIGHT_WORDS]);
  return words.get();
}

// The elements from (row, column) on.
const uint16_t* at(const Factor& x, int64_t row, int64_t column) {
  const auto* data = static_cast<const uint16_t*>(x.data);
  return x.transposed ? data + column * x.stride + row : data + row * x.stride + column;
}

// Rows [first, first + rows) of a, columns [k, k + depth) of them: as they lie, or packed where that is not possible.
LeftFactor left_factor(const Factor& a, int64_t first, int64_t rows, int64_t k, int64_t depth, uint32_t* buffer) {
  const uint16_t* data = at(a, first, k);
  if (!a.transposed && depth % 2 == 0) {
    const int64_t row_bytes = 2 * a.stride;
    return {reinterpret_cast<const char*>(data), LEFT_WIDTH * row_bytes, row_bytes, 4};
  }
  pack(data, depth, rows, a.stride, !a.transposed, LEFT_WIDTH, buffer);
  return {reinterpret_cast<const char*>(buffer), ceil_div(depth, 2) * LEFT_WIDTH * 4, 4, LEFT_WIDTH * 4};
}

}  // namespace

bool has_gemm_bfloat16() {
  static const bool there = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl");
  return there;
}

void gemm_bfloat16(const Factor& a, const Factor& b, float alpha, float beta, float* c, int64_t stride) {
  uint32_t* const left_words = buffers();
  uint32_t* const right_words = left_words + MAX_LEFT_WORDS;
  const int64_t depths = ceil_div(a.columns, MAX_DEPTH);
  const int64_t max_depth = 2 * ceil_div(a.columns, 2 * depths);
  const int64_t max_columns = MAX_RIGHT_WORDS / (max_depth / 2) / RIGHT_WIDTH * RIGHT_WIDTH;
  for (int64_t k = 0; k < a.columns; k += max_depth) {
    const int64_t depth = std::min(max_depth, a.columns - k);
    const float kept = k == 0 ? beta : 1.0f;
    for (int64_t j = 0; j < b.columns; j += max_columns) {
      const int64_t columns = std::min(max_columns, b.columns - j);
      pack(at(b, k, j), depth, columns, b.stride, b.transposed, RIGHT_WIDTH, right_words);
      for (int64_t i = 0; i < a.rows; i += MAX_LEFT_ROWS) {
        const int64_t rows = std::min(MAX_LEFT_ROWS, a.rows - i);
        const LeftFactor left = left_factor(a, i, rows, k, depth, left_words);
        multiply_panels(left, right_words, rows, columns, ceil_div(depth, 2), alpha, kept, c + i * stride + j,
                        stride);
      }
    }
  }
}

#else

bool has_gemm_bfloat16() { return false; }
void gemm_bfloat16(const Factor&, const Factor&, float, float, float*, int64_t) {}

#endif

}  // namespace avppc
