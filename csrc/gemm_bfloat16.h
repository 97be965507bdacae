// Products of bfloat16 factors with float32 sums on CPUs that have AVX512-BF16.
#pragma once

#include "products.h"

namespace avppc {

// Whether this machine has AVX512-BF16.
bool has_gemm_bfloat16();

// As multiply() in products.h, of bfloat16: on the calling thread alone, which keeps 0.8 MiB of buffers from the first
// call on.
void gemm_bfloat16(const Factor& a, const Factor& b, float alpha, float beta, float* c, int64_t stride);

}  // namespace avppc
