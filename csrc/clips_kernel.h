// One frame's crop as luma; see clips_kernel.cpp.
#pragma once

#include <cstdint>

#include "cpu_dispatch.h"

namespace avppc {

AVPPC_CPU_DECLARE(
    // The square of crop x crop pixels at `pixels`, `stride` bytes from row to row, reduced by block means: luma from
    // 0 to 1, out [crop / block, crop / block], mirrored if told so. sums: room for `crop` numbers.
    void crop_luma_frame(const uint8_t* pixels, int64_t stride, int64_t crop, int64_t block, bool mirror,
                         uint32_t* sums, float* out);)

}  // namespace avppc
