// Which sample a frame reads: shared by the CPU and the CUDA kernel. No standard headers, see cpu_dispatch.h.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define AVPPC_HOST_DEVICE __host__ __device__
#else
#define AVPPC_HOST_DEVICE
#endif

namespace avppc {

constexpr float INT16_SCALE = 1.0f / 32768.0f;
constexpr float NORMALIZE_EPSILON = 1e-5f;

// The sample that stands at position index of a clip with length > 0 samples, or -1 where the padding is zero.
AVPPC_HOST_DEVICE static inline int64_t source_sample(int64_t index, int64_t length, bool reflect) {
  if (index >= 0 && index < length) return index;
  if (!reflect) return -1;
  if (length == 1) return 0;
  const int64_t period = 2 * (length - 1);  // as numpy reflects: the ends are not repeated, the whole as often as needed
  index %= period;
  if (index < 0) index += period;
  return index < length ? index : period - index;
}

}  // namespace avppc
