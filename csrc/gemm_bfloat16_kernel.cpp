// Compiled for AVX512-BF16. vdpbf16ps takes subnormal factors for zero and flushes subnormal sums to it, whatever the
// thread's rounding mode says, as AMX does: what is below 1.2e-38 is lost, which no loss or gradient notices.
#include "gemm_bfloat16_kernel.h"

#include "avx512_tiles.h"
#include "rounding.h"

namespace avppc::cpu_avx512_bf16 {
namespace {

constexpr int LANES = 16;  // words of a register

// The first `count` of 32 lanes: all of them, or none of a negative count.
__mmask32 first32(int64_t count) { return count >= 32 ? 0xffffffff : count <= 0 ? 0 : (1u << count) - 1; }

// Elements 0 to 15 of two registers in turns: those of the second count from 32 on.
alignas(64) constexpr uint16_t IN_TURNS[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                               8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// 32 elements each of two rows become 32 words, in their order.
void store_pairs(__m512i first, __m512i second, uint32_t* words) {
  const __m512i low = _mm512_load_si512(IN_TURNS), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_store_si512(words, _mm512_permutex2var_epi16(first, low, second));
  _mm512_store_si512(words + LANES, _mm512_permutex2var_epi16(first, high, second));
}

// Of an odd k the last row's partners are zeros.
void pack_panel(const uint16_t* x, int64_t k, int64_t columns, int64_t stride, int64_t width, uint32_t* panel) {
  const __mmask32 last = first32((columns - 1) % 32 + 1);
  for (int64_t row = 0; row < k; row += 2, x += 2 * stride, panel += width) {
    const bool has_second = row + 1 < k;
    const uint16_t* const next = has_second ? x + stride : x;
    for (int64_t j = 0; j < columns; j += 32) {
      const __mmask32 mask = j + 32 <= columns ? 0xffffffff : last;
      store_pairs(_mm512_maskz_loadu_epi16(mask, x + j), _mm512_maskz_loadu_epi16(has_second ? mask : 0, next + j),
                  panel + j);
    }
  }
}

// The same of a column-major x, in blocks of 16 columns and 16 words: there a column's words lie in a row.
void pack_panel_transposed(const uint16_t* x, int64_t k, int64_t columns, int64_t stride, int64_t width,
                           uint32_t* panel) {
  const int64_t words = (k + 1) / 2;
  for (int64_t j = 0; j < columns; j += LANES) {
    for (int64_t word = 0; word < words; word += LANES) {
      __m512i block[LANES];
      const __mmask32 rows = first32(k - 2 * word);
      for (int i = 0; i < LANES; ++i) {
        const bool inside = j + i < columns;
        block[i] = _mm512_maskz_loadu_epi16(inside ? rows : 0, x + (inside ? j + i : 0) * stride + 2 * word);
      }
      transpose(block);
      for (int i = 0; i < LANES && word + i < words; ++i) {
        _mm512_store_si512(panel + (word + i) * width + j, block[i]);
      }
    }
  }
}

__m512bh as_bfloat16(__m512i words) { return (__m512bh)words; }

// c [ROWS, up to 16 VECTORS] = alpha a b + beta c, all sums in registers.
template <int ROWS, int VECTORS>
void tile(const char* a, int64_t row_bytes, int64_t word_bytes, const uint32_t* b, int64_t words, float alpha,
          float beta, float* c, int64_t stride, __mmask16 last) {
  __m512 sum[ROWS][VECTORS];
  begin_tile(sum, c, stride);
  for (int64_t word = 0; word < words; ++word, a += word_bytes, b += RIGHT_WIDTH) {
    __m512bh right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = as_bfloat16(_mm512_load_si512(b + v * LANES));
    for (int r = 0; r < ROWS; ++r) {
      int two;
      __builtin_memcpy(&two, a + r * row_bytes, sizeof two);
      const __m512bh left = as_bfloat16(_mm512_set1_epi32(two));
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
    }
  }
  store_tile(sum, alpha, beta, c, stride, last);
}

using Tile = void (*)(const char*, int64_t, int64_t, const uint32_t*, int64_t, float, float, float*, int64_t,
                      __mmask16);

constexpr Tile TILES[TILE_ROWS][RIGHT_WIDTH / LANES] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>}};

}  // namespace

void pack(const uint16_t* x, int64_t k, int64_t n, int64_t stride, bool transposed, int64_t width, uint32_t* panels) {
  for (int64_t j = 0; j < n; j += width, panels += ceil_div(k, 2) * width) {
    const int64_t columns = smaller(width, n - j);
    if (transposed) {
      pack_panel_transposed(x + j * stride, k, columns, stride, width, panels);
    } else {
      pack_panel(x + j, k, columns, stride, width, panels);
    }
  }
}

void multiply_panels(const LeftFactor& a, const uint32_t* b, int64_t rows, int64_t columns, int64_t words, float alpha,
                     float beta, float* c, int64_t stride) {
  for (int64_t j = 0; j < columns; j += RIGHT_WIDTH, b += words * RIGHT_WIDTH) {
    const int64_t width = smaller(RIGHT_WIDTH, columns - j);
    const int64_t vectors = ceil_div(width, LANES);
    const __mmask16 last = first16(width - (vectors - 1) * LANES);
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
      const char* left = a.data + i / LEFT_WIDTH * a.panel_bytes + i % LEFT_WIDTH * a.row_bytes;
      TILES[smaller(TILE_ROWS, rows - i) - 1][vectors - 1](left, a.row_bytes, a.word_bytes, b, words, alpha, beta,
                                                         c + i * stride + j, stride, last);
    }
  }
}

}  // namespace avppc::cpu_avx512_bf16
