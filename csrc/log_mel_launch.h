// Host side of the CUDA kernels of log_mel, without CUDA in it: the tables as one piece of memory that can be copied
// to a device, and how a call is cut into blocks.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "fft_plan.h"
#include "log_mel_block.h"
#include "log_mel_tables.h"
#include "rounding.h"

namespace avppc {

template <typename Real>
class LogMelTableMemory {
 public:
  explicit LogMelTableMemory(const LogMelConfig& config)
      : config_(config), fft_(config.fft_size / 2), mel_(make_mel_bands(config)) {
    std::vector<Real> window;
    for (const double value : make_window(config)) window.push_back(static_cast<Real>(0.5 * value));
    window_ = put(window);
    const std::vector<double> unzip = make_unzip(fft_.points);
    unzip_ = put(std::vector<Real>(unzip.begin(), unzip.end()));
    for (const auto& twiddles : fft_.twiddles)
      twiddles_.push_back(put(std::vector<Real>(twiddles.begin(), twiddles.end())));
    // Butterfly b of the first pass holds values first_pair[b] + k * butterflies at places b * radix + k.
    const int radix = fft_.radices[0], butterflies = fft_.points / radix;
    std::vector<int> first_pair(butterflies);
    for (int i = 0; i < butterflies; ++i) first_pair[fft_.place[i] / radix] = i;
    first_pair_ = put(first_pair);
    mel_begin_ = put(mel_.begin);
    mel_count_ = put(mel_.count);
    mel_offset_ = put(mel_.offset);
    mel_weights_ = put(mel_.weights);
    dct_ = put(make_dct(config));
  }

  const std::vector<char>& bytes() const { return bytes_; }

  // The tables where bytes() was copied to memory.
  LogMelTables<Real> at(const char* memory) const {
    LogMelTables<Real> t{};
    const auto reals = [&](size_t offset) { return reinterpret_cast<const Real*>(memory + offset); };
    const auto ints = [&](size_t offset) { return reinterpret_cast<const int*>(memory + offset); };
    const auto floats = [&](size_t offset) { return reinterpret_cast<const float*>(memory + offset); };
    t.window_samples = config_.window_samples;
    t.bands = config_.bands;
    t.points = fft_.points;
    t.passes = static_cast<int>(fft_.radices.size());
    for (int pass = 0; pass < t.passes; ++pass) {
      t.radix[pass] = fft_.radices[pass];
      t.twiddles[pass] = reals(twiddles_[pass]);
    }
    t.unzip = reals(unzip_);
    t.window = reals(window_);
    t.first_pair = ints(first_pair_);
    t.mel_begin = ints(mel_begin_);
    t.mel_count = ints(mel_count_);
    t.mel_offset = ints(mel_offset_);
    t.mel_weights = floats(mel_weights_);
    t.preemphasis = config_.preemphasis_scope == Scope::frame ? static_cast<Real>(config_.preemphasis) : Real(0);
    t.remove_dc = config_.remove_dc;
    t.magnitude = config_.power == 1;
    t.take_log = config_.log != Log::none;
    t.track_largest = config_.relative_to_max || config_.has_dynamic_range;
    t.log_offset = static_cast<float>(config_.log_offset);
    t.log_floor = static_cast<float>(config_.log_floor);
    const bool scale_later = config_.needs_finish();
    t.output_scale =
        static_cast<float>((t.take_log ? config_.log_scale() : 1.0) * (scale_later ? 1.0 : config_.output_scale));
    t.output_shift = scale_later ? 0.0f : static_cast<float>(config_.output_shift);
    return t;
  }

  LogMelFinish finish(const char* memory) const {
    LogMelFinish f{};
    f.needed = config_.needs_finish();
    f.has_range = config_.has_dynamic_range;
    f.relative = config_.relative_to_max;
    f.normalize = config_.normalize == Normalize::per_feature;
    f.bands = config_.bands;
    f.mfcc = config_.mfcc;
    f.features = config_.features();
    f.range = static_cast<float>(config_.dynamic_range);
    f.scale = static_cast<float>(config_.output_scale);
    f.shift = static_cast<float>(config_.output_shift);
    const double silence = config_.silence();
    f.silence = static_cast<float>(f.needed ? silence : silence * config_.output_scale + config_.output_shift);
    f.dct = reinterpret_cast<const float*>(memory + dct_);
    return f;
  }

 private:
  template <typename Number>
  size_t put(const std::vector<Number>& values) {
    const size_t offset = bytes_.size();
    bytes_.resize(round_up(offset + sizeof(Number) * values.size(), 16));
    if (!values.empty()) std::memcpy(bytes_.data() + offset, values.data(), sizeof(Number) * values.size());
    return offset;
  }

  LogMelConfig config_;
  FftPlan fft_;
  MelBands mel_;
  std::vector<char> bytes_;
  size_t window_, unzip_, first_pair_, mel_begin_, mel_count_, mel_offset_, mel_weights_, dct_;
  std::vector<size_t> twiddles_;
};

constexpr int LOG_MEL_CHUNK_FRAMES = 16;
constexpr int64_t LOG_MEL_WHOLE_BYTES =
    48 * 1024;  // features of a clip that a block finishes by itself: 150 frames of 80

// Cuts clips [N, S] into blocks; fills what depends on it in arguments, whose tables, finish and framing are set.
// Returns the warps of a block, 0 where even one needs more than max_shared bytes of shared memory.
template <typename Real>
int plan_log_mel_blocks(LogMelArguments<Real>& a, int64_t samples, int64_t max_shared) {
  a.samples = samples;
  a.frames = a.framing.frames(samples);
  const int window = round_up(a.tables.window_samples, 4);
  a.stride =
      static_cast<int>(std::min<int64_t>(a.framing.hop, window));  // frames that do not overlap stand close together
  a.whole = a.finish.needed && a.frames * a.tables.bands * 4 <= LOG_MEL_WHOLE_BYTES;
  for (int warps = a.whole ? 8 : 4; warps > 0; warps /= 2) {
    for (int frames = a.whole ? 4 * warps : LOG_MEL_CHUNK_FRAMES; frames >= warps; frames /= 2) {
      a.chunk_frames = static_cast<int>(std::min<int64_t>(a.frames, frames));
      a.chunks = ceil_div(a.frames, a.chunk_frames);
      if (log_mel_shared(a, warps).size <= max_shared) return warps;
    }
  }
  return 0;
}

}  // namespace avppc
