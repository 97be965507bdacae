// What a block of threads does for log_mel on a GPU. Written against a `Threads` that runs a step for every thread and
// then makes all of them wait, so that a plain C++ compiler can run it, too: one thread after the other, step by step.
//
//   block = a chunk of CHUNK frames of one clip (or all chunks of a short clip whose features need all its frames)
//   1. its samples -> shared memory, with padding and preemphasis of the signal, each once
//   2. a warp a frame: window and transform in place (values), power, sparse mel bands, logarithm
//   3. short clips: what needs all frames (dynamic range, cosine transform, normalisation), before the only write
// Long clips: a second kernel does 3, from the maxima of the chunks. No atomics: results repeat bit for bit.
#pragma once

#include <math.h>

#include "log_mel_frame.h"
#include "log_mel_index.h"
#include "rounding.h"

namespace avppc {

constexpr int LOG_MEL_PARTS = 4;  // of the frames, in each sum over a clip

// What needs all frames of a clip.
struct LogMelFinish {
  bool needed, has_range, relative, normalize;
  int bands, mfcc, features;
  float range, scale, shift;
  float silence;  // what a silent frame has before all this
  const float* dct;
};

// One call: clips [N, S] -> out [N, F, features].
template <typename Real>
struct LogMelArguments {
  LogMelTables<Real> tables;
  LogMelFinish finish;
  LogMelFraming framing;
  const void* clips;
  const int64_t* lengths;  // null: all of S samples
  int64_t samples, frames, chunks;
  float signal_preemphasis;
  bool is_int16;
  Padding padding;
  bool whole;        // a block does a whole clip
  int chunk_frames;  // frames whose samples are in shared memory together
  int stride;        // from a frame's samples there to the next frame's; overlapping frames share them
  float* mel;        // [N, F, B] features before `finish`
  float* largest;    // [N, chunks]
  float* out;
};

// Places in a block's shared memory, in bytes.
struct LogMelShared {
  int64_t values, sums, parts, statistics, power, stage, largest, features, size;
};

template <typename Real>
LogMelShared log_mel_shared(const LogMelArguments<Real>& a, int warps) {
  LogMelShared shared{};
  const auto take = [&](int64_t bytes) {
    const int64_t begin = shared.size;
    shared.size += round_up(bytes, 16);
    return begin;
  };
  const int64_t points = a.tables.points;
  shared.values = take(warps * (points + points / 8 + 1) * static_cast<int64_t>(sizeof(Complex<Real>)));
  shared.sums = take(warps * LOG_MEL_WARP * static_cast<int64_t>(sizeof(Real)));
  const bool normalizes = a.whole && a.finish.normalize;
  shared.parts = take(normalizes ? int64_t{8} * LOG_MEL_PARTS * a.finish.features : 0);
  shared.statistics = take(normalizes ? int64_t{8} * 2 * a.finish.features : 0);
  shared.power = take(warps * (points + 1) * 4);
  shared.stage = take((int64_t{a.chunk_frames - 1} * a.stride + a.tables.window_samples) * 4);
  shared.largest = take(int64_t{warps} * LOG_MEL_WARP * 4);
  shared.features = take(a.whole ? a.frames * a.tables.bands * 4 : 0);
  return shared;
}

// The sample at position index of a clip, with what stands beyond its ends, and preemphasis over the signal.
template <typename Real>
AVPPC_DEVICE float log_mel_sample(const LogMelArguments<Real>& a, int64_t clip, int64_t length, int64_t index) {
  const int64_t at = source_sample(index, length, a.padding);
  if (at < 0) return 0.0f;
  const int64_t i = clip * a.samples + at;
  const bool emphasize = a.signal_preemphasis != 0.0f && at > 0;
  if (a.is_int16) {
    const int16_t* integers = static_cast<const int16_t*>(a.clips);
    const float value = integers[i] * INT16_SCALE;
    return emphasize ? value - a.signal_preemphasis * (integers[i - 1] * INT16_SCALE) : value;
  }
  const float* floats = static_cast<const float*>(a.clips);
  return emphasize ? floats[i] - a.signal_preemphasis * floats[i - 1] : floats[i];
}

// The samples of count frames from first_frame on -> stage.
template <typename Real>
AVPPC_DEVICE void log_mel_stage(const LogMelArguments<Real>& a, int64_t clip, int64_t length, int64_t first_frame,
                                int count, float* stage, int thread, int threads) {
  const int window = a.tables.window_samples;
  const int64_t begin = a.framing.first + first_frame * a.framing.hop;
  if (a.stride == a.framing.hop) {
    const int size = (count - 1) * a.stride + window;
    for (int i = thread; i < size; i += threads) stage[i] = log_mel_sample(a, clip, length, begin + i);
    return;
  }
  for (int i = thread; i < count * window; i += threads) {  // the frames do not overlap
    const int frame = i / window, sample = i % window;
    stage[frame * a.stride + sample] = log_mel_sample(a, clip, length, begin + frame * a.framing.hop + sample);
  }
}

// Dynamic range, affine map, cosine transform, normalisation: values [F, B] -> out [F, features]. values may be out.
// maxima: of parts of the clip; largest: scratch, one number a thread.
template <typename Threads>
AVPPC_DEVICE void log_mel_finish_block(const LogMelFinish& f, int64_t frames, int64_t clip_frames, const float* maxima,
                                       int64_t maxima_count, float* largest, double* parts, double* statistics,
                                       float* values, float* out, const Threads& threads) {
  threads.each([&](int thread) {
    float value = -INFINITY;
    for (int64_t i = thread; i < maxima_count; i += threads.count()) value = larger_or_nan(value, maxima[i]);
    largest[thread] = value;
  });
  threads.each([&](int thread) {
    if (thread != 0) return;
    for (int i = 1; i < threads.count(); ++i) largest[0] = larger_or_nan(largest[0], largest[i]);
  });

  const float top = clip_frames > 0 ? largest[0] : f.silence;
  const float lowest = f.has_range ? top - f.range : -INFINITY;
  const float reference = f.relative || top != top ? top : 0.0f;  // NaN makes all the clip NaN
  float* scaled = f.mfcc == 0 && !f.normalize ? out : values;
  threads.each([&](int thread) {
    for (int64_t i = thread; i < frames * f.bands; i += threads.count()) {
      const float value = values[i] < lowest ? lowest : values[i];
      scaled[i] = (value - reference) * f.scale + f.shift;
    }
  });
  if (f.mfcc > 0) {
    threads.each([&](int thread) {
      for (int64_t i = thread; i < frames * f.mfcc; i += threads.count()) {
        const float* bands = values + i / f.mfcc * f.bands;
        const float* row = f.dct + i % f.mfcc * f.bands;
        float sum = 0;
        for (int band = 0; band < f.bands; ++band) sum += bands[band] * row[band];
        out[i] = sum;
      }
    });
  }
  if (!f.normalize) return;

  const float* features = f.mfcc > 0 ? out : values;
  const double count = static_cast<double>(clip_frames > 1 ? clip_frames : 1);
  for (int moment = 0; moment < 2; ++moment) {  // the means, then the standard deviations around them
    threads.each([&](int thread) {
      for (int i = thread; i < LOG_MEL_PARTS * f.features; i += threads.count()) {
        const int feature = i % f.features;
        double sum = 0;
        for (int64_t frame = i / f.features; frame < clip_frames; frame += LOG_MEL_PARTS) {
          const double value = features[frame * f.features + feature];
          sum += moment == 0 ? value : (value - statistics[feature]) * (value - statistics[feature]);
        }
        parts[i] = sum;
      }
    });
    threads.each([&](int thread) {
      for (int feature = thread; feature < f.features; feature += threads.count()) {
        double sum = 0;
        for (int part = 0; part < LOG_MEL_PARTS; ++part) sum += parts[part * f.features + feature];
        statistics[moment * f.features + feature] =
            moment == 0 ? sum / count : sqrt(sum / (count > 1 ? count - 1 : 1)) + NORMALIZE_EPSILON;
      }
    });
  }
  threads.each([&](int thread) {
    for (int64_t i = thread; i < frames * f.features; i += threads.count()) {
      const int64_t feature = i % f.features;
      const double value = (features[i] - statistics[feature]) / statistics[f.features + feature];
      out[i] = i / f.features < clip_frames ? static_cast<float>(value) : 0.0f;
    }
  });
}

template <typename Real, typename Threads>
AVPPC_DEVICE void log_mel_fwd_block(const LogMelArguments<Real>& a, int64_t block, char* memory,
                                    const LogMelShared& shared, const Threads& threads) {
  const LogMelTables<Real>& t = a.tables;
  const int64_t clip = a.whole ? block : block / a.chunks;
  const int64_t first_chunk = a.whole ? 0 : block % a.chunks, last_chunk = a.whole ? a.chunks : first_chunk + 1;
  const int64_t given = a.lengths != nullptr ? a.lengths[clip] : a.samples;
  const int64_t length = given < 0 ? 0 : given > a.samples ? a.samples : given;
  const int64_t clip_frames = a.framing.frames(length);
  float* stage = reinterpret_cast<float*>(memory + shared.stage);
  float* largest = reinterpret_cast<float*>(memory + shared.largest);
  float* features = reinterpret_cast<float*>(memory + shared.features);
  const int warps = threads.count() / LOG_MEL_WARP;
  threads.each([&](int thread) { largest[thread] = -INFINITY; });

  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t first = chunk * a.chunk_frames;
    const int room = static_cast<int>(a.frames - first < a.chunk_frames ? a.frames - first : a.chunk_frames);
    const int count = static_cast<int>(clip_frames < first          ? 0
                                       : clip_frames - first < room ? clip_frames - first
                                                                    : room);
    float* target = a.whole ? features + first * t.bands : a.mel + (clip * a.frames + first) * t.bands;
    threads.each([&](int thread) {
      if (count > 0) log_mel_stage(a, clip, length, first, count, stage, thread, threads.count());
    });
    for (int base = 0; base < count; base += warps) {
      const auto frame = [&](int warp) {
        return LogMelFrame<Real>{
            t, stage + (base + warp) * a.stride,
            reinterpret_cast<Complex<Real>*>(memory + shared.values) + warp * (t.points + t.points / 8 + 1),
            reinterpret_cast<Real*>(memory + shared.sums) + warp * LOG_MEL_WARP,
            reinterpret_cast<float*>(memory + shared.power) + warp * (t.points + 1)};
      };
      const auto step = [&](const auto& run) {  // for the lanes of every warp that has a frame
        threads.each_lane([&](int warp, int lane) {
          if (base + warp < count) run(frame(warp), warp, lane);
        });
      };
      if (t.remove_dc) step([&](const LogMelFrame<Real>& f, int, int lane) { f.sum_samples(lane); });
      step([&](const LogMelFrame<Real>& f, int, int lane) { f.run_first_pass(lane); });
      int done = t.radix[0];
      for (int pass = 1; pass < t.passes; ++pass) {
        step([&](const LogMelFrame<Real>& f, int, int lane) { f.run_pass(lane, pass, done); });
        done *= t.radix[pass];
      }
      step([&](const LogMelFrame<Real>& f, int, int lane) { f.unzip_power(lane); });
      step([&](const LogMelFrame<Real>& f, int warp, int lane) {
        float& most = largest[warp * LOG_MEL_WARP + lane];
        most = f.mel_logs(lane, target + (base + warp) * t.bands, most);
      });
    }
    threads.each([&](int thread) {
      for (int i = count * t.bands + thread; i < room * t.bands; i += threads.count()) target[i] = a.finish.silence;
    });
  }

  if (a.whole) {
    log_mel_finish_block(a.finish, a.frames, clip_frames, largest, threads.count(), largest,
                         reinterpret_cast<double*>(memory + shared.parts),
                         reinterpret_cast<double*>(memory + shared.statistics), features,
                         a.out + clip * a.frames * a.finish.features, threads);
  } else if (t.track_largest) {
    threads.each([&](int thread) {
      if (thread != 0) return;
      float most = largest[0];
      for (int i = 1; i < threads.count(); ++i) most = larger_or_nan(most, largest[i]);
      a.largest[block] = most;
    });
  }
}

}  // namespace avppc
