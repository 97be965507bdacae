// The CPU kernel of log_mel as its caller sees it: plain pointers only, because it is compiled once per instruction
// set.
#pragma once

#include <stdint.h>

#include "cpu_dispatch.h"
#include "fft_tables.h"
#include "log_mel_index.h"

namespace avppc {

constexpr int LOG_MEL_GROUP = 16;  // frames computed together

// Tables for a configuration; LogMelPlanStorage in log_mel_cpu_plan.h owns them. A slot is a place in the transform's
// input: slots 2 i and 2 i + 1 hold the real and the imaginary part of its value i, two neighbouring samples.
struct LogMelPlan {
  int window_samples, bands;
  int points;     // fft_size / 2: a real transform as a complex one of half size
  FftTables fft;  // that transform, or the longer one of its chirp
  FftChirp chirp;
  bool remove_dc, magnitude, take_log;
  double preemphasis;         // within the frame; 0: none
  const double* window;       // [window_samples], times 1/2
  const double* slot_window;  // [2 * fft.points] of the sample in each slot; 0 behind the window
  const int* slot_sample;     // [2 * fft.points] sample in each slot; window_samples: zero
  const int* slot_row;        // [2 * fft.points] where that sample of frame 0 stands among the rows
  const int* live;            // first pass: how many values of each butterfly are not zero
  int row_count, row_width;   // samples stand as rows [row_count][row_width]; the last row is zero
  int64_t stride;             // from a frame's samples to the next frame's
  const double* unzip;                            // [points, 2], see make_unzip
  const int *mel_begin, *mel_count, *mel_offset;  // [bands]
  const float* mel_weights;
  bool track_largest;                                       // log_mel_group's result is wanted
  float log_offset, log_floor, output_scale, output_shift;  // output_scale is of the natural logarithm
};

// One clip and how its samples are read.
struct SampleSource {
  const void* clip;
  int64_t length;
  bool is_int16;
  Padding padding;
  float preemphasis;  // over the signal; 0: none
};

// Scratch memory of log_mel_group, each part 64-byte aligned.
struct LogMelWork {
  float* rows;          // [row_count, row_width], the last row zero
  double* conditioned;  // [window_samples + 1, doubles of a register], the last row zero
  double* spectrum;     // [2 * fft.points, doubles of a register]
  double* product;      // the same again where there is a chirp
  float* power;         // [points + 1, LOG_MEL_GROUP]
  float* mel;           // [bands rounded up to 16, LOG_MEL_GROUP]
};
constexpr int LOG_MEL_MAX_DOUBLES = 8;  // of a register

// Memory that is wanted soon: what the next group reads and this one writes. It comes into the cache a few lines at a
// time while the arithmetic goes on; many at once would hold up every load behind them.
struct LogMelAhead {
  const char *read, *read_end;
  char *write, *write_end;
};

AVPPC_CPU_DECLARE(
    // Samples begin ... begin + count - 1 of a clip, as float, with what stands beyond its ends.
    void load_samples(const SampleSource& source, int64_t begin, int64_t count, float* out);
    // samples: those of frames <= LOG_MEL_GROUP frames, plan.stride apart; the memory behind them is readable for
    // row_width frames -> out [frames, bands]. Returns the largest value written, NaN if there is one.
    float log_mel_group(const LogMelPlan& plan, const float* samples, int frames, const LogMelWork& work,
                        const LogMelAhead& ahead, float* out);
    // Each value, raised to lowest, less reference, times scale, plus shift. NaN stays.
    void scale_values(float* values, int64_t count, float lowest, float reference, float scale, float shift);)

}  // namespace avppc
