// Panels of 64 columns of b stay in the second-level cache while the rows of a pass by, six at once. Both factors are
// read as they lie where they are row-major; what is not is transposed first, b a panel at a time.
//
// Square factors on one thread of a Zen 4, GFLOP/s, in brackets MKL's: 128 108 to 110 (97 to 101), 256 110 to 113 (103),
// 512 109 to 111 (98 to 101).
#include "gemm_float32.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <new>

#include "cpu_dispatch.h"
#include "gemm_float32_kernel.h"
#include "rounding.h"

namespace avppc {

#if defined(__x86_64__)

namespace {

using namespace cpu_avx512_float32;

constexpr int64_t MAX_DEPTH = 512;            // of a block along k
constexpr int64_t MAX_LEFT_ROWS = 192;        // that are transposed at once
constexpr int64_t MAX_DIRECT_STRIDE = 1024;   // of rows of b that are read as they lie: a page of memory
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 19;

struct Deleter {
  void operator()(float* floats) const { ::operator delete[](floats, std::align_val_t{64}); }
};

// This thread's copies: a panel of the right factor, rows of the left.
float* buffers() {
  thread_local const std::unique_ptr<float, Deleter> floats(
      new (std::align_val_t{64}) float[MAX_DEPTH * (PANEL + MAX_LEFT_ROWS)]);
  return floats.get();
}

// The elements from (row, column) on.
const float* at(const Factor& x, int64_t row, int64_t column) {
  const auto* data = static_cast<const float*>(x.data);
  return x.transposed ? data + column * x.stride + row : data + row * x.stride + column;
}

// Row-major elements and their stride.
struct Rows {
  const float* data;
  int64_t stride;
};

Rows left_rows(const Factor& a, int64_t i, int64_t rows, int64_t k, int64_t depth, float* buffer) {
  if (!a.transposed) return {at(a, i, k), a.stride};
  const int64_t stride = round_up(depth, 16);
  transpose(at(a, i, k), depth, rows, a.stride, buffer, stride);
  return {buffer, stride};
}

Rows right_panel(const Factor& b, int64_t k, int64_t depth, int64_t j, int64_t columns, float* buffer) {
  if (b.transposed) {
    transpose(at(b, k, j), columns, depth, b.stride, buffer, PANEL);
  } else if (columns % 16 == 0 && b.stride <= MAX_DIRECT_STRIDE) {
    return {at(b, k, j), b.stride};
  } else {
    pack(at(b, k, j), depth, columns, b.stride, buffer);
  }
  return {buffer, PANEL};
}

// Columns [first, end) of c.
void multiply_columns(const Factor& a, const Factor& b, int64_t first, int64_t end, float alpha, float beta, float* c,
                      int64_t stride) {
  float* const panel = buffers();
  float* const rows_buffer = panel + MAX_DEPTH * PANEL;
  const int64_t max_rows = a.transposed ? MAX_LEFT_ROWS : a.rows;
  for (int64_t k = 0; k < a.columns; k += MAX_DEPTH) {
    const int64_t depth = std::min(MAX_DEPTH, a.columns - k);
    for (int64_t i = 0; i < a.rows; i += max_rows) {
      const int64_t rows = std::min(max_rows, a.rows - i);
      const Rows left = left_rows(a, i, rows, k, depth, rows_buffer);
      for (int64_t j = first; j < end; j += PANEL) {
        const int64_t columns = std::min(PANEL, end - j);
        const Rows right = right_panel(b, k, depth, j, columns, panel);
        multiply_panel(left.data, left.stride, right.data, right.stride, rows, columns, depth, alpha,
                       k == 0 ? beta : 1.0f, c + i * stride + j, stride);
      }
    }
  }
}

}  // namespace

bool has_gemm_float32() {
  static const bool amd = __builtin_cpu_is("amd");
  return amd && cpu_level() == CpuLevel::avx512;
}

void gemm_float32(const Factor& a, const Factor& b, float alpha, float beta, float* c, int64_t stride,
                  int64_t threads) {
  const int64_t products = a.rows * a.columns * b.columns;
  const int64_t parts = std::clamp<int64_t>(products / PRODUCTS_PER_THREAD, 1, threads);
  const int64_t columns = round_up(ceil_div(b.columns, parts), PANEL);
  if (columns >= b.columns) return multiply_columns(a, b, 0, b.columns, alpha, beta, c, stride);
  torch::stable::parallel_for(0, ceil_div(b.columns, columns), 1, [&](int64_t begin, int64_t end) {
    multiply_columns(a, b, begin * columns, std::min(end * columns, b.columns), alpha, beta, c, stride);
  });
}

#else

bool has_gemm_float32() { return false; }
void gemm_float32(const Factor&, const Factor&, float, float, float*, int64_t, int64_t) {}

#endif

}  // namespace avppc
