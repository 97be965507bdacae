// The passes over a block of logits s [rows, columns] of one sub-task; see info_nce_cpu_kernel.cpp. Row-major, `stride`
// floats from row to row. The positive of row r is column positive + r; with positive < 0 no column is, as where these
// targets are a part of all. What must not count as a negative is -inf.
#pragma once

#include <cstdint>

#include "cpu_dispatch.h"
#include "products.h"

namespace avppc {

struct LogitBlock {
  float* s;
  int64_t rows, columns, stride;
  int64_t positive;
};

// Log-sum-exps of rows or columns: maximum + log_sum each. Their sum would lose the digits of log_sum behind those of a
// large maximum, and the softmax exp(s - maximum - log_sum) its accuracy.
struct LogSumExp {
  float *maximum, *log_sum;
};

AVPPC_CPU_DECLARE(
    // Statistics of each row: the log-sum-exp, loss = lse - s[positive] (lse where there is no positive), and whether
    // the positive beats every negative.
    // With du (the gradient by each row's loss) the block becomes dS: floats, or bfloat16 in the first half of a row.
    void info_nce_rows(const LogitBlock& block, const LogSumExp& lse, float* loss, float* correct, const float* du,
                       Element type);

    // Merges a block into the running maximum and the sum of exp(s - maximum) of each column.
    void info_nce_columns(const LogitBlock& block, float* maximum, float* sum);

    // The block becomes dS of the rows' losses with weights du and, where column_du is not null, of the columns'.
    void info_nce_gradient(const LogitBlock& block, const LogSumExp& lse, const float* du, const LogSumExp& column_lse,
                           const float* column_du, Element type);

    void float_to_bfloat16(const float* from, uint16_t* to, int64_t count);
    void bfloat16_to_float(const uint16_t* from, float* to, int64_t count);
    void add_scaled(float* sum, const float* x, float scale, int64_t count);  // sum += scale * x
    double dot(const float* a, const float* b, int64_t count);)

}  // namespace avppc
