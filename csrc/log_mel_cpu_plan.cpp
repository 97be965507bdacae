#include "log_mel_cpu_plan.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <unordered_map>

namespace avppc {
namespace {

constexpr double PI = 3.14159265358979323846;

// Radices of the passes, at least two: the kernel treats the first and the last in their own ways.
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

// What Butterfly<radix> in fft_lanes.h wants to know of w, the rotation by turns.
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

int round_up(int64_t number, int multiple) { return static_cast<int>((number + multiple - 1) / multiple * multiple); }

}  // namespace

LogMelPlanStorage::LogMelPlanStorage(const LogMelConfig& config)
    : config(config), mel(make_mel_bands(config)), dct(make_dct(config)), window(make_window(config)) {
  for (double& value : window) value *= 0.5;  // the kernel's real transform wants half
  plan_rows();
  plan_transform();
  plan_bands();
}

void LogMelPlanStorage::plan_rows() {
  plan.window_samples = config.window_samples;
  plan.remove_dc = config.remove_dc;
  plan.preemphasis = config.preemphasis_scope == Scope::frame ? config.preemphasis : 0.0;
  plan.window = window.data();
  // Frames that do not overlap need not stand as far apart in memory as in the clip.
  plan.stride = std::min<int64_t>(config.hop_samples, round_up(config.window_samples, 16));
  plan.row_count = round_up(std::min<int64_t>(plan.stride, config.window_samples), 16) + 1;
  plan.row_width = round_up(LOG_MEL_GROUP + (config.window_samples - 1) / plan.stride, 4);
}

void LogMelPlanStorage::plan_transform() {
  plan.points = config.fft_size / 2;
  const std::vector<int> radices = factorize(plan.points);
  slot_sample.assign(config.fft_size, config.window_samples);
  slot_row.assign(config.fft_size, (plan.row_count - 1) * plan.row_width);
  slot_window.assign(config.fft_size, 0.0);
  for (int i = 0; i < config.window_samples; ++i) {
    const int slot = 2 * digit_reversed(i / 2, radices, plan.points) + i % 2;
    slot_sample[slot] = i;
    slot_row[slot] = static_cast<int>(i % plan.stride * plan.row_width + i / plan.stride);
    slot_window[slot] = window[i];
  }
  plan.slot_sample = slot_sample.data();
  plan.slot_row = slot_row.data();
  plan.slot_window = slot_window.data();

  for (int block = 0; block < plan.points; block += radices[0]) {
    int count = 0;
    for (int k = 0; k < radices[0]; ++k) count += slot_sample[2 * (block + k)] < config.window_samples;
    live.push_back(count);
  }
  plan.live = live.data();

  plan.passes = static_cast<int>(radices.size());
  twiddles.resize(radices.size());
  for (size_t pass = 0, done = 1; pass < radices.size(); done *= radices[pass++]) {
    for (size_t j = 0; j < done; ++j) {
      push_twiddles(twiddles[pass], radices[pass], double(j) / double(done * radices[pass]));
    }
    plan.radix[pass] = radices[pass];
    plan.twiddles[pass] = twiddles[pass].data();
  }
  for (int k = 0; k < plan.points; ++k) push_rotation(unzip, double(k) / config.fft_size);
  plan.unzip = unzip.data();
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
