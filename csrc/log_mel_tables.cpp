#include "log_mel_tables.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <sstream>
#include <stdexcept>

namespace avppc {
namespace {

constexpr double PI = 3.14159265358979323846;

using Fields = std::map<std::string, std::string>;

[[noreturn]] void refuse(const std::string& name, const std::string& value, const std::string& allowed) {
  throw std::invalid_argument("log_mel: " + name + " must be " + allowed + ", got '" + value + "'");
}

std::string take(Fields& fields, const std::string& name) {
  const auto found = fields.find(name);
  if (found == fields.end()) throw std::invalid_argument("log_mel: the configuration lacks " + name);
  std::string value = found->second;
  fields.erase(found);
  return value;
}

double take_number(Fields& fields, const std::string& name, double minimum, double maximum) {
  const std::string value = take(fields, name);
  std::istringstream stream(value);
  stream.imbue(std::locale::classic());
  double number = 0;
  if (!(stream >> number) || !stream.eof() || !(number >= minimum && number <= maximum)) {
    std::ostringstream allowed;
    allowed << "a number from " << minimum << " to " << maximum;
    refuse(name, value, allowed.str());
  }
  return number;
}

int take_int(Fields& fields, const std::string& name, int minimum, int maximum) {
  const double number = take_number(fields, name, minimum, maximum);
  if (number != std::floor(number)) refuse(name, std::to_string(number), "an integer");
  return static_cast<int>(number);
}

bool take_bool(Fields& fields, const std::string& name) {
  const std::string value = take(fields, name);
  if (value != "True" && value != "False") refuse(name, value, "True or False");
  return value == "True";
}

template <typename Choice>
Choice take_choice(Fields& fields, const std::string& name, std::initializer_list<const char*> names) {
  const std::string value = take(fields, name);
  const auto found = std::find(names.begin(), names.end(), value);
  if (found == names.end()) {
    std::string allowed = "one of";
    for (const char* choice : names) allowed += std::string(" '") + choice + "'";
    refuse(name, value, allowed);
  }
  return static_cast<Choice>(found - names.begin());
}

// A window's name, or its window_samples values with commas between them.
void take_window(Fields& fields, LogMelConfig& config) {
  const std::string text = fields["window"];
  if (text.find(',') == std::string::npos) {
    config.window = take_choice<Window>(fields, "window",
                                        {"hann", "hann_symmetric", "hann_half_sample", "povey", "hamming",
                                         "hamming_symmetric", "blackman", "blackman_symmetric", "rectangular"});
    return;
  }
  config.window = Window::given;
  std::istringstream stream(take(fields, "window"));
  for (std::string part; std::getline(stream, part, ',');) {
    Fields value{{"window", part}};
    config.window_values.push_back(take_number(value, "window", -1e6, 1e6));
  }
  if (config.window_values.size() != static_cast<size_t>(config.window_samples)) {
    refuse("window", std::to_string(config.window_values.size()) + " values", "a name or window_samples values");
  }
}

Fields split(const std::string& text) {
  Fields fields;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ';');) {
    const size_t equals = part.find('=');
    if (equals == std::string::npos) refuse("configuration", part, "'name=value' parts");
    if (!fields.emplace(part.substr(0, equals), part.substr(equals + 1)).second) {
      refuse("configuration", part, "fields that come once");
    }
  }
  return fields;
}

double hz_to_mel(double hz, MelScale scale) {
  if (scale == MelScale::htk) return 2595.0 * std::log10(1.0 + hz / 700.0);
  if (scale == MelScale::kaldi) return 1127.0 * std::log(1.0 + hz / 700.0);
  return hz < 1000.0 ? hz * 3.0 / 200.0 : 15.0 + std::log(hz / 1000.0) * 27.0 / std::log(6.4);
}

double mel_to_hz(double mel, MelScale scale) {
  if (scale == MelScale::htk) return 700.0 * (std::pow(10.0, mel / 2595.0) - 1.0);
  if (scale == MelScale::kaldi) return 700.0 * (std::exp(mel / 1127.0) - 1.0);
  return mel < 15.0 ? mel * 200.0 / 3.0 : 1000.0 * std::exp((mel - 15.0) * std::log(6.4) / 27.0);
}

}  // namespace

LogMelConfig LogMelConfig::parse(const std::string& text) {
  Fields fields = split(text);
  LogMelConfig config{};
  config.sample_rate_hz = take_int(fields, "sample_rate_hz", 1, 10'000'000);
  config.fft_size = take_int(fields, "fft_size", 2, 8192);
  if (config.fft_size % 2 != 0) refuse("fft_size", std::to_string(config.fft_size), "even");
  config.window_samples = take_int(fields, "window_samples", 2, config.fft_size);
  config.hop_samples = take_int(fields, "hop_samples", 1, 1'000'000);
  config.bands = take_int(fields, "bands", 1, 512);
  config.mel_scale = take_choice<MelScale>(fields, "mel_scale", {"htk", "slaney", "kaldi"});
  config.mel_norm = take_choice<MelNorm>(fields, "mel_norm", {"none", "slaney"});
  const double nyquist_hz = config.sample_rate_hz / 2.0;
  if (fields["max_hz"] == "None") fields["max_hz"] = std::to_string(nyquist_hz);
  config.max_hz = take_number(fields, "max_hz", 0.0, nyquist_hz);
  config.min_hz = take_number(fields, "min_hz", 0.0, config.max_hz);
  if (config.min_hz == config.max_hz) refuse("min_hz", std::to_string(config.min_hz), "below max_hz");
  config.power = take_int(fields, "power", 1, 2);
  config.framing = take_choice<Framing>(fields, "framing", {"center", "left", "snip_edges", "mid_hop", "exact"});
  if (config.framing == Framing::exact && config.hop_samples > config.fft_size) {
    refuse("hop_samples", std::to_string(config.hop_samples), "at most fft_size with framing 'exact'");
  }
  config.padding =
      take_choice<Padding>(fields, "padding", {"reflect", "constant", "replicate", "circular", "symmetric"});
  config.drop_last_frame = take_bool(fields, "drop_last_frame");
  take_window(fields, config);
  config.preemphasis = take_number(fields, "preemphasis", 0.0, 1.0);
  config.preemphasis_scope = take_choice<Scope>(fields, "preemphasis_scope", {"signal", "frame"});
  config.remove_dc = take_bool(fields, "remove_dc");
  config.log = take_choice<Log>(fields, "log", {"none", "ln", "log10", "db"});
  config.log_offset = take_number(fields, "log_offset", 0.0, 1e30);
  config.log_floor = take_number(fields, "log_floor", 0.0, 1e30);
  if (config.log != Log::none && std::max(config.log_offset, config.log_floor) < 1e-30) {
    refuse("log_offset or log_floor", std::to_string(config.log_floor), "at least 1e-30");
  }
  config.relative_to_max = take_bool(fields, "relative_to_max");
  config.has_dynamic_range = fields["dynamic_range"] != "None";
  if (!config.has_dynamic_range) fields["dynamic_range"] = "0";
  config.dynamic_range = take_number(fields, "dynamic_range", 0.0, 1e30);
  config.output_scale = take_number(fields, "output_scale", -1e30, 1e30);
  config.output_shift = take_number(fields, "output_shift", -1e30, 1e30);
  config.mfcc = take_int(fields, "mfcc", 0, config.bands);
  config.normalize = take_choice<Normalize>(fields, "normalize", {"none", "per_feature"});
  if (!fields.empty()) refuse("configuration", fields.begin()->first, "free of unknown fields");
  return config;
}

LogMelFraming LogMelConfig::frames() const {
  const int64_t margin = (fft_size - window_samples) / 2;
  switch (framing) {
    case Framing::center: return {margin - fft_size / 2, hop_samples, 0, drop_last_frame};
    case Framing::left: return {margin, hop_samples, fft_size, drop_last_frame};
    case Framing::mid_hop:
      return {hop_samples / 2 - window_samples / 2, hop_samples, hop_samples - hop_samples / 2, drop_last_frame};
    case Framing::exact: {
      const int64_t padding = (fft_size - hop_samples) / 2;  // at each end
      return {margin - padding, hop_samples, fft_size - 2 * padding, drop_last_frame};
    }
    default: return {0, hop_samples, window_samples, drop_last_frame};
  }
}

double LogMelConfig::log_scale() const {
  return log == Log::log10 ? 1.0 / std::log(10.0) : log == Log::db ? 10.0 / std::log(10.0) : 1.0;
}

double LogMelConfig::silence() const {
  return log == Log::none ? 0.0 : std::log(std::max(log_offset, log_floor)) * log_scale();
}

std::vector<double> make_window(const LogMelConfig& config) {
  if (config.window == Window::given) return config.window_values;
  const int points = config.window_samples;
  const auto is = [&](Window window) { return config.window == window; };
  const bool half_sample = is(Window::hann_half_sample);
  const bool periodic = half_sample || is(Window::hann) || is(Window::hamming) || is(Window::blackman);
  std::vector<double> window(points);
  for (int n = 0; n < points; ++n) {
    const double angle = 2.0 * PI * (half_sample ? n + 0.5 : double(n)) / double(periodic ? points : points - 1);
    const double hann = 0.5 - 0.5 * std::cos(angle);
    switch (config.window) {
      case Window::povey: window[n] = std::pow(std::max(hann, 0.0), 0.85); break;
      case Window::hamming:
      case Window::hamming_symmetric: window[n] = 0.54 - 0.46 * std::cos(angle); break;
      case Window::blackman:
      case Window::blackman_symmetric: window[n] = 0.42 - 0.5 * std::cos(angle) + 0.08 * std::cos(2.0 * angle); break;
      case Window::rectangular: window[n] = 1.0; break;
      default: window[n] = hann;
    }
  }
  return window;
}

std::vector<double> make_filter_bank(const LogMelConfig& config) {
  const bool over_mel = config.mel_scale == MelScale::kaldi;  // triangles over mel, not over Hz
  const int bands = config.bands, bins = config.bins();
  const double low = hz_to_mel(config.min_hz, config.mel_scale), high = hz_to_mel(config.max_hz, config.mel_scale);
  std::vector<double> edges(bands + 2), edges_hz(bands + 2);
  for (int i = 0; i < bands + 2; ++i) {
    const double mel = low + (high - low) * i / (bands + 1);
    edges_hz[i] = mel_to_hz(mel, config.mel_scale);
    edges[i] = over_mel ? mel : edges_hz[i];
  }
  std::vector<double> bank(static_cast<size_t>(bins) * bands, 0.0);
  for (int bin = 0; bin < (over_mel ? bins - 1 : bins); ++bin) {
    const double hz = bin * (config.sample_rate_hz / double(config.fft_size));
    const double place = over_mel ? hz_to_mel(hz, config.mel_scale) : hz;
    for (int band = 0; band < bands; ++band) {
      const double rising = (place - edges[band]) / (edges[band + 1] - edges[band]);
      const double falling = (edges[band + 2] - place) / (edges[band + 2] - edges[band + 1]);
      const double height = config.mel_norm == MelNorm::slaney ? 2.0 / (edges_hz[band + 2] - edges_hz[band]) : 1.0;
      bank[static_cast<size_t>(bin) * bands + band] = height * std::max(0.0, std::min(rising, falling));
    }
  }
  return bank;
}

MelBands make_mel_bands(const LogMelConfig& config) {
  const std::vector<double> bank = make_filter_bank(config);
  MelBands mel;
  for (int band = 0; band < config.bands; ++band) {
    int begin = 0, end = config.bins();
    const auto weight = [&](int bin) { return bank[static_cast<size_t>(bin) * config.bands + band]; };
    while (begin < end && weight(begin) == 0.0) ++begin;
    while (end > begin && weight(end - 1) == 0.0) --end;
    mel.begin.push_back(begin);
    mel.count.push_back(end - begin);
    mel.offset.push_back(static_cast<int>(mel.weights.size()));
    for (int bin = begin; bin < end; ++bin) mel.weights.push_back(static_cast<float>(weight(bin)));
  }
  return mel;
}

std::vector<float> make_dct(const LogMelConfig& config) {
  std::vector<float> dct;
  for (int coefficient = 0; coefficient < config.mfcc; ++coefficient) {
    const double height = std::sqrt((coefficient == 0 ? 1.0 : 2.0) / config.bands);
    for (int band = 0; band < config.bands; ++band) {
      dct.push_back(static_cast<float>(height * std::cos(PI / config.bands * (band + 0.5) * coefficient)));
    }
  }
  return dct;
}

}  // namespace avppc
