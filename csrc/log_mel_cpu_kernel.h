// The CPU kernel of log_mel as its caller sees it: plain pointers only, because it is compiled once per instruction set.
#pragma once

#include <stdint.h>

#include "cpu_dispatch.h"

namespace avppc {

constexpr int LOG_MEL_GROUP = 16;     // frames computed side by side, in the lanes of one register or of several
constexpr int LOG_MEL_MAX_PASSES = 16;

// Tables for a configuration; see LogMelPlanStorage in log_mel_cpu.cpp, which owns them.
struct LogMelPlan {
  int window_samples, hop_samples, bands, points;  // points = fft_size / 2: a real transform as a complex one of half size
  bool remove_dc, magnitude, take_log;
  float preemphasis;                               // within the frame; 0: none
  const float* window;                             // [window_samples], times 1/2
  const int* place;                                // [fft_size] where sample i stands in the work buffer, in units of lanes
  int passes;
  int radix[LOG_MEL_MAX_PASSES];
  const float* twiddles[LOG_MEL_MAX_PASSES];       // pass with m values done: [m, radix - 1, 2]
  const float* unzip;                              // [points / 2 + 1, 2] exp(-2 pi i k / fft_size)
  const int *mel_begin, *mel_count, *mel_offset;   // [bands]
  const float* mel_weights;
  float log_offset, log_floor, log_scale, output_scale, output_shift;
};

// One clip and how its samples are read.
struct SampleSource {
  const void* clip;
  int64_t length;
  bool is_int16, reflect;
  float preemphasis;  // over the signal; 0: none
};

// Floats of scratch memory (64-byte aligned) that log_mel_group needs.
constexpr int64_t log_mel_work_floats(int64_t fft_size, int64_t bands) {
  return LOG_MEL_GROUP * (fft_size + 2 + bands + LOG_MEL_GROUP);
}

AVPPC_CPU_DECLARE(
    // Samples begin ... begin + count - 1 of a clip, as float, with what stands beyond its ends.
    void load_samples(const SampleSource& source, int64_t begin, int64_t count, float* out);
    // samples: windows of frames <= LOG_MEL_GROUP frames, stride apart, readable up to a multiple of 16 samples each and for
    // LOG_MEL_GROUP frames -> out [frames, bands]. Returns the largest value before output_scale, NaN if there is one.
    float log_mel_group(const LogMelPlan& plan, const float* samples, int64_t stride, int frames, float* work, float* out);)

}  // namespace avppc
