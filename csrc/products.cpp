#include "products.h"

#include <dlfcn.h>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "checks.h"
#include "cpu_dispatch.h"
#include "gemm_bfloat16.h"
#include "gemm_float32.h"

namespace avppc {
namespace {

// Fortran's gemm, which torch exports where it carries MKL; matrices are column-major.
template <typename T>
using Gemm = void (*)(const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,
                      const float* alpha, const T* a, const int* lda, const T* b, const int* ldb, const float* beta,
                      float* c, const int* ldc);

// A function that torch's CPU library exports, or null. Not any library's: others in the process have a BLAS, too.
void* torch_symbol(const char* name) {
  static void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : dlsym(library, name);
}

// Sets how many threads MKL may use for the calling one; 0: as many as for all. Returns what was set before.
using SetThreads = int (*)(int);

SetThreads set_threads() {
  static const auto function = reinterpret_cast<SetThreads>(torch_symbol("MKL_Set_Num_Threads_Local"));
  return function;
}

Gemm<uint16_t> gemm_bfloat16_of_mkl() {
  static const auto function = reinterpret_cast<Gemm<uint16_t>>(torch_symbol("gemm_bf16bf16f32_"));
  return function;
}

// What torch.addmm comes down to for float32, without the 3 us of its way there; null where torch has another BLAS.
Gemm<float> gemm_floats_of_mkl() {
  static const auto function =
      set_threads() == nullptr ? nullptr : reinterpret_cast<Gemm<float>>(torch_symbol("sgemm_"));
  return function;
}

// Row-major c = a b is column-major c^T = b^T a^T, and a row-major matrix is its transpose in column-major. MKL's
// integers have 32 bits: InfoNCEProblem refuses sides that do not fit.
template <typename T>
void multiply_with(Gemm<T> gemm, const Factor& a, const Factor& b, float alpha, float beta, float* c, int64_t stride) {
  const int m = b.columns, n = a.rows, k = a.columns, lda = b.stride, ldb = a.stride, ldc = stride;
  gemm(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &m, &n, &k, &alpha, static_cast<const T*>(b.data), &lda,
       static_cast<const T*>(a.data), &ldb, &beta, c, &ldc);
}

// MKL's product is the fastest where the CPU has AMX. Without, it is slower than float32's.
bool has_amx_products() {
#if defined(__x86_64__)
  static const bool there = __builtin_cpu_supports("amx-bf16") && gemm_bfloat16_of_mkl() != nullptr;
  return there;
#else
  return false;
#endif
}

Tensor borrow(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {row_stride, column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

Tensor borrow(const Factor& factor) {
  return factor.transposed ? borrow(factor.data, factor.rows, factor.columns, 1, factor.stride)
                           : borrow(factor.data, factor.rows, factor.columns, factor.stride, 1);
}

// Whether an OnThisThread lives.
thread_local bool is_alone = false;

void multiply_floats(const Factor& a, const Factor& b, float alpha, float beta, float* c, int64_t stride) {
  if (has_gemm_float32()) {
    return gemm_float32(a, b, alpha, beta, c, stride, is_alone ? 1 : torch::stable::get_num_threads());
  }
  if (gemm_floats_of_mkl() != nullptr) return multiply_with(gemm_floats_of_mkl(), a, b, alpha, beta, c, stride);
  const Tensor out = borrow(c, a.rows, b.columns, stride, 1);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), borrow(a).get(), borrow(b).get(), beta, alpha));
}

}  // namespace

OnThisThread::OnThisThread(bool wanted) : wanted_(wanted), alone_before_(is_alone) {
  if (!wanted_) return;
  is_alone = true;
  if (set_threads() != nullptr) mkl_before_ = set_threads()(1);
}

OnThisThread::~OnThisThread() {
  if (!wanted_) return;
  is_alone = alone_before_;
  if (set_threads() != nullptr) set_threads()(mkl_before_);
}

bool products_share_threads(Element type) { return type == Element::float32 || has_amx_products(); }

bool has_bfloat16_products() {
  return cpu_level() == CpuLevel::avx512 && (has_amx_products() || has_gemm_bfloat16());
}

void multiply(Element type, const Factor& a, const Factor& b, float alpha, float beta, float* c, int64_t stride) {
  if (type == Element::float32) {
    multiply_floats(a, b, alpha, beta, c, stride);
  } else if (has_amx_products()) {
    multiply_with(gemm_bfloat16_of_mkl(), a, b, alpha, beta, c, stride);
  } else {
    gemm_bfloat16(a, b, alpha, beta, c, stride);
  }
}

namespace {

// A matrix of a test as a factor: one of its strides must be 1.
Factor as_factor(const char* name, const Tensor& x, ScalarType dtype) {
  check_dtype(name, x, dtype);
  AVPPC_CHECK(x.stride(0) == 1 || x.stride(1) == 1, name, " must have a stride of 1, got ", x.stride(0), " and ",
              x.stride(1));
  const bool transposed = x.stride(1) != 1;
  return {x.data_ptr(), x.size(0), x.size(1), transposed ? x.stride(1) : x.stride(0), transposed};
}

// out = alpha a b + beta out as multiply() computes it, for the tests.
void product_cpu(const Tensor& a, const Tensor& b, const Tensor& out, double alpha, double beta) {
  const ScalarType dtype = a.scalar_type();
  AVPPC_CHECK(dtype == ScalarType::Float || (dtype == ScalarType::BFloat16 && has_bfloat16_products()),
              "a must be float32, or bfloat16 where this machine multiplies it, got ",
              torch::headeronly::toString(dtype));
  check_dim("a", a, 2);
  check_dim("b", b, 2);
  check_dim("out", out, 2);
  check_dtype("out", out, ScalarType::Float);
  AVPPC_CHECK(out.stride(1) == 1, "out must be row-major");
  AVPPC_CHECK(a.numel() > 0 && a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1),
              "a, b and out must have shapes [m, k], [k, n] and [m, n], not empty");
  multiply(dtype == ScalarType::Float ? Element::float32 : Element::bfloat16, as_factor("a", a, dtype),
           as_factor("b", b, dtype), static_cast<float>(alpha), static_cast<float>(beta),
           out.mutable_data_ptr<float>(), out.stride(0));
}

}  // namespace

}  // namespace avppc

STABLE_TORCH_LIBRARY_FRAGMENT(avppc, library) {
  library.def("product_cpu(Tensor a, Tensor b, Tensor(a!) out, float alpha, float beta) -> ()");
  library.def("has_bfloat16_products() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(avppc, CPU, library) { library.impl("product_cpu", TORCH_BOX(&avppc::product_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(avppc, CompositeExplicitAutograd, library) {
  library.impl("has_bfloat16_products", TORCH_BOX(&avppc::has_bfloat16_products));
}
