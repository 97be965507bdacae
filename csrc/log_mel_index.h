// Which samples a frame reads and how many frames a clip has: shared by the CPU and the CUDA kernels. No standard
// headers with inline functions, see cpu_dispatch.h.
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

// What stands beyond the ends of a clip; all but zeros as often as needed in a short clip, as numpy pads.
enum class Padding {
  reflect,    // c b | a b c | b a
  constant,   // 0 0 | a b c | 0 0
  replicate,  // a a | a b c | c c
  circular,   // b c | a b c | a b
  symmetric   // b a | a b c | c b
};

// The sample that stands at position index of a clip with length > 0 samples, or -1 where the padding is zero.
AVPPC_HOST_DEVICE static inline int64_t source_sample(int64_t index, int64_t length, Padding padding) {
  if (index >= 0 && index < length) return index;
  if (padding == Padding::constant) return -1;
  if (padding == Padding::replicate) return index < 0 ? 0 : length - 1;
  const int64_t repeated = padding == Padding::symmetric ? 1 : 0;  // an end of a mirrored clip
  const int64_t period = padding == Padding::circular ? length : 2 * (length - 1 + repeated);
  if (period == 0) return 0;  // a reflected clip of one sample
  index %= period;
  if (index < 0) index += period;
  return index < length ? index : period - index - repeated;
}

// Frame t of a clip reads window samples from first + t * hop on.
struct LogMelFraming {
  int64_t first, hop;
  int64_t least;  // samples that the first frame needs; 0: a frame for every hop begun, the ends padded
  bool drop_last;

  AVPPC_HOST_DEVICE int64_t frames(int64_t samples) const {
    if (samples <= 0 || samples < least) return 0;
    const int64_t all = 1 + (samples - least) / hop;
    return drop_last ? all - 1 : all;
  }
};

}  // namespace avppc
