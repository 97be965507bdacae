// Compiled for AVX-512.
#include "gemm_float32_kernel.h"

#include "avx512_tiles.h"
#include "rounding.h"

namespace avppc::cpu_avx512_float32 {
namespace {

constexpr int LANES = 16;

// c [ROWS, up to 16 VECTORS] = alpha a b + beta c, all sums in registers.
template <int ROWS, int VECTORS>
void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float alpha, float beta,
          float* c, int64_t c_stride, __mmask16 last) {
  __m512 sum[ROWS][VECTORS];
  begin_tile(sum, c, c_stride);
  for (int64_t k = 0; k < depth; ++k, ++a, b += b_stride) {
    __m512 right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_ps(b + v * LANES);
    for (int r = 0; r < ROWS; ++r) {
      const __m512 left = _mm512_set1_ps(a[r * a_stride]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_fmadd_ps(left, right[v], sum[r][v]);
    }
  }
  store_tile(sum, alpha, beta, c, c_stride, last);
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float, float, float*, int64_t, __mmask16);

constexpr Tile TILES[TILE_ROWS][PANEL / LANES] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>}};

}  // namespace

void transpose(const float* x, int64_t rows, int64_t columns, int64_t x_stride, float* y, int64_t y_stride) {
  for (int64_t i = 0; i < rows; i += LANES) {
    for (int64_t j = 0; j < columns; j += LANES) {
      __m512i block[LANES];
      const __mmask16 mask = first16(columns - j);
      for (int n = 0; n < LANES; ++n) {
        const bool inside = i + n < rows;
        block[n] = _mm512_maskz_loadu_epi32(inside ? mask : 0, x + (inside ? i + n : 0) * x_stride + j);
      }
      avppc::transpose(block);
      for (int n = 0; n < LANES && j + n < columns; ++n) _mm512_storeu_si512(y + (j + n) * y_stride + i, block[n]);
    }
  }
}

void pack(const float* x, int64_t rows, int64_t columns, int64_t x_stride, float* y) {
  for (int64_t i = 0; i < rows; ++i, x += x_stride, y += PANEL) {
    for (int64_t j = 0; j < PANEL; j += LANES) {
      _mm512_storeu_ps(y + j, _mm512_maskz_loadu_ps(first16(columns - j), x + smaller(j, columns - 1)));
    }
  }
}

void multiply_panel(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t columns,
                    int64_t depth, float alpha, float beta, float* c, int64_t c_stride) {
  const int64_t vectors = ceil_div(columns, LANES);
  const __mmask16 last = first16(columns - (vectors - 1) * LANES);
  for (int64_t i = 0; i < rows; i += TILE_ROWS) {
    TILES[smaller(TILE_ROWS, rows - i) - 1][vectors - 1](a + i * a_stride, a_stride, b, b_stride, depth, alpha, beta,
                                                       c + i * c_stride, c_stride, last);
  }
}

}  // namespace avppc::cpu_avx512_float32
