#include "log_mel_cpu_plan.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <unordered_map>

#include "rounding.h"

namespace avppc {
namespace {

std::optional<FftChirpPlan> make_chirp(int points) {
  if (has_fft_plan(points)) return std::nullopt;
  return FftChirpPlan(points);
}

}  // namespace

LogMelPlanStorage::LogMelPlanStorage(const LogMelConfig& config)
    : config(config),
      chirp(make_chirp(config.fft_size / 2)),
      fft(chirp ? chirp->fft : FftPlan(config.fft_size / 2)),
      mel(make_mel_bands(config)),
      dct(make_dct(config)),
      window(make_window(config)),
      unzip(make_unzip(config.fft_size / 2)) {
  for (double& value : window) value *= 0.5;  // the kernel's real transform wants half
  plan_rows();
  plan_transform();
  if (chirp) plan_chirp();
  plan_bands();
}

void LogMelPlanStorage::plan_rows() {
  plan.window_samples = config.window_samples;
  plan.remove_dc = config.remove_dc;
  plan.preemphasis = config.preemphasis_scope == Scope::frame ? config.preemphasis : 0.0;
  plan.window = window.data();
  // Frames that do not overlap need not stand as far apart in memory as in the clip.
  plan.stride = std::min<int64_t>(config.hop_samples, round_up(config.window_samples, 16));
  plan.row_count = static_cast<int>(round_up(std::min<int64_t>(plan.stride, config.window_samples), 16)) + 1;
  plan.row_width = static_cast<int>(round_up(LOG_MEL_GROUP + (config.window_samples - 1) / plan.stride, 4));
}

void LogMelPlanStorage::plan_transform() {
  plan.points = config.fft_size / 2;
  plan.fft.points = fft.points;
  slot_sample.assign(2 * fft.points, config.window_samples);
  slot_row.assign(2 * fft.points, (plan.row_count - 1) * plan.row_width);
  slot_window.assign(2 * fft.points, 0.0);
  for (int i = 0; i < config.window_samples; ++i) {
    const int slot = 2 * fft.place[i / 2] + i % 2;
    slot_sample[slot] = i;
    slot_row[slot] = static_cast<int>(i % plan.stride * plan.row_width + i / plan.stride);
    slot_window[slot] = window[i];
  }
  plan.slot_sample = slot_sample.data();
  plan.slot_row = slot_row.data();
  plan.slot_window = slot_window.data();

  for (int block = 0; block < fft.points; block += fft.radices[0]) {
    int count = 0;
    for (int k = 0; k < fft.radices[0]; ++k) count += slot_sample[2 * (block + k)] < config.window_samples;
    live.push_back(count);
  }
  plan.live = live.data();

  plan.fft.passes = static_cast<int>(fft.radices.size());
  for (int pass = 0; pass < plan.fft.passes; ++pass) {
    plan.fft.radix[pass] = fft.radices[pass];
    plan.fft.twiddles[pass] = fft.twiddles[pass].data();
  }
  plan.unzip = unzip.data();
}

void LogMelPlanStorage::plan_chirp() {
  slot_chirp.assign(2 * fft.points, 0.0);
  for (int k = 0; k < plan.points; ++k) {
    std::copy_n(&chirp->chirp[2 * k], 2, &slot_chirp[2 * fft.place[k]]);
  }
  all_live.assign(fft.points / fft.radices[0], fft.radices[0]);
  plan.chirp = {slot_chirp.data(), chirp->chirp.data(), chirp->spectrum.data(), fft.place.data(), all_live.data()};
}

void LogMelPlanStorage::plan_bands() {
  plan.bands = config.bands;
  plan.magnitude = config.power == 1;
  plan.mel_begin = mel.begin.data();
  plan.mel_count = mel.count.data();
  plan.mel_offset = mel.offset.data();
  plan.mel_weights = mel.weights.data();
  plan.take_log = config.log != Log::none;
  plan.log_offset = static_cast<float>(config.log_offset);
  plan.log_floor = static_cast<float>(config.log_floor);
  plan.track_largest = config.relative_to_max || config.has_dynamic_range;
  const bool scale_later = config.needs_finish();
  plan.output_scale = static_cast<float>(config.log_scale() * (scale_later ? 1.0 : config.output_scale));
  plan.output_shift = scale_later ? 0.0f : static_cast<float>(config.output_shift);
}

std::shared_ptr<const LogMelPlanStorage> find_log_mel_plan(const std::string& config) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const LogMelPlanStorage>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& plan = plans[config];
  if (plan == nullptr) {
    try {
      plan = std::make_shared<const LogMelPlanStorage>(LogMelConfig::parse(config));
    } catch (...) {
      plans.erase(config);
      throw;
    }
  }
  return plan;
}

}  // namespace avppc
