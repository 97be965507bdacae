// The two parts of a bfloat16 product that run in AVX512-BF16; see gemm_bfloat16.cpp for the whole.
//
// vdpbf16ps adds to each of 16 floats the products of two neighbouring bfloat16s: the unit of both factors is a word of
// two elements that follow each other along k. A factor seen as [k, n] is packed in panels of WIDTH columns:
//
//          n ->   0 .. WIDTH-1     WIDTH .. 2 WIDTH-1             one panel, a word a cell:
//      k  0,1   +---------------+-----------------+--            [0,0 1,0] [0,1 1,1] .. [0,WIDTH-1 1,WIDTH-1]
//      |  2,3   |    panel 0    |     panel 1     |              [2,0 3,0] [2,1 3,1] ..
//      v  ..    |               |                 |              ..
//         k-1   +---------------+-----------------+--            an odd last row is paired with zeros
//
// The right factor is b itself in panels of 64, the left one a^T in panels of 96, sixteen tiles of 6 rows. A row-major
// left factor has its words in a row already and is taken as it lies. A tile of c, 6 x 64, is 24 registers of sums;
// each word of k costs it 4 loads of b, 6 broadcasts of a and 24 vdpbf16ps.
#pragma once

#include <cstdint>

namespace avppc::cpu_avx512_bf16 {

constexpr int64_t TILE_ROWS = 6, LEFT_WIDTH = 96, RIGHT_WIDTH = 64;

// x [k, n] in panels of `width` columns, a multiple of 32. x is row-major with `stride` elements from row to row, or
// column-major where transposed. `panels` holds ceil(n / width) * ceil(k / 2) * width words.
void pack(const uint16_t* x, int64_t k, int64_t n, int64_t stride, bool transposed, int64_t width, uint32_t* panels);

// Where the words of a left factor [rows, k] are, in bytes: row r is row r % LEFT_WIDTH of its panel.
struct LeftFactor {
  const char* data;
  int64_t panel_bytes, row_bytes, word_bytes;
};

// c [rows, columns] = alpha a b + beta c over `words` words of k; b is packed; beta == 0 never reads c.
void multiply_panels(const LeftFactor& a, const uint32_t* b, int64_t rows, int64_t columns, int64_t words, float alpha,
                     float beta, float* c, int64_t stride);

}  // namespace avppc::cpu_avx512_bf16
