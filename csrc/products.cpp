#include "products.h"

#include <dlfcn.h>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "checks.h"

namespace avppc {
namespace {

// Fortran's gemm, which torch exports where it carries MKL; matrices are column-major.
using GemmBfloat16 = void (*)(const char* transpose_a, const char* transpose_b, const int* m, const int* n,
                              const int* k, const float* alpha, const uint16_t* a, const int* lda, const uint16_t* b,
                              const int* ldb, const float* beta, float* c, const int* ldc);

// A function that torch's CPU library exports, or null. Not any library's: others in the process have a BLAS, too.
void* torch_symbol(const char* name) {
  static void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : dlsym(library, name);
}

GemmBfloat16 gemm_bfloat16() {
  static const auto function = reinterpret_cast<GemmBfloat16>(torch_symbol("gemm_bf16bf16f32_"));
  return function;
}

// Sets how many threads MKL may use for the calling one; 0: as many as for all. Returns what was set before.
using SetThreads = int (*)(int);

SetThreads set_threads() {
  static const auto function = reinterpret_cast<SetThreads>(torch_symbol("MKL_Set_Num_Threads_Local"));
  return function;
}

Tensor borrow(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {row_stride, column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

Tensor borrow(const Factor& factor) {
  return factor.transposed ? borrow(factor.data, factor.rows, factor.columns, 1, factor.stride)
                           : borrow(factor.data, factor.rows, factor.columns, factor.stride, 1);
}

}  // namespace

OnThisThread::OnThisThread() {
  if (set_threads() != nullptr) before_ = set_threads()(1);
}

OnThisThread::~OnThisThread() {
  if (set_threads() != nullptr) set_threads()(before_);
}

bool has_bfloat16_products() {
#if defined(__x86_64__)
  static const bool fast = __builtin_cpu_supports("amx-bf16") && gemm_bfloat16() != nullptr;
  return fast;
#else
  return false;
#endif
}

void multiply(Element type, const Factor& a, const Factor& b, float alpha, float beta, float* c, int64_t stride) {
  if (type == Element::float32) {
    const Tensor out = borrow(c, a.rows, b.columns, stride, 1);
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), borrow(a).get(), borrow(b).get(), beta, alpha));
    return;
  }
  // row-major c = a b is column-major c^T = b^T a^T, and a row-major matrix is its transpose in column-major
  const int m = b.columns, n = a.rows, k = a.columns, lda = b.stride, ldb = a.stride, ldc = stride;
  gemm_bfloat16()(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &m, &n, &k, &alpha,
                  static_cast<const uint16_t*>(b.data), &lda, static_cast<const uint16_t*>(a.data), &ldb, &beta, c,
                  &ldc);
}

}  // namespace avppc
