// 16 x 16 words of 32 bits, turned round in registers; for sources that are compiled for AVX-512.
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

// The first `count` of 16 lanes: all of them, or none of a negative count.
inline __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

}  // namespace
}  // namespace avppc
