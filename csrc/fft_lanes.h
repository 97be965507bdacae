// Complex Fourier transforms of several signals side by side: value i of every signal is one register of doubles, so a
// transform is plain scalar arithmetic on registers, in place, whatever its size. For kernel sources only (cpu_dispatch.h).
//
//   buffer: value i of D signals = real parts at buffer[2 i D ...], imaginary parts at buffer[(2 i + 1) D ...]
//
// Decimation in time: the first pass reads its input in digit-reversed order, the output is in order. Double precision,
// because float would leave errors at 1e-7 of a frame's loudest frequency: as loud as the quiet ones that a logarithm shows.
//
// A rotation w = exp(i a) is stored as (cos a, tan a): a + w b and a - w b then take six fused multiply-adds. At a = 90
// degrees the tangent is 1.6e16 and the cosine its inverse, and the result is still right to the last bits.
#pragma once

#include "cpu_dispatch.h"

#if defined(AVPPC_CPU_LEVEL_avx512)
#include <immintrin.h>
#endif

// Everything here is small and must end up in one loop: values that pass through memory cost more than the arithmetic.
#define AVPPC_INLINE inline __attribute__((always_inline))

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

constexpr int D = CPU_LANES / 2;  // doubles of one register

typedef double vdouble __attribute__((vector_size(D * sizeof(double))));
typedef float vhalf __attribute__((vector_size(D * sizeof(float))));

template <typename Vector, typename Number>
AVPPC_INLINE Vector load(const Number* source) {
  Vector value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}

template <typename Vector, typename Number>
AVPPC_INLINE void store(Number* target, Vector value) {
  __builtin_memcpy(target, &value, sizeof(value));
}

// Floats to doubles and back. (Left to GCC, eight are converted in halves; its header warns of the unmasked form.)
AVPPC_INLINE vdouble widen(vhalf value) {
#if defined(AVPPC_CPU_LEVEL_avx512)
  return reinterpret_cast<vdouble>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(value)));
#else
  return __builtin_convertvector(value, vdouble);
#endif
}

AVPPC_INLINE vhalf narrow(vdouble value) {
#if defined(AVPPC_CPU_LEVEL_avx512)
  return reinterpret_cast<vhalf>(_mm512_maskz_cvtpd_ps(0xff, reinterpret_cast<__m512d>(value)));
#else
  return __builtin_convertvector(value, vhalf);
#endif
}

// A value in a register: with 32 of them, loading it again in each instruction that uses it only costs time.
AVPPC_INLINE vdouble in_register(vdouble value) {
#if defined(AVPPC_CPU_LEVEL_avx512)
  asm("" : "+v"(value));
#endif
  return value;
}

AVPPC_INLINE vdouble broadcast(double number) { return in_register(vdouble{} + number); }

struct Complex {
  vdouble re, im;
};

// Rotations by a, as many as a butterfly needs.
template <int COUNT>
struct Rotations {
  vdouble cosine[COUNT], tangent[COUNT];
  explicit AVPPC_INLINE Rotations(const double* table) {
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) {
      cosine[i] = broadcast(table[2 * i]);
      tangent[i] = broadcast(table[2 * i + 1]);
    }
  }
};

AVPPC_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
AVPPC_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
AVPPC_INLINE Complex operator*(Complex a, double b) { return {a.re * b, a.im * b}; }
AVPPC_INLINE Complex times_minus_i(Complex a) { return {a.im, -a.re}; }

// (a, b) -> (a + b, a - b)
AVPPC_INLINE void combine(Complex& a, Complex& b) {
  const Complex difference = a - b;
  a = a + b;
  b = difference;
}

// (a, b) -> (a + w b, a - w b), w = cosine (1 + i tangent)
AVPPC_INLINE void combine(Complex& a, Complex& b, vdouble cosine, vdouble tangent) {
  const Complex turned = {b.re - b.im * tangent, b.im + b.re * tangent};
  b = {a.re - turned.re * cosine, a.im - turned.im * cosine};
  a = {a.re + turned.re * cosine, a.im + turned.im * cosine};
}

// (a, b) -> (a - i b, a + i b)
AVPPC_INLINE void combine_minus_i(Complex& a, Complex& b) {
  const Complex sum = {a.re - b.im, a.im + b.re};
  a = {a.re + b.im, a.im - b.re};
  b = sum;
}

// (a, b) -> (a - i w b, a + i w b)
AVPPC_INLINE void combine_minus_i(Complex& a, Complex& b, vdouble cosine, vdouble tangent) {
  const Complex turned = {b.re - b.im * tangent, b.im + b.re * tangent};
  b = {a.re - turned.im * cosine, a.im + turned.re * cosine};
  a = {a.re + turned.im * cosine, a.im - turned.re * cosine};
}

// Butterfly<R>: transforms R values in place; twiddled: after multiplying value k by w^k, which ROTATIONS describe.
template <int R>
struct Butterfly;

template <>
struct Butterfly<2> {
  static constexpr int ROTATIONS = 1;  // w
  static AVPPC_INLINE void plain(Complex (&x)[2]) { combine(x[0], x[1]); }
  static AVPPC_INLINE void twiddled(Complex (&x)[2], const Rotations<ROTATIONS>& w) { combine(x[0], x[1], w.cosine[0], w.tangent[0]); }
};

template <>
struct Butterfly<4> {
  static constexpr int ROTATIONS = 2;  // w^2, w
  static AVPPC_INLINE void plain(Complex (&x)[4]) {
    combine(x[0], x[2]);
    combine(x[1], x[3]);
    combine(x[0], x[1]);
    combine_minus_i(x[2], x[3]);
    sort(x);
  }
  static AVPPC_INLINE void twiddled(Complex (&x)[4], const Rotations<ROTATIONS>& w) {
    combine(x[0], x[2], w.cosine[0], w.tangent[0]);
    combine(x[1], x[3], w.cosine[0], w.tangent[0]);
    combine(x[0], x[1], w.cosine[1], w.tangent[1]);
    combine_minus_i(x[2], x[3], w.cosine[1], w.tangent[1]);
    sort(x);
  }
  static AVPPC_INLINE void sort(Complex (&x)[4]) {  // 0 2 1 3 -> 0 1 2 3
    const Complex second = x[2];
    x[2] = x[1];
    x[1] = second;
  }
};

template <>
struct Butterfly<8> {
  static constexpr int ROTATIONS = 4;  // w^4, w^2, w, w exp(-i pi / 4)
  static AVPPC_INLINE void plain(Complex (&x)[8]) {
    const vdouble half_root = vdouble{} + 0.707106781186547524, minus_one = vdouble{} - 1.0;  // tangent of -45 degrees
    for (int k = 0; k < 4; ++k) combine(x[k], x[k + 4]);
    combine(x[0], x[2]);
    combine(x[1], x[3]);
    combine_minus_i(x[4], x[6]);
    combine_minus_i(x[5], x[7]);
    combine(x[0], x[1]);
    combine_minus_i(x[2], x[3]);
    combine(x[4], x[5], half_root, minus_one);
    combine_minus_i(x[6], x[7], half_root, minus_one);
    sort(x);
  }
  static AVPPC_INLINE void twiddled(Complex (&x)[8], const Rotations<ROTATIONS>& w) {
    for (int k = 0; k < 4; ++k) combine(x[k], x[k + 4], w.cosine[0], w.tangent[0]);
    combine(x[0], x[2], w.cosine[1], w.tangent[1]);
    combine(x[1], x[3], w.cosine[1], w.tangent[1]);
    combine_minus_i(x[4], x[6], w.cosine[1], w.tangent[1]);
    combine_minus_i(x[5], x[7], w.cosine[1], w.tangent[1]);
    combine(x[0], x[1], w.cosine[2], w.tangent[2]);
    combine_minus_i(x[2], x[3], w.cosine[2], w.tangent[2]);
    combine(x[4], x[5], w.cosine[3], w.tangent[3]);
    combine_minus_i(x[6], x[7], w.cosine[3], w.tangent[3]);
    sort(x);
  }
  static AVPPC_INLINE void sort(Complex (&x)[8]) {  // 0 4 2 6 1 5 3 7 -> 0 ... 7
    const Complex first = x[1], third = x[3];
    x[1] = x[4];
    x[4] = first;
    x[3] = x[6];
    x[6] = third;
  }
};

template <int R>
AVPPC_INLINE void multiply_powers(Complex (&x)[R], const Rotations<R - 1>& w) {
#pragma GCC unroll 8
  for (int k = 1; k < R; ++k) {
    const vdouble cosine = w.cosine[k - 1], sine = w.tangent[k - 1];
    x[k] = {x[k].re * cosine - x[k].im * sine, x[k].re * sine + x[k].im * cosine};
  }
}

template <>
struct Butterfly<3> {
  static constexpr int ROTATIONS = 2;  // w, w^2, each as cosine and sine
  static AVPPC_INLINE void plain(Complex (&x)[3]) {
    const Complex sum = x[1] + x[2];
    const Complex middle = x[0] - sum * 0.5;
    const Complex side = times_minus_i((x[1] - x[2]) * 0.866025403784438647);  // sin 60
    x[0] = x[0] + sum;
    x[1] = middle + side;
    x[2] = middle - side;
  }
  static AVPPC_INLINE void twiddled(Complex (&x)[3], const Rotations<ROTATIONS>& w) {
    multiply_powers(x, w);
    plain(x);
  }
};

template <>
struct Butterfly<5> {
  static constexpr int ROTATIONS = 4;  // w ... w^4, each as cosine and sine
  static AVPPC_INLINE void plain(Complex (&x)[5]) {
    constexpr double cos72 = 0.309016994374947424, cos144 = -0.809016994374947424;
    constexpr double sin72 = 0.951056516295153572, sin144 = 0.587785252292473129;
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
  static AVPPC_INLINE void twiddled(Complex (&x)[5], const Rotations<ROTATIONS>& w) {
    multiply_powers(x, w);
    plain(x);
  }
};

template <int R>
AVPPC_INLINE void store_all(double* first, int64_t step, const Complex (&x)[R]) {
#pragma GCC unroll 8
  for (int k = 0; k < R; ++k) {
    store(first + k * step, x[k].re);
    store(first + k * step + D, x[k].im);
  }
}

// R values of the first pass, of which only the first LIVE are not zero.
template <int R, int LIVE, typename Source>
AVPPC_INLINE void fft_first(const Source& source, double* target) {
  Complex x[R];
#pragma GCC unroll 8
  for (int k = 0; k < R; ++k) x[k] = k < LIVE ? Complex{source[2 * k], source[2 * k + 1]} : Complex{};
  Butterfly<R>::plain(x);
  store_all(target, 2 * D, x);
}

// The first pass: source[2 i] and source[2 i + 1] are the real and the imaginary part of what belongs to place i;
// source.skip(n) goes n numbers on. live[b] of the b-th R values are not zero.
template <int R, typename Source>
void fft_first_pass(Source source, double* buffer, int points, const int* live) {
  for (int block = 0; block < points; block += R) {
    if (*live <= R / 2) {
      fft_first<R, (R + 1) / 2>(source, buffer);
    } else if (*live <= R * 3 / 4) {
      fft_first<R, R * 3 / 4>(source, buffer);
    } else {
      fft_first<R, R>(source, buffer);
    }
    source.skip(2 * R);
    buffer += 2 * D * R;
    ++live;
  }
}

// Values first, first + step, ... of the buffer, R of them, transformed.
template <int R>
AVPPC_INLINE void load_twiddled(Complex (&x)[R], const double* first, int64_t step, const double* twiddles) {
#pragma GCC unroll 8
  for (int k = 0; k < R; ++k) {
    x[k] = {in_register(load<vdouble>(first + k * step)), in_register(load<vdouble>(first + k * step + D))};
  }
  Butterfly<R>::twiddled(x, Rotations<Butterfly<R>::ROTATIONS>(twiddles));
}

// A later pass: combines R transforms of done values each into one of R * done values, for the whole buffer.
template <int R>
void fft_pass(double* buffer, int points, int done, const double* twiddles) {
  const int64_t step = int64_t{2} * D * done;
  for (int block = 0; block < points; block += R * done) {
    for (int j = 0; j < done; ++j) {
      double* first = buffer + int64_t{2} * D * (block + j);
      Complex x[R];
      load_twiddled(x, first, step, twiddles + 2 * Butterfly<R>::ROTATIONS * j);
      store_all(first, step, x);
    }
  }
}

// The last pass, whose results go to use(k, value) and use(k, value, points - k, value of that) instead of the buffer.
template <int R, typename Use>
void fft_last_pass(const double* buffer, int points, const double* twiddles, const Use& use) {
  const int done = points / R;
  const int64_t step = int64_t{2} * D * done;
  Complex x[R], y[R];
  load_twiddled(x, buffer, step, twiddles);  // 0, done, 2 done, ...: their partners are among them
  use(0, x[0]);
  for (int q = 1; q <= R / 2; ++q) use(q * done, x[q], (R - q) * done, x[R - q]);
  for (int j = 1; 2 * j <= done; ++j) {
    load_twiddled(x, buffer + int64_t{2} * D * j, step, twiddles + 2 * Butterfly<R>::ROTATIONS * j);
    if (2 * j == done) {
      for (int q = 0; q < (R + 1) / 2; ++q) use(j + q * done, x[q], j + (R - 1 - q) * done, x[R - 1 - q]);
    } else {
      const int other = done - j;
      load_twiddled(y, buffer + int64_t{2} * D * other, step, twiddles + 2 * Butterfly<R>::ROTATIONS * other);
#pragma GCC unroll 8
      for (int q = 0; q < R; ++q) use(j + q * done, x[q], other + (R - 1 - q) * done, y[R - 1 - q]);
    }
  }
}

}  // namespace
}  // namespace avppc::AVPPC_CPU_NAMESPACE
