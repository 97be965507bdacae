// The tables of a complex transform as the kernels see them: plain pointers into an FftPlan or an FftChirpPlan.
#pragma once

namespace avppc {

constexpr int FFT_MAX_PASSES = 16;

struct FftTables {
  int points, passes;
  int radix[FFT_MAX_PASSES];
  const double* twiddles[FFT_MAX_PASSES];
};

// A transform of n values by way of a longer one (FftChirpPlan); its pointers are null where it is not needed.
struct FftChirp {
  const double* slots;     // [points of the longer transform, 2] the chirp at each place of its input; 0 from n on
  const double* values;    // [n, 2]
  const double* spectrum;  // [points of the longer transform, 2]
  const int* place;        // [points of the longer transform], see FftPlan
  const int* live;         // of a first pass whose values may all be other than zero
};

}  // namespace avppc
