// Matrix products for one thread of several that each work on something of their own.
#pragma once

#include <cstdint>

namespace avppc {

// What a product's factors hold.
enum class Element { float32, bfloat16 };

// A factor [rows, columns]; row-major, or column-major where transposed, with `stride` elements between rows (columns).
struct Factor {
  const void* data;
  int64_t rows, columns, stride;
  bool transposed = false;

  Factor transpose() const { return {data, columns, rows, stride, !transposed}; }
};

// c = alpha a b + beta c, where c is row-major with `stride` floats between rows; sums are float32.
// beta == 0 never reads c. bfloat16 needs has_bfloat16_products().
void multiply(Element type, const Factor& a, const Factor& b, float alpha, float beta, float* c, int64_t stride);

// Whether a product outside any parallel region runs on all threads.
bool products_share_threads(Element type);

// While one lives (and is `wanted`), products keep to the calling thread. Inside a parallel region they do anyway;
// outside, as with a single thread at work, each small product would wake and await the others.
class OnThisThread {
 public:
  explicit OnThisThread(bool wanted);
  ~OnThisThread();
  OnThisThread(const OnThisThread&) = delete;
  OnThisThread& operator=(const OnThisThread&) = delete;

 private:
  const bool wanted_, alone_before_;
  int mkl_before_ = 0;
};

// Whether products of bfloat16 factors with float32 sums are there and fast: AMX in the CPU and MKL in torch, or
// AVX512-BF16. An AVPPC_CPU_LEVEL below avx512 forbids both.
bool has_bfloat16_products();

}  // namespace avppc
