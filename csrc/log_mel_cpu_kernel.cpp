// Log-mel of a group of frames, frames side by side in the vector lanes: every step handles CPU_LANES frames at once and
// needs no shuffles but the two transpositions at its ends.
//
//   samples --transpose, window--> work [fft_size][lanes] --FFT in place--> spectrum --> power [bins][lanes]
//           --sparse mel, log--> [bands][lanes] --transpose--> out [frames][bands]
//
// The work buffer of a 512-point transform with 16 lanes is 32 KiB and stays in the first-level cache.
#include "log_mel_cpu_kernel.h"

#include "fft_lanes.h"
#include "log_mel_index.h"

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

// --- transposition ---------------------------------------------------------------------------------------------------

inline vfloat interleave_low(vfloat a, vfloat b) {
#if defined(AVPPC_CPU_LEVEL_avx512)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(AVPPC_CPU_LEVEL_avx2)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

inline vfloat interleave_high(vfloat a, vfloat b) {
#if defined(AVPPC_CPU_LEVEL_avx512)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(AVPPC_CPU_LEVEL_avx2)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// log2(L) perfect shuffles of L * L values transpose them.
inline void transpose(vfloat (&rows)[L]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    vfloat shuffled[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + L / 2]);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = shuffled[i];
  }
}

// --- the steps -------------------------------------------------------------------------------------------------------

// Sample i of L frames, stride apart -> work at place[i], where the transform wants it; zero behind the window.
void gather_frames(const LogMelPlan& plan, const float* samples, int64_t stride, float* work) {
  const bool later = plan.remove_dc || plan.preemphasis != 0.0f;  // the window comes after these
  for (int begin = 0; begin < plan.window_samples; begin += L) {
    vfloat rows[L];
#pragma GCC unroll 16
    for (int frame = 0; frame < L; ++frame) rows[frame] = load(samples + frame * stride + begin);
    transpose(rows);
    const int count = plan.window_samples - begin < L ? plan.window_samples - begin : L;
    if (count == L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        store(work + L * plan.place[begin + i], later ? rows[i] : rows[i] * plan.window[begin + i]);
      }
    } else {
      alignas(64) float block[L * L];
      for (int i = 0; i < L; ++i) store(block + L * i, rows[i]);
      for (int i = 0; i < count; ++i) {
        const vfloat row = load(block + L * i);
        store(work + L * plan.place[begin + i], later ? row : row * plan.window[begin + i]);
      }
    }
  }
  for (int i = plan.window_samples; i < 2 * plan.points; ++i) store(work + L * plan.place[i], vfloat{});
}

// Mean removal, preemphasis and window, in place.
void condition_frames(const LogMelPlan& plan, float* work) {
  vfloat mean{};
  if (plan.remove_dc) {
    for (int begin = 0; begin < plan.window_samples; begin += 16) {  // sums of sums: a twentieth of the rounding error
      vfloat part{};
      for (int i = begin; i < begin + 16 && i < plan.window_samples; ++i) part += load(work + L * plan.place[i]);
      mean += part;
    }
    mean /= static_cast<float>(plan.window_samples);
  }
  vfloat current = load(work + L * plan.place[plan.window_samples - 1]) - mean;
  for (int i = plan.window_samples - 1; i >= 0; --i) {
    const vfloat previous = i > 0 ? load(work + L * plan.place[i - 1]) - mean : current;
    store(work + L * plan.place[i], (current - previous * plan.preemphasis) * plan.window[i]);
    current = previous;
  }
}

void transform(const LogMelPlan& plan, float* work) {
  int done = 1;
  for (int pass = 0; pass < plan.passes; ++pass) {
    switch (plan.radix[pass]) {
      case 2: fft_pass<2>(work, plan.points, done, plan.twiddles[pass]); break;
      case 3: fft_pass<3>(work, plan.points, done, plan.twiddles[pass]); break;
      case 4: fft_pass<4>(work, plan.points, done, plan.twiddles[pass]); break;
      case 5: fft_pass<5>(work, plan.points, done, plan.twiddles[pass]); break;
      default: fft_pass<8>(work, plan.points, done, plan.twiddles[pass]);
    }
    done *= plan.radix[pass];
  }
}

inline vfloat magnitude_if(bool magnitude, vfloat power) {
  if (magnitude) {
    for (int lane = 0; lane < L; ++lane) power[lane] = __builtin_sqrtf(power[lane]);
  }
  return power;
}

// The transform Z of (even samples) + i (odd samples), halved -> power of bin k of the real signal at work[2 k L ...]:
//   X[k] = Z[k] + conj Z[P - k] - i w^k (Z[k] - conj Z[P - k]),  X[P - k] = the conjugate of that with + i
void unzip_power(const LogMelPlan& plan, float* work) {
  const int points = plan.points;
  const Complex zero = {load(work) * 2.0f, load(work + L) * 2.0f};
  const vfloat constant = zero.re + zero.im, nyquist = zero.re - zero.im;
  store(work, magnitude_if(plan.magnitude, constant * constant));
  store(work + int64_t{2} * L * points, magnitude_if(plan.magnitude, nyquist * nyquist));
  for (int k = 1; k <= points / 2; ++k) {
    float* low = work + int64_t{2} * L * k;
    float* high = work + int64_t{2} * L * (points - k);
    const Complex a = {load(low), load(low + L)}, b = {load(high), -load(high + L)};
    const Complex even = a + b, odd = times(times_minus_i(a - b), plan.unzip[2 * k], plan.unzip[2 * k + 1]);
    const Complex first = even + odd, second = even - odd;
    store(low, magnitude_if(plan.magnitude, first.re * first.re + first.im * first.im));
    store(high, magnitude_if(plan.magnitude, second.re * second.re + second.im * second.im));
  }
}

// ln of positive normal numbers, infinity and NaN, within 1e-7 of the larger of 1 and the result.
inline vfloat log_positive(vfloat x) {
  const vint bits = reinterpret_cast<vint>(x);
  const vint exponent = (bits - 0x3f3504f3) >> 23;  // x = 2^exponent * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
  const vfloat f = reinterpret_cast<vfloat>(bits - (exponent << 23)) - 1.0f;
  // Minimax fit of (ln(1 + f) - f + f^2 / 2) / f^3, error 6e-9 of ln(1 + f).
  vfloat p = f * -0.0763440201f + 0.1276148171f;
  p = p * f - 0.1316017376f;
  p = p * f + 0.1420177172f;
  p = p * f - 0.1662335981f;
  p = p * f + 0.2000122634f;
  p = p * f - 0.2500082094f;
  p = p * f + 0.3333333171f;
  const vfloat e = __builtin_convertvector(exponent, vfloat);
  const vfloat square = f * f;
  const vfloat small = (p * f - 0.5f) * square + e * -2.12194440e-4f;  // ln 2 in two parts: 0.693359375 - 2.12e-4
  const vfloat result = e * 0.693359375f + (f + small);
  return x <= 3.4028234664e38f ? result : x;  // infinity and NaN stay
}

// Power at work[2 k L ...] -> mel bands, the logarithm of each, at mel[band L ...]. Returns the largest of each lane.
vfloat mel_logs(const LogMelPlan& plan, const float* work, float* mel) {
  vfloat largest = vfloat{} - __builtin_inff();
  for (int band = 0; band < plan.bands; ++band) {
    const float* power = work + int64_t{2} * L * plan.mel_begin[band];
    const float* weights = plan.mel_weights + plan.mel_offset[band];
    vfloat value{};
    for (int i = 0; i < plan.mel_count[band]; ++i) value += load(power + int64_t{2} * L * i) * weights[i];
    if (plan.take_log) {
      value += plan.log_offset;
      value = value < plan.log_floor ? vfloat{} + plan.log_floor : value;  // NaN stays
      value = log_positive(value) * plan.log_scale;
    }
    largest = value > largest || value != value ? value : largest;
    store(mel + L * band, value * plan.output_scale + plan.output_shift);
  }
  return largest;
}

// [bands][L] -> out [frames][bands]
void scatter_bands(const float* mel, int bands, int frames, float* out) {
  for (int begin = 0; begin < bands; begin += L) {
    vfloat rows[L];
    const int count = bands - begin < L ? bands - begin : L;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = load(mel + L * (begin + i));
    transpose(rows);
    alignas(64) float block[L * L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(block + L * i, rows[i]);
    for (int frame = 0; frame < frames; ++frame) {
      float* target = out + int64_t{frame} * bands + begin;
      if (count == L) {
        store(target, load(block + L * frame));
      } else {
        for (int i = 0; i < count; ++i) target[i] = block[L * frame + i];
      }
    }
  }
}

}  // namespace

float log_mel_group(const LogMelPlan& plan, const float* samples, int64_t stride, int frames, float* work, float* out) {
  float* mel = work + int64_t{L} * (2 * plan.points + 2);
  float largest = -__builtin_inff();
  for (int begin = 0; begin < frames; begin += L) {
    const int count = frames - begin < L ? frames - begin : L;
    gather_frames(plan, samples + begin * stride, stride, work);
    if (plan.remove_dc || plan.preemphasis != 0.0f) condition_frames(plan, work);
    transform(plan, work);
    unzip_power(plan, work);
    const vfloat lanes = mel_logs(plan, work, mel);
    for (int lane = 0; lane < count; ++lane) {
      if (lanes[lane] > largest || lanes[lane] != lanes[lane]) largest = lanes[lane];
    }
    scatter_bands(mel, plan.bands, count, out + int64_t{begin} * plan.bands);
  }
  return largest;
}

void load_samples(const SampleSource& source, int64_t begin, int64_t count, float* out) {
  const float* floats = static_cast<const float*>(source.clip);
  const int16_t* integers = static_cast<const int16_t*>(source.clip);
  const auto sample = [&](int64_t i) { return source.is_int16 ? integers[i] * INT16_SCALE : floats[i]; };
  // Inside the clip, with a sample before for the preemphasis, nothing needs a look at each index.
  const int64_t inner = begin > 0 ? 0 : 1 - begin;
  const int64_t first = inner < count ? inner : count;
  const int64_t left = source.length - begin < count ? source.length - begin : count;
  const int64_t last = left > first ? left : first;
  const auto edge = [&](int64_t i) {
    const int64_t at = source_sample(begin + i, source.length, source.reflect);
    if (at < 0) return 0.0f;
    return at > 0 && source.preemphasis != 0.0f ? sample(at) - source.preemphasis * sample(at - 1) : sample(at);
  };
  for (int64_t i = 0; i < first; ++i) out[i] = edge(i);
  if (source.preemphasis != 0.0f) {
    for (int64_t i = first; i < last; ++i) out[i] = sample(begin + i) - source.preemphasis * sample(begin + i - 1);
  } else if (source.is_int16) {
    for (int64_t i = first; i < last; ++i) out[i] = integers[begin + i] * INT16_SCALE;
  } else if (last > first) {
    __builtin_memcpy(out + first, floats + begin + first, sizeof(float) * (last - first));
  }
  for (int64_t i = last; i < count; ++i) out[i] = edge(i);
}

}  // namespace avppc::AVPPC_CPU_NAMESPACE
