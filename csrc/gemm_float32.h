// Products of float32 factors where they are faster than MKL's.
#pragma once

#include "products.h"

namespace avppc {

// Whether they are: on AMD's CPUs with AVX-512, for which MKL has kernels of AVX2 alone.
bool has_gemm_float32();

// As multiply() in products.h, of float32, on up to `threads` threads; each keeps 0.5 MiB of buffers from its first
// call on. The sums do not depend on the number of threads.
void gemm_float32(const Factor& a, const Factor& b, float alpha, float beta, float* c, int64_t stride, int64_t threads);

}  // namespace avppc
