// What is done to each frame and each clip on the way to the encoders; see clips_kernel.cpp.
#pragma once

#include <cstdint>

#include "cpu_dispatch.h"

namespace avppc {

AVPPC_CPU_DECLARE(
    // The square of crop x crop pixels at `pixels`, `stride` bytes from row to row, reduced by block means: luma from
    // 0 to 1, out [crop / block, crop / block], mirrored if told so. sums: room for `crop` numbers.
    void crop_luma_frame(const uint8_t* pixels, int64_t stride, int64_t crop, int64_t block, bool mirror,
                         uint32_t* sums, float* out);

    // Three frames of motion and the frame itself, of every stride-th frame from phase on: a clip of frames x pixels
    // luma -> out [frames', pixels, 4]. mean: room for `pixels` numbers.
    void motion_frames_clip(const float* luma, int64_t frames, int64_t pixels, int64_t phase, int64_t stride,
                            float* mean, float* out);

    // The same, but motion is told from the mean of the frames up to `reach` before and after the one it is of.
    void local_motion_frames_clip(const float* luma, int64_t frames, int64_t pixels, int64_t phase, int64_t stride,
                                  int64_t reach, float* mean, float* out);)

}  // namespace avppc
