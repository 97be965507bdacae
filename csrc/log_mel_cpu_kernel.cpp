// Log-mel of a group of frames, frames side by side in the vector lanes: every step handles a register full of frames
// at once and needs no shuffles but the two transpositions at its ends.
//
//   samples --transpose--> rows --window, FFT in place--> spectrum --> power [bins][16]
//           --sparse mel, log--> [bands][lanes] --transpose--> out [frames][bands]
//
// Rows: consecutive frames share most of their samples, so each is transposed only once: with h = stride,
//   row p (p < h) = samples p, h + p, 2 h + p, ...; sample i of frames 0, 1, ... is row i % h from column i / h on.
#include "log_mel_cpu_kernel.h"

#include "fft_chirp_lanes.h"
#include "fft_lanes.h"
#include "log_mel_index.h"
#include "rounding.h"

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

constexpr int L = CPU_LANES;
constexpr int G = LOG_MEL_GROUP;

AVPPC_INLINE vfloat interleave_low(vfloat a, vfloat b) {
#if defined(AVPPC_CPU_LEVEL_avx512)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(AVPPC_CPU_LEVEL_avx2)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

AVPPC_INLINE vfloat interleave_high(vfloat a, vfloat b) {
#if defined(AVPPC_CPU_LEVEL_avx512)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(AVPPC_CPU_LEVEL_avx2)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// log2(L) perfect shuffles of L * L values transpose them.
AVPPC_INLINE void transpose(vfloat (&rows)[L]) {
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

// Each sample of the group once, as the rows described above.
void fill_rows(const LogMelPlan& plan, const float* samples, float* rows) {
  const int width = plan.row_width, count = plan.row_count - 1;
  for (int begin = 0; begin < count; begin += L) {
    for (int column = 0; column < G; column += L) {
      vfloat block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = load<vfloat>(samples + (column + i) * plan.stride + begin);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(rows + (begin + i) * width + column, block[i]);
    }
  }
  // What the last frames have beyond the first sample of frame G.
  for (int column = G; column < width; ++column) {
    const float* source = samples + column * plan.stride;
    const int64_t left = plan.window_samples - (column - G + 1) * plan.stride;
    for (int i = 0; i < (left < count ? left : count); ++i) rows[i * width + column] = source[i];
  }
}

// What the first pass reads: samples times window straight from the rows ...
struct RowSource {
  const float* rows;
  const int* slot_row;
  const double* slot_window;
  AVPPC_INLINE vdouble operator[](int i) const { return widen(load<vhalf>(rows + slot_row[i])) * slot_window[i]; }
  AVPPC_INLINE void skip(int count) {
    slot_row += count;
    slot_window += count;
  }
};

// ... or conditioned ones.
struct ConditionedSource {
  const double* samples;
  const int* slot_sample;
  AVPPC_INLINE vdouble operator[](int i) const { return load<vdouble>(samples + D * slot_sample[i]); }
  AVPPC_INLINE void skip(int count) { slot_sample += count; }
};

// Mean removal, preemphasis and window of D frames.
void condition(const LogMelPlan& plan, const float* rows, double* conditioned) {
  const int stride = static_cast<int>(plan.stride), width = plan.row_width;
  vdouble mean{};
  if (plan.remove_dc) {
    vdouble sums[4] = {};  // not one chain of additions
    for (int begin = 0; begin < plan.window_samples; begin += stride) {
      const int count = plan.window_samples - begin < stride ? plan.window_samples - begin : stride;
      const float* column = rows + begin / stride;
      for (int i = 0; i < count; ++i) sums[i % 4] += widen(load<vhalf>(column + i * width));
    }
    mean = (sums[0] + sums[1] + (sums[2] + sums[3])) / static_cast<double>(plan.window_samples);
  }
  vdouble previous = widen(load<vhalf>(rows)) - mean;
  for (int begin = 0; begin < plan.window_samples; begin += stride) {
    const int count = plan.window_samples - begin < stride ? plan.window_samples - begin : stride;
    const float* column = rows + begin / stride;
    for (int i = 0; i < count; ++i) {
      const vdouble current = widen(load<vhalf>(column + i * width)) - mean;
      store(conditioned + D * (begin + i), (current - previous * plan.preemphasis) * plan.window[begin + i]);
      previous = current;
    }
  }
}

// power[k G ...] from the transform Z of (even samples) + i (odd samples), halved:
//   X[k] = Z[k] + conj Z[P - k] - i w^k (Z[k] - conj Z[P - k]),  X[P - k] = the conjugate of that with + i
template <bool magnitude>
struct PowerOfReal {
  float* power;
  const double* rotations;
  int points;

  AVPPC_INLINE void put(int bin, Complex<vdouble> value) const {
    vhalf result = narrow(value.re * value.re + value.im * value.im);
    if (magnitude) {
      for (int lane = 0; lane < D; ++lane) result[lane] = __builtin_sqrtf(result[lane]);
    }
    store(power + int64_t{bin} * G, result);
  }
  AVPPC_INLINE void operator()(int, Complex<vdouble> zero) const {
    put(0, {(zero.re + zero.im) * 2.0, vdouble{}});
    put(points, {(zero.re - zero.im) * 2.0, vdouble{}});
  }
  AVPPC_INLINE void operator()(int k, Complex<vdouble> value, int partner, Complex<vdouble> partner_value) const {
    const Complex<vdouble> conjugate = {partner_value.re, -partner_value.im};
    Complex<vdouble> first = value + conjugate, second = value - conjugate;
    combine_minus_i(first, second, broadcast(rotations[2 * k]), broadcast(rotations[2 * k + 1]));
    put(k, first);
    put(partner, second);
  }
};

// Brings a LogMelAhead into the cache in so many steps.
class Fetcher {
 public:
  Fetcher(const LogMelAhead& ahead, int64_t steps)
      : left_(ahead),
        read_step_(LINE * ceil_div(ahead.read_end - ahead.read, LINE * steps)),
        write_step_(LINE * ceil_div(ahead.write_end - ahead.write, LINE * steps)) {}

  void step() {
    const char* const read_end = left_.read_end - left_.read < read_step_ ? left_.read_end : left_.read + read_step_;
    for (; left_.read < read_end; left_.read += LINE) __builtin_prefetch(left_.read);
    char* const write_end = left_.write_end - left_.write < write_step_ ? left_.write_end : left_.write + write_step_;
    for (; left_.write < write_end; left_.write += LINE) __builtin_prefetch(left_.write, 1);
  }

 private:
  static constexpr int64_t LINE = 64;  // bytes

  LogMelAhead left_;
  int64_t read_step_, write_step_;
};

// Transform and power of D frames.
template <bool magnitude, typename Source>
void transform(const LogMelPlan& plan, const Source& source, const LogMelWork& work, float* power, Fetcher& fetcher) {
  const PowerOfReal<magnitude> use{power, plan.unzip, plan.points};
  fft_transform(plan.fft, source, plan.live, work.spectrum, fetcher, use);
}

// The same by a chirp, from the conditioned samples.
template <bool magnitude>
void chirp_transform(const LogMelPlan& plan, const LogMelWork& work, float* power, Fetcher& fetcher) {
  const ChirpSource<ConditionedSource> source{{work.conditioned, plan.slot_sample}, plan.chirp.slots};
  fft_by_chirp(plan.fft, plan.chirp, plan.points, source, plan.live, work.spectrum, work.product, fetcher);
  const PowerOfReal<magnitude> use{power, plan.unzip, plan.points};
  const auto value = [&](int k) {
    const double* at = work.product + int64_t{2} * D * k;
    return Complex<vdouble>{load<vdouble>(at), load<vdouble>(at + D)};
  };
  use(0, value(0));
  for (int k = 1; 2 * k <= plan.points; ++k) use(k, value(k), plan.points - k, value(plan.points - k));
}

// ln of positive normal numbers, infinity and NaN, within 1e-7 of the larger of 1 and the result.
AVPPC_INLINE vfloat log_positive(vfloat x) {
  const vint bits = reinterpret_cast<vint>(x);
  const vint exponent = (bits - 0x3f3504f3) >> 23;  // x = 2^exponent * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
  const vfloat f = reinterpret_cast<vfloat>(bits - (exponent << 23)) - 1.0f;
  // Minimax fit of (ln(1 + f) - f + f^2 / 2) / f^3; it errs by at most 3.2e-8 of ln(1 + f).
  vfloat p = f * 0.0870048187f - 0.1426749349f;
  p = p * f + 0.1491475878f;
  p = p * f - 0.1657758433f;
  p = p * f + 0.1996306423f;
  p = p * f - 0.2500133699f;
  p = p * f + 0.3333391074f;
  p = p * f - 0.5f;
  const vfloat fraction = p * (f * f) + f;
  const vfloat result = __builtin_convertvector(exponent, vfloat) * 0.693147180560f + fraction;
  return x <= 3.4028234664e38f ? result : x;  // infinity and NaN stay
}

// Power of L frames -> mel bands, and their scaled logarithms at mel [bands][L]. Returns the largest of each lane.
template <bool take_log, bool track_largest>
vfloat mel_logs(const LogMelPlan& plan, const float* power, float* mel) {
  vfloat largest = vfloat{} - __builtin_inff();
  const vfloat floor = vfloat{} + plan.log_floor;
  for (int band = 0; band < plan.bands; ++band) {
    const float* bins = power + int64_t{G} * plan.mel_begin[band];
    const float* weights = plan.mel_weights + plan.mel_offset[band];
    vfloat value{};
    for (int i = 0; i < plan.mel_count[band]; ++i) value += load<vfloat>(bins + int64_t{G} * i) * weights[i];
    if (take_log) {
      value += plan.log_offset;
      value = floor > value ? floor : value;  // NaN stays
      value = log_positive(value);
    }
    value = value * plan.output_scale + plan.output_shift;
    if (track_largest) largest = value > largest || value != value ? value : largest;
    store(mel + L * band, value);
  }
  return largest;
}

// [bands][L] -> out [frames][bands]
void scatter_bands(const float* mel, int bands, int frames, float* out) {
  for (int begin = 0; begin < bands; begin += L) {
    vfloat rows[L];
    const int count = bands - begin < L ? bands - begin : L;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = load<vfloat>(mel + L * (begin + i));
    transpose(rows);
    alignas(64) float block[L * L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(block + L * i, rows[i]);
    for (int frame = 0; frame < frames; ++frame) {
      float* target = out + int64_t{frame} * bands + begin;
      if (count == L) {
        store(target, load<vfloat>(block + L * frame));
      } else {
        for (int i = 0; i < count; ++i) target[i] = block[L * frame + i];
      }
    }
  }
}

}  // namespace

float log_mel_group(const LogMelPlan& plan, const float* samples, int frames, const LogMelWork& work,
                    const LogMelAhead& ahead, float* out) {
  Fetcher fetcher(ahead, ceil_div(frames, D) * plan.fft.radix[plan.fft.passes - 1] * (plan.fft.passes - 1));
  fill_rows(plan, samples, work.rows);
  for (int frame = 0; frame < frames; frame += D) {
    if (plan.chirp.slots != nullptr) {
      condition(plan, work.rows + frame, work.conditioned);
      const auto run = plan.magnitude ? chirp_transform<true> : chirp_transform<false>;
      run(plan, work, work.power + frame, fetcher);
    } else if (plan.remove_dc || plan.preemphasis != 0.0) {
      condition(plan, work.rows + frame, work.conditioned);
      const ConditionedSource source{work.conditioned, plan.slot_sample};
      const auto run = plan.magnitude ? transform<true, ConditionedSource> : transform<false, ConditionedSource>;
      run(plan, source, work, work.power + frame, fetcher);
    } else {
      const RowSource source{work.rows + frame, plan.slot_row, plan.slot_window};
      const auto run = plan.magnitude ? transform<true, RowSource> : transform<false, RowSource>;
      run(plan, source, work, work.power + frame, fetcher);
    }
  }
  const auto logs = plan.take_log ? (plan.track_largest ? mel_logs<true, true> : mel_logs<true, false>)
                                  : (plan.track_largest ? mel_logs<false, true> : mel_logs<false, false>);
  float largest = -__builtin_inff();
  for (int frame = 0; frame < frames; frame += L) {
    const int count = frames - frame < L ? frames - frame : L;
    const vfloat lanes = logs(plan, work.power + frame, work.mel);
    for (int lane = 0; lane < count; ++lane) {
      if (lanes[lane] > largest || lanes[lane] != lanes[lane]) largest = lanes[lane];
    }
    scatter_bands(work.mel, plan.bands, count, out + int64_t{frame} * plan.bands);
  }
  return largest;
}

void scale_values(float* values, int64_t count, float lowest, float reference, float scale, float shift) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i] < lowest ? lowest : values[i];
    values[i] = (value - reference) * scale + shift;
  }
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
    const int64_t at = source_sample(begin + i, source.length, source.padding);
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
