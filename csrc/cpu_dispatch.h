// One kernel source, compiled once per instruction set, chosen at run time.
//
// A kernel source (AVPPC_CPU_KERNELS in CMakeLists.txt) is compiled as cpu_baseline, cpu_avx2 and cpu_avx512:
//
//   namespace avppc::AVPPC_CPU_NAMESPACE {
//   void scale_rows(float* x, int64_t n) { ... }         // CPU_LANES floats fit a register here; see vfloat
//   }
//
// A header declares it for all of them, the caller (compiled once) picks the one for this machine:
//
//   AVPPC_CPU_DECLARE(void scale_rows(float* x, int64_t n);)
//   AVPPC_CPU_SELECT(scale_rows)(x, n);
//
// Kernel sources include no standard header with inline functions (<vector>, <algorithm>, <cmath>'s templates): the
// linker would keep one copy for everybody, perhaps the one with AVX-512. The build refuses objects that hold such
// copies.
#pragma once

namespace avppc {

enum class CpuLevel { baseline = 0, avx2 = 1, avx512 = 2 };

// The best level that was compiled and that this machine has. AVPPC_CPU_LEVEL=baseline|avx2|avx512 in the environment
// asks for a lower one. Throws std::runtime_error for a name that is none of these or a level that this machine lacks.
CpuLevel cpu_level();
const char* cpu_level_name(CpuLevel level);

#if defined(__x86_64__)
#define AVPPC_CPU_DECLARE(...) \
  namespace cpu_baseline {     \
  __VA_ARGS__                  \
  }                            \
  namespace cpu_avx2 {         \
  __VA_ARGS__                  \
  }                            \
  namespace cpu_avx512 {       \
  __VA_ARGS__                  \
  }
#define AVPPC_CPU_SELECT(kernel)                                             \
  (avppc::cpu_level() == avppc::CpuLevel::avx512 ? avppc::cpu_avx512::kernel \
   : avppc::cpu_level() == avppc::CpuLevel::avx2 ? avppc::cpu_avx2::kernel   \
                                                 : avppc::cpu_baseline::kernel)
#else
#define AVPPC_CPU_DECLARE(...) \
  namespace cpu_baseline {     \
  __VA_ARGS__                  \
  }
#define AVPPC_CPU_SELECT(kernel) (avppc::cpu_baseline::kernel)
#endif

// Inside a kernel source: a register full of floats, as the compiler's own vector type (+ - * / and comparisons work
// on it).
#if defined(AVPPC_CPU_NAMESPACE)
namespace AVPPC_CPU_NAMESPACE {
#if defined(AVPPC_CPU_LEVEL_avx512)
constexpr int CPU_LANES = 16;
#elif defined(AVPPC_CPU_LEVEL_avx2)
constexpr int CPU_LANES = 8;
#else
constexpr int CPU_LANES = 4;
#endif
typedef float vfloat __attribute__((vector_size(CPU_LANES * sizeof(float))));
typedef int vint __attribute__((vector_size(CPU_LANES * sizeof(int))));
typedef unsigned vuint __attribute__((vector_size(CPU_LANES * sizeof(unsigned))));
}  // namespace AVPPC_CPU_NAMESPACE
#endif

}  // namespace avppc
