// The tables of a mixed-radix transform (fft_butterfly.h) of a real signal of 2 * points numbers, taken as points
// complex values: even samples the real parts, odd ones the imaginary parts.
#pragma once

#include <vector>

namespace avppc {

struct FftPlan {
  explicit FftPlan(int points);

  int points;
  std::vector<int> radices;                   // of the passes, at least two
  std::vector<int> place;                     // [points] where the first pass wants value i
  std::vector<std::vector<double>> twiddles;  // of a pass with m values done: m times what Butterfly::twiddled wants
  std::vector<double> unzip;                  // [points, 2] rotations by -pi k / points
};

}  // namespace avppc
