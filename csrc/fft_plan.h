// The tables of a mixed-radix transform (fft_butterfly.h) of a real signal of 2 * points numbers, taken as points
// complex values: even samples the real parts, odd ones the imaginary parts.
#pragma once

#include <vector>

namespace avppc {

// Whether a transform of so many points has an FftPlan: at least two passes, no prime factor above 5.
bool has_fft_plan(int points);

struct FftPlan {
  // Throws std::invalid_argument where has_fft_plan(points) is false.
  explicit FftPlan(int points);

  int points;
  std::vector<int> radices;                   // of the passes, at least two
  std::vector<int> place;                     // [points] where the first pass wants value i
  std::vector<std::vector<double>> twiddles;  // of a pass with m values done: m times what Butterfly::twiddled wants
};

// [points, 2] rotations by -pi k / points, which make the real transform of 2 * points numbers.
std::vector<double> make_unzip(int points);

// A transform of any number of values as a convolution with a chirp (fft_chirp_lanes.h).
struct FftChirpPlan {
  explicit FftChirpPlan(int points);

  FftPlan fft;                   // of at least 2 * points - 1 points
  std::vector<double> chirp;     // [points, 2] exp(-i pi k^2 / points)
  std::vector<double> spectrum;  // [fft.points, 2] of the conjugate chirp to both sides of 0, divided by fft.points
};

}  // namespace avppc
