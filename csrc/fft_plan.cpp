#include "fft_plan.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

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

using Values = std::vector<std::complex<double>>;

Values transformed(const Values& values) {  // for tables: short, not fast
  const size_t points = values.size();
  size_t radix = 2;
  while (points % radix != 0 && radix < points) ++radix;
  if (points < 2) return values;
  std::vector<Values> parts(radix);
  for (size_t i = 0; i < points; ++i) parts[i % radix].push_back(values[i]);
  for (Values& part : parts) part = transformed(part);
  Values result(points);
  for (size_t k = 0; k < points; ++k) {
    for (size_t i = 0; i < radix; ++i) {
      const double turns = double(i * k % points) / double(points);
      result[k] += parts[i][k % (points / radix)] * std::polar(1.0, -2.0 * PI * turns);
    }
  }
  return result;
}

// The least multiple of 8, which is fast, that has a plan and room for the convolution.
int chirp_points(int points) {
  int longer = std::max(8, (2 * points - 1 + 7) / 8 * 8);
  while (!has_fft_plan(longer)) longer += 8;
  return longer;
}

}  // namespace

bool has_fft_plan(int points) {
  if (points < 6) return false;
  for (const int factor : {2, 3, 5}) {
    while (points % factor == 0) points /= factor;
  }
  return points == 1;
}

std::vector<double> make_unzip(int points) {
  std::vector<double> unzip;
  for (int k = 0; k < points; ++k) push_rotation(unzip, 0.5 * k / points);
  return unzip;
}

FftPlan::FftPlan(int points) : points(points) {
  if (!has_fft_plan(points)) throw std::invalid_argument("no transform of " + std::to_string(points) + " points");
  radices = factorize(points);
  twiddles.resize(radices.size());
  for (int i = 0; i < points; ++i) place.push_back(digit_reversed(i, radices, points));
  int done = 1;
  for (size_t pass = 0; pass < radices.size(); ++pass) {
    for (int j = 0; j < done; ++j) push_twiddles(twiddles[pass], radices[pass], double(j) / (done * radices[pass]));
    done *= radices[pass];
  }
}

FftChirpPlan::FftChirpPlan(int points) : fft(chirp_points(points)) {
  Values conjugate(fft.points);
  for (int k = 0; k < points; ++k) {
    const int64_t square = int64_t{k} * k % (2 * points);  // turns repeat: the angle keeps its last digits
    const double angle = PI * static_cast<double>(square) / points;
    chirp.push_back(std::cos(angle));
    chirp.push_back(-std::sin(angle));
    conjugate[k] = conjugate[(fft.points - k) % fft.points] = std::polar(1.0, angle);
  }
  for (const std::complex<double>& value : transformed(conjugate)) {
    spectrum.push_back(value.real() / fft.points);
    spectrum.push_back(value.imag() / fft.points);
  }
}

}  // namespace avppc
