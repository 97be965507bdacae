// Complex Fourier transforms of many signals side by side: value i of every signal is one register, so a transform is plain
// scalar arithmetic on registers, in place, whatever its size. For kernel sources only (see cpu_dispatch.h).
//
//   buffer: value i of L signals = real parts at buffer[2 i L ...], imaginary parts at buffer[(2 i + 1) L ...]
//
// Decimation in time: the caller stores the input in the digit-reversed places of the plan, the output is in order.
#pragma once

#include "cpu_dispatch.h"

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

constexpr int L = CPU_LANES;

inline vfloat load(const float* source) {
  vfloat value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}

inline void store(float* target, vfloat value) { __builtin_memcpy(target, &value, sizeof(value)); }

struct Complex {
  vfloat re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(Complex a, float b) { return {a.re * b, a.im * b}; }
inline Complex times_minus_i(Complex a) { return {a.im, -a.re}; }
inline Complex times(Complex a, float re, float im) { return {a.re * re - a.im * im, a.re * im + a.im * re}; }

template <int R>
struct Butterfly;  // transforms R values in place

template <>
struct Butterfly<2> {
  static inline void apply(Complex (&x)[2]) {
    const Complex difference = x[0] - x[1];
    x[0] = x[0] + x[1];
    x[1] = difference;
  }
};

template <>
struct Butterfly<3> {
  static inline void apply(Complex (&x)[3]) {
    const Complex sum = x[1] + x[2];
    const Complex middle = x[0] - sum * 0.5f;
    const Complex side = times_minus_i((x[1] - x[2]) * 0.866025403784438647f);  // sin 60
    x[0] = x[0] + sum;
    x[1] = middle + side;
    x[2] = middle - side;
  }
};

template <>
struct Butterfly<4> {
  static inline void apply(Complex (&x)[4]) {
    const Complex even = x[0] + x[2], even_difference = x[0] - x[2];
    const Complex odd = x[1] + x[3], odd_difference = times_minus_i(x[1] - x[3]);
    x[0] = even + odd;
    x[1] = even_difference + odd_difference;
    x[2] = even - odd;
    x[3] = even_difference - odd_difference;
  }
};

template <>
struct Butterfly<5> {
  static inline void apply(Complex (&x)[5]) {
    constexpr float cos72 = 0.309016994374947424f, cos144 = -0.809016994374947424f;
    constexpr float sin72 = 0.951056516295153572f, sin144 = 0.587785252292473129f;
    const Complex sum14 = x[1] + x[4], sum23 = x[2] + x[3];
    const Complex difference14 = x[1] - x[4], difference23 = x[2] - x[3];
    const Complex middle14 = x[0] + sum14 * cos72 + sum23 * cos144;
    const Complex middle23 = x[0] + sum14 * cos144 + sum23 * cos72;
    const Complex side14 = times_minus_i(difference14 * sin72 + difference23 * sin144);
    const Complex side23 = times_minus_i(difference14 * sin144 - difference23 * sin72);
    x[0] = x[0] + sum14 + sum23;
    x[1] = middle14 + side14;
    x[4] = middle14 - side14;
    x[2] = middle23 + side23;
    x[3] = middle23 - side23;
  }
};

template <>
struct Butterfly<8> {
  static inline void apply(Complex (&x)[8]) {
    constexpr float half_root = 0.707106781186547524f;
    Complex even[4] = {x[0], x[2], x[4], x[6]}, odd[4] = {x[1], x[3], x[5], x[7]};
    Butterfly<4>::apply(even);
    Butterfly<4>::apply(odd);
    odd[1] = Complex{odd[1].re + odd[1].im, odd[1].im - odd[1].re} * half_root;
    odd[2] = times_minus_i(odd[2]);
    odd[3] = Complex{odd[3].im - odd[3].re, -odd[3].re - odd[3].im} * half_root;
    for (int k = 0; k < 4; ++k) {
      x[k] = even[k] + odd[k];
      x[k + 4] = even[k] - odd[k];
    }
  }
};

// One pass: combines R transforms of done values each into one of R * done values, for the whole buffer of points values.
template <int R>
void fft_pass(float* buffer, int points, int done, const float* twiddles) {
  for (int j = 0; j < done; ++j, twiddles += 2 * (R - 1)) {
    for (int block = 0; block < points; block += R * done) {
      float* first = buffer + int64_t{2} * L * (block + j);
      const int64_t step = int64_t{2} * L * done;
      Complex x[R];
      for (int k = 0; k < R; ++k) x[k] = {load(first + k * step), load(first + k * step + L)};
      if (j > 0) {
        for (int k = 1; k < R; ++k) x[k] = times(x[k], twiddles[2 * k - 2], twiddles[2 * k - 1]);
      }
      Butterfly<R>::apply(x);
      for (int k = 0; k < R; ++k) {
        store(first + k * step, x[k].re);
        store(first + k * step + L, x[k].im);
      }
    }
  }
}

}  // namespace
}  // namespace avppc::AVPPC_CPU_NAMESPACE
