// The tables of the CPU kernel of log_mel, one set per configuration.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fft_plan.h"
#include "log_mel_cpu_kernel.h"
#include "log_mel_tables.h"

namespace avppc {

// Everything that depends on the configuration alone.
struct LogMelPlanStorage {
  explicit LogMelPlanStorage(const LogMelConfig& config);
  LogMelPlanStorage(const LogMelPlanStorage&) = delete;  // plan points into this object
  LogMelPlanStorage& operator=(const LogMelPlanStorage&) = delete;

  // Floats that the kernel may read of a group's samples: more than it uses.
  int64_t input_floats() const { return plan.row_width * plan.stride + plan.row_count + 16; }

  LogMelConfig config;
  std::optional<FftChirpPlan> chirp;  // where fft_size / 2 has no plan of its own
  FftPlan fft;
  MelBands mel;
  std::vector<float> dct;
  std::vector<double> window, unzip, slot_window, slot_chirp;
  std::vector<int> slot_sample, slot_row, live, all_live;
  LogMelPlan plan{};

 private:
  void plan_rows();
  void plan_transform();
  void plan_chirp();
  void plan_bands();
};

// The plan of a configuration (LogMelConfig::parse says how it is written), made at its first use and kept.
std::shared_ptr<const LogMelPlanStorage> find_log_mel_plan(const std::string& config);

}  // namespace avppc
