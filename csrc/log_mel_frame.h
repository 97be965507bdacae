// One frame of log_mel on a GPU, by the lanes of a warp (log_mel_block.h says how a block cuts its frames up). Each
// method is a step for one lane; the caller makes the lanes wait between two steps.
#pragma once

#include <math.h>

#include "fft_butterfly.h"

#if defined(__CUDACC__)
#define AVPPC_DEVICE __device__
#else
#define AVPPC_DEVICE
#endif

namespace avppc {

constexpr int LOG_MEL_WARP = 32;

// Tables, and what a frame's features are made of.
template <typename Real>
struct LogMelTables {
  int window_samples, bands, points, passes;
  int radix[16];
  const Real* twiddles[16];
  const Real *unzip, *window;                     // [points, 2], [window_samples] times 1/2
  const int* first_pair;                          // [points / radix[0]] first value of each butterfly of the first pass
  const int *mel_begin, *mel_count, *mel_offset;  // [bands]
  const float *mel_weights;                       // of all bands, one after the other
  Real preemphasis;                               // within the frame
  bool remove_dc, magnitude, take_log, track_largest;
  float log_offset, log_floor, output_scale, output_shift;
};

// Shared memory has 32 banks: values that stand 8 apart would share one.
AVPPC_INLINE int log_mel_padded(int i) { return i + i / 8; }

AVPPC_INLINE float larger_or_nan(float a, float b) { return b > a || b != b ? b : a; }

// One frame, by the lanes of a warp.
template <typename Real>
struct LogMelFrame {
  const LogMelTables<Real>& t;
  const float* samples;   // [window_samples]
  Complex<Real>* values;  // [points], padded
  Real* sums;             // [32]
  float* power;           // [points + 1]

  AVPPC_DEVICE void sum_samples(int lane) const {
    Real sum = 0;
    for (int i = lane; i < t.window_samples; i += LOG_MEL_WARP) sum += samples[i];
    sums[lane] = sum;
  }

  AVPPC_DEVICE Real mean() const {
    if (!t.remove_dc) return 0;
    Real sum = 0;
    for (int lane = 0; lane < LOG_MEL_WARP; ++lane) sum += sums[lane];
    return sum / t.window_samples;
  }

  AVPPC_DEVICE Real windowed(int i, Real mean) const {
    if (i >= t.window_samples) return 0;
    Real value = samples[i] - mean;
    if (t.preemphasis != 0) value -= t.preemphasis * (samples[i > 0 ? i - 1 : 0] - mean);
    return value * t.window[i];
  }

  template <int R>
  AVPPC_DEVICE void first_pass(int lane) const {
    const int butterflies = t.points / R;
    const Real average = mean();
    for (int b = lane; b < butterflies; b += LOG_MEL_WARP) {
      Complex<Real> x[R];
      AVPPC_UNROLL
      for (int k = 0; k < R; ++k) {
        const int i = 2 * (t.first_pair[b] + k * butterflies);
        x[k] = {windowed(i, average), windowed(i + 1, average)};
      }
      Butterfly<R, Real>::plain(x);
      AVPPC_UNROLL
      for (int k = 0; k < R; ++k) values[log_mel_padded(b * R + k)] = x[k];
    }
  }

  template <int R>
  AVPPC_DEVICE void pass(int lane, int done, const Real* twiddles) const {
    constexpr int rotations = Butterfly<R, Real>::ROTATIONS;
    for (int b = lane; b < t.points / R; b += LOG_MEL_WARP) {
      const int j = b % done, first = b / done * done * R + j;
      Rotations<rotations, Real> w;
      AVPPC_UNROLL
      for (int i = 0; i < rotations; ++i) {
        w.cosine[i] = twiddles[2 * (rotations * j + i)];
        w.tangent[i] = twiddles[2 * (rotations * j + i) + 1];
      }
      Complex<Real> x[R];
      AVPPC_UNROLL
      for (int k = 0; k < R; ++k) x[k] = values[log_mel_padded(first + k * done)];
      Butterfly<R, Real>::twiddled(x, w);
      AVPPC_UNROLL
      for (int k = 0; k < R; ++k) values[log_mel_padded(first + k * done)] = x[k];
    }
  }

  AVPPC_DEVICE void run_first_pass(int lane) const {
    switch (t.radix[0]) {
      case 2: return first_pass<2>(lane);
      case 3: return first_pass<3>(lane);
      case 4: return first_pass<4>(lane);
      case 5: return first_pass<5>(lane);
      default: return first_pass<8>(lane);
    }
  }

  AVPPC_DEVICE void run_pass(int lane, int number, int done) const {
    switch (t.radix[number]) {
      case 2: return pass<2>(lane, done, t.twiddles[number]);
      case 3: return pass<3>(lane, done, t.twiddles[number]);
      case 4: return pass<4>(lane, done, t.twiddles[number]);
      case 5: return pass<5>(lane, done, t.twiddles[number]);
      default: return pass<8>(lane, done, t.twiddles[number]);
    }
  }

  AVPPC_DEVICE void put_power(int bin, Complex<Real> value) const {
    const float result = static_cast<float>(value.re * value.re + value.im * value.im);
    power[bin] = t.magnitude ? sqrtf(result) : result;
  }

  // From the transform Z of (even samples) + i (odd samples), halved:
  //   X[k] = Z[k] + conj Z[P - k] - i w^k (Z[k] - conj Z[P - k]),  X[P - k] = the conjugate of that with + i
  AVPPC_DEVICE void unzip_power(int lane) const {
    for (int k = lane; k <= t.points / 2; k += LOG_MEL_WARP) {
      const Complex<Real> a = values[log_mel_padded(k)];
      if (k == 0) {
        put_power(0, {2 * (a.re + a.im), Real(0)});
        put_power(t.points, {2 * (a.re - a.im), Real(0)});
        continue;
      }
      const Complex<Real> b = values[log_mel_padded(t.points - k)];
      Complex<Real> first = {a.re + b.re, a.im - b.im}, second = {a.re - b.re, a.im + b.im};
      combine_minus_i(first, second, t.unzip[2 * k], t.unzip[2 * k + 1]);
      put_power(k, first);
      put_power(t.points - k, second);
    }
  }

  // Writes out [bands], returns the largest of largest and the values written.
  AVPPC_DEVICE float mel_logs(int lane, float* out, float largest) const {
    for (int band = lane; band < t.bands; band += LOG_MEL_WARP) {
      const float* bins = power + t.mel_begin[band];
      const float* weights = t.mel_weights + t.mel_offset[band];
      float value = 0;
      for (int i = 0; i < t.mel_count[band]; ++i) value += bins[i] * weights[i];
      if (t.take_log) {
        value += t.log_offset;
        value = value < t.log_floor ? t.log_floor : value;  // NaN stays
        value = logf(value);
      }
      value = value * t.output_scale + t.output_shift;
      out[band] = value;
      largest = larger_or_nan(largest, value);
    }
    return largest;
  }
};

}  // namespace avppc
