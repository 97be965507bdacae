#include "fft_plan.h"

#include <cmath>
#include <cstddef>

namespace avppc {
namespace {

constexpr double PI = 3.14159265358979323846;

// At least two: the kernels treat the first pass and the last in their own ways.
std::vector<int> factorize(int points) {
  if (points == 8) return {4, 2};
  std::vector<int> radices;
  for (const int radix : {8, 4, 2, 5, 3}) {
    while (points % radix == 0) {
      radices.push_back(radix);
      points /= radix;
    }
  }
  return radices;
}

// Place of value i in a decimation-in-time transform whose passes have these radices.
int digit_reversed(int i, const std::vector<int>& radices, int points) {
  int place = 0;
  for (auto radix = radices.rbegin(); radix != radices.rend(); ++radix) {
    points /= *radix;
    place += i % *radix * points;
    i /= *radix;
  }
  return place;
}

void push_rotation(std::vector<double>& table, double turns) {  // clockwise
  const double cosine = std::cos(-2.0 * PI * turns);
  table.push_back(cosine);
  table.push_back(std::sin(-2.0 * PI * turns) / cosine);
}

// What Butterfly<radix> in fft_butterfly.h wants to know of w, the rotation by turns.
void push_twiddles(std::vector<double>& table, int radix, double turns) {
  if (radix == 3 || radix == 5) {
    for (int k = 1; k < radix; ++k) {
      table.push_back(std::cos(-2.0 * PI * turns * k));
      table.push_back(std::sin(-2.0 * PI * turns * k));
    }
    return;
  }
  for (int power = radix / 2; power > 0; power /= 2) push_rotation(table, turns * power);
  if (radix == 8) push_rotation(table, turns + 0.125);
}

}  // namespace

FftPlan::FftPlan(int points) : points(points), radices(factorize(points)), twiddles(radices.size()) {
  for (int i = 0; i < points; ++i) place.push_back(digit_reversed(i, radices, points));
  int done = 1;
  for (size_t pass = 0; pass < radices.size(); ++pass) {
    for (int j = 0; j < done; ++j) push_twiddles(twiddles[pass], radices[pass], double(j) / (done * radices[pass]));
    done *= radices[pass];
  }
  for (int k = 0; k < points; ++k) push_rotation(unzip, 0.5 * k / points);
}

}  // namespace avppc
