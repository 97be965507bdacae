// The parts of a float32 product that run in AVX-512; see gemm_float32.cpp for the whole.
#pragma once

#include <cstdint>

namespace avppc::cpu_avx512_float32 {

constexpr int64_t TILE_ROWS = 6, PANEL = 64;  // a tile of c: 24 registers of sums

// y [columns, rows] = x [rows, columns] transposed, each with so many floats from row to row. y_stride is a multiple of
// 16 and at least rows; behind `rows` there are zeros.
void transpose(const float* x, int64_t rows, int64_t columns, int64_t x_stride, float* y, int64_t y_stride);

// y [rows, PANEL] = x [rows, columns], zeros behind `columns`.
void pack(const float* x, int64_t rows, int64_t columns, int64_t x_stride, float* y);

// c [rows, columns] = alpha a b + beta c for at most PANEL columns; a [rows, depth] and b [depth, columns] are
// row-major. b may be read as far as a multiple of 16 columns. beta == 0 never reads c.
void multiply_panel(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t columns,
                    int64_t depth, float alpha, float beta, float* c, int64_t c_stride);

}  // namespace avppc::cpu_avx512_float32
