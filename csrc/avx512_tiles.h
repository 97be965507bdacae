// What the products share that are compiled for AVX-512: 16 x 16 words of 32 bits, turned round in registers, and tiles of
// sums, from zeros to memory.
#pragma once

#include <cstdint>

#include <immintrin.h>

namespace avppc {
namespace {

// x[i] lane j becomes x[j] lane i.
inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {  // 2 x 2 words inside each quarter of a register
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // 4 x 4
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // the quarters themselves: x[4 b + i] quarter a goes to x[4 a + i] quarter b
    const __m512i even = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88), odd = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    x[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
    x[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    x[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` of 16 lanes: all of them, or none of a negative count.
inline __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// Zeros for the sums of a tile of c, which comes into the cache while they grow: for bfloat16 195 to 211, not 177 to 180
// GFLOP/s where c is [1024, 1024] (Zen 4).
template <int ROWS, int VECTORS>
inline void begin_tile(__m512 (&sum)[ROWS][VECTORS], const float* c, int64_t stride) {
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      sum[r][v] = _mm512_setzero_ps();
      __builtin_prefetch(c + r * stride + 16 * v, 1);
    }
  }
}

// c = alpha sum + beta c, in the last vector of each row for the lanes `last` alone; beta == 0 never reads c.
template <int ROWS, int VECTORS>
inline void store_tile(const __m512 (&sum)[ROWS][VECTORS], float alpha, float beta, float* c, int64_t stride,
                       __mmask16 last) {
  for (int r = 0; r < ROWS; ++r, c += stride) {
    for (int v = 0; v < VECTORS; ++v) {
      const __mmask16 lanes = v + 1 < VECTORS ? 0xffff : last;
      __m512 x = _mm512_mul_ps(sum[r][v], _mm512_set1_ps(alpha));
      if (beta != 0.0f) x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, c + 16 * v), _mm512_set1_ps(beta), x);
      _mm512_mask_storeu_ps(c + 16 * v, lanes, x);
    }
  }
}

}  // namespace
}  // namespace avppc
