#include "cpu_dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace avppc {
namespace {

CpuLevel detect() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? CpuLevel::avx512 : avx2 ? CpuLevel::avx2 : CpuLevel::baseline;
#else
  return CpuLevel::baseline;
#endif
}

}  // namespace

const char* cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::avx512: return "avx512";
    case CpuLevel::avx2: return "avx2";
    default: return "baseline";
  }
}

CpuLevel cpu_level() {
  static const CpuLevel best = detect();
  const char* wanted = std::getenv("AVPPC_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const CpuLevel level : {CpuLevel::baseline, CpuLevel::avx2, CpuLevel::avx512}) {
    if (std::string(wanted) != cpu_level_name(level)) continue;
    if (level > best) {
      throw std::runtime_error(std::string("AVPPC_CPU_LEVEL=") + wanted + ", but the best this machine has is " +
                               cpu_level_name(best));
    }
    return level;
  }
  throw std::runtime_error(std::string("AVPPC_CPU_LEVEL must be baseline, avx2 or avx512; got '") + wanted + "'");
}

}  // namespace avppc
