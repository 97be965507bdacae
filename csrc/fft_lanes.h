// Complex Fourier transforms of several signals side by side: value i of every signal is one register of doubles, so a
// transform is plain scalar arithmetic on registers, in place, whatever its size. For kernel sources only
// (cpu_dispatch.h).
//
//   buffer: value i of D signals = real parts at buffer[2 i D ...], imaginary parts at buffer[(2 i + 1) D ...]
//
// Decimation in time: the first pass reads its input in digit-reversed order, the output is in order. Double
// precision, because float would leave errors at 1e-7 of a frame's loudest frequency: as loud as the quiet ones that a
// logarithm shows.
#pragma once

#include "cpu_vectors.h"
#include "fft_butterfly.h"
#include "fft_tables.h"

#if defined(AVPPC_CPU_LEVEL_avx512)
#include <immintrin.h>
#endif

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

constexpr int D = CPU_LANES / 2;  // doubles of one register

typedef double vdouble __attribute__((vector_size(D * sizeof(double))));
typedef float vhalf __attribute__((vector_size(D * sizeof(float))));

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

template <int COUNT>
AVPPC_INLINE Rotations<COUNT, vdouble> load_rotations(const double* table) {
  Rotations<COUNT, vdouble> rotations;
  AVPPC_UNROLL
  for (int i = 0; i < COUNT; ++i) {
    rotations.cosine[i] = broadcast(table[2 * i]);
    rotations.tangent[i] = broadcast(table[2 * i + 1]);
  }
  return rotations;
}

template <int R>
AVPPC_INLINE void store_all(double* first, int64_t step, const Complex<vdouble> (&x)[R]) {
  AVPPC_UNROLL
  for (int k = 0; k < R; ++k) {
    store(first + k * step, x[k].re);
    store(first + k * step + D, x[k].im);
  }
}

// R values of the first pass, of which only the first LIVE are not zero.
template <int R, int LIVE, typename Source>
AVPPC_INLINE void fft_first(const Source& source, double* target) {
  Complex<vdouble> x[R];
  AVPPC_UNROLL
  for (int k = 0; k < R; ++k) x[k] = k < LIVE ? Complex<vdouble>{source[2 * k], source[2 * k + 1]} : Complex<vdouble>{};
  Butterfly<R, vdouble>::plain(x);
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
AVPPC_INLINE void load_twiddled(Complex<vdouble> (&x)[R], const double* first, int64_t step, const double* twiddles) {
  AVPPC_UNROLL
  for (int k = 0; k < R; ++k) {
    x[k] = {in_register(load<vdouble>(first + k * step)), in_register(load<vdouble>(first + k * step + D))};
  }
  Butterfly<R, vdouble>::twiddled(x, load_rotations<Butterfly<R, vdouble>::ROTATIONS>(twiddles));
}

// A later pass: combines R transforms of done values each into one of R * done values, for the whole buffer.
template <int R>
void fft_pass(double* buffer, int points, int done, const double* twiddles) {
  const int64_t step = int64_t{2} * D * done;
  for (int block = 0; block < points; block += R * done) {
    for (int j = 0; j < done; ++j) {
      double* first = buffer + int64_t{2} * D * (block + j);
      Complex<vdouble> x[R];
      load_twiddled(x, first, step, twiddles + 2 * Butterfly<R, vdouble>::ROTATIONS * j);
      store_all(first, step, x);
    }
  }
}

// The last pass, whose results go to use(k, value) and use(k, value, points - k, value of that) instead of the buffer.
template <int R, typename Use>
void fft_last_pass(const double* buffer, int points, const double* twiddles, const Use& use) {
  const int done = points / R;
  const int64_t step = int64_t{2} * D * done;
  Complex<vdouble> x[R], y[R];
  load_twiddled(x, buffer, step, twiddles);  // 0, done, 2 done, ...: their partners are among them
  use(0, x[0]);
  for (int q = 1; q <= R / 2; ++q) use(q * done, x[q], (R - q) * done, x[R - q]);
  for (int j = 1; 2 * j <= done; ++j) {
    load_twiddled(x, buffer + int64_t{2} * D * j, step, twiddles + 2 * Butterfly<R, vdouble>::ROTATIONS * j);
    if (2 * j == done) {
      for (int q = 0; q < (R + 1) / 2; ++q) use(j + q * done, x[q], j + (R - 1 - q) * done, x[R - 1 - q]);
    } else {
      const int other = done - j;
      load_twiddled(y, buffer + int64_t{2} * D * other, step, twiddles + 2 * Butterfly<R, vdouble>::ROTATIONS * other);
      AVPPC_UNROLL
      for (int q = 0; q < R; ++q) use(j + q * done, x[q], other + (R - 1 - q) * done, y[R - 1 - q]);
    }
  }
}

template <typename Source>
void run_first_pass(int radix, const Source& source, double* part, int points, const int* live) {
  switch (radix) {
    case 2: return fft_first_pass<2>(source, part, points, live);
    case 3: return fft_first_pass<3>(source, part, points, live);
    case 4: return fft_first_pass<4>(source, part, points, live);
    case 5: return fft_first_pass<5>(source, part, points, live);
    default: return fft_first_pass<8>(source, part, points, live);
  }
}

inline void run_pass(int radix, double* part, int points, int done, const double* twiddles) {
  switch (radix) {
    case 2: return fft_pass<2>(part, points, done, twiddles);
    case 3: return fft_pass<3>(part, points, done, twiddles);
    case 4: return fft_pass<4>(part, points, done, twiddles);
    case 5: return fft_pass<5>(part, points, done, twiddles);
    default: return fft_pass<8>(part, points, done, twiddles);
  }
}

// All passes. live and source are those of the first, use that of the last; between two passes fetcher.step() may bring
// in memory that is wanted soon.
template <typename Source, typename Fetcher, typename Use>
void fft_transform(const FftTables& fft, Source source, const int* live, double* buffer, Fetcher& fetcher,
                   const Use& use) {
  const int last = fft.passes - 1;
  // The transforms that the last pass combines, one after the other: each stays in the first-level cache.
  const int part_points = fft.points / fft.radix[last];
  for (int part = 0; part < fft.radix[last]; ++part) {
    double* values = buffer + int64_t{2} * D * part * part_points;
    fetcher.step();
    run_first_pass(fft.radix[0], source, values, part_points, live);
    int done = fft.radix[0];
    for (int pass = 1; pass < last; ++pass) {
      fetcher.step();
      run_pass(fft.radix[pass], values, part_points, done, fft.twiddles[pass]);
      done *= fft.radix[pass];
    }
    source.skip(2 * part_points);
    live += part_points / fft.radix[0];
  }
  switch (fft.radix[last]) {
    case 2: return fft_last_pass<2>(buffer, fft.points, fft.twiddles[last], use);
    case 3: return fft_last_pass<3>(buffer, fft.points, fft.twiddles[last], use);
    case 4: return fft_last_pass<4>(buffer, fft.points, fft.twiddles[last], use);
    case 5: return fft_last_pass<5>(buffer, fft.points, fft.twiddles[last], use);
    default: return fft_last_pass<8>(buffer, fft.points, fft.twiddles[last], use);
  }
}

}  // namespace
}  // namespace avppc::AVPPC_CPU_NAMESPACE
