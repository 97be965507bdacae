// What the CPU and the CUDA kernels of log_mel share: the configuration and its checks, and the tables, computed in
// double. The meaning of every field is in avppc/ops/log_mel/config.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "log_mel_index.h"

namespace avppc {

enum class MelScale { htk, slaney, kaldi };
enum class MelNorm { none, slaney };
enum class Framing { center, left, snip_edges, mid_hop, exact };
enum class Window {
  hann,
  hann_symmetric,
  hann_half_sample,
  povey,
  hamming,
  hamming_symmetric,
  blackman,
  blackman_symmetric,
  rectangular,
  given
};
enum class Scope { signal, frame };
enum class Log { none, ln, log10, db };
enum class Normalize { none, per_feature };

struct LogMelConfig {
  int sample_rate_hz, window_samples, fft_size, hop_samples, bands;
  MelScale mel_scale;
  MelNorm mel_norm;
  double min_hz, max_hz;
  int power;
  Framing framing;
  Padding padding;
  bool drop_last_frame;
  Window window;
  std::vector<double> window_values;  // of a given one
  double preemphasis;
  Scope preemphasis_scope;
  bool remove_dc;
  Log log;
  double log_offset, log_floor;
  bool relative_to_max, has_dynamic_range;
  double dynamic_range, output_scale, output_shift;
  int mfcc;
  Normalize normalize;

  // Reads "name=value;..." with every field once. Throws std::invalid_argument that names the field.
  static LogMelConfig parse(const std::string& text);

  int features() const { return mfcc ? mfcc : bands; }
  int bins() const { return fft_size / 2 + 1; }
  // The result of a clip depends on statistics over all its frames, or is more than a scaled logarithm.
  bool needs_finish() const { return relative_to_max || has_dynamic_range || mfcc > 0 || normalize != Normalize::none; }
  LogMelFraming frames() const;
  int64_t num_frames(int64_t num_samples) const { return frames().frames(num_samples); }
  // log(x) = log_scale() * ln(x)
  double log_scale() const;
  // What a silent frame has after the logarithm.
  double silence() const;
};

// Weights of band b: weights[offset[b]] ... for the count[b] bins from begin[b] on.
struct MelBands {
  std::vector<int> begin, count, offset;
  std::vector<float> weights;
};

std::vector<double> make_window(const LogMelConfig& config);
std::vector<double> make_filter_bank(const LogMelConfig& config);  // [bins, bands]
MelBands make_mel_bands(const LogMelConfig& config);
std::vector<float> make_dct(const LogMelConfig& config);  // [mfcc, bands]

}  // namespace avppc
