// avppc::log_mel for CPU tensors: plans (kept per configuration), work split over threads, what needs a whole clip.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "checks.h"
#include "log_mel_cpu_kernel.h"
#include "log_mel_index.h"
#include "log_mel_tables.h"

namespace avppc {
namespace {

constexpr double PI = 3.14159265358979323846;

std::vector<int> factorize(int points) {
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

void push_rotation(std::vector<float>& table, double turns) {
  table.push_back(static_cast<float>(std::cos(-2.0 * PI * turns)));
  table.push_back(static_cast<float>(std::sin(-2.0 * PI * turns)));
}

// Everything that depends on the configuration alone.
struct LogMelPlanStorage {
  explicit LogMelPlanStorage(const LogMelConfig& config) : config(config), mel(make_mel_bands(config)), dct(make_dct(config)) {
    window = make_window(config);
    for (float& value : window) value *= 0.5f;  // the kernel's real transform wants half
    const int points = config.fft_size / 2;
    const std::vector<int> radices = factorize(points);
    for (int i = 0; i < config.fft_size; ++i) place.push_back(2 * digit_reversed(i / 2, radices, points) + i % 2);
    twiddles.resize(radices.size());
    for (size_t pass = 0, done = 1; pass < radices.size(); done *= radices[pass++]) {
      for (size_t j = 0; j < done; ++j) {
        for (int k = 1; k < radices[pass]; ++k) push_rotation(twiddles[pass], double(j * k) / double(done * radices[pass]));
      }
    }
    for (int k = 0; k <= points / 2; ++k) push_rotation(unzip, double(k) / config.fft_size);

    const bool per_frame = config.preemphasis_scope == Scope::frame;
    const bool finish = config.needs_finish();
    plan.window_samples = config.window_samples;
    plan.bands = config.bands;
    plan.points = points;
    plan.remove_dc = config.remove_dc;
    plan.magnitude = config.power == 1;
    plan.take_log = config.log != Log::none;
    plan.preemphasis = per_frame ? static_cast<float>(config.preemphasis) : 0.0f;
    plan.window = window.data();
    plan.place = place.data();
    plan.passes = static_cast<int>(radices.size());
    for (size_t pass = 0; pass < radices.size(); ++pass) {
      plan.radix[pass] = radices[pass];
      plan.twiddles[pass] = twiddles[pass].data();
    }
    plan.unzip = unzip.data();
    plan.mel_begin = mel.begin.data();
    plan.mel_count = mel.count.data();
    plan.mel_offset = mel.offset.data();
    plan.mel_weights = mel.weights.data();
    plan.log_offset = static_cast<float>(config.log_offset);
    plan.log_floor = static_cast<float>(config.log_floor);
    plan.log_scale = static_cast<float>(config.log_scale());
    plan.output_scale = finish ? 1.0f : static_cast<float>(config.output_scale);
    plan.output_shift = finish ? 0.0f : static_cast<float>(config.output_shift);
  }
  LogMelPlanStorage(const LogMelPlanStorage&) = delete;  // plan points into this object
  LogMelPlanStorage& operator=(const LogMelPlanStorage&) = delete;

  LogMelConfig config;
  MelBands mel;
  std::vector<float> dct, window, unzip;
  std::vector<int> place;
  std::vector<std::vector<float>> twiddles;
  LogMelPlan plan{};
};

std::shared_ptr<const LogMelPlanStorage> find_plan(const std::string& text) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const LogMelPlanStorage>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& plan = plans[text];
  if (plan == nullptr) {
    try {
      plan = std::make_shared<const LogMelPlanStorage>(LogMelConfig::parse(text));
    } catch (...) {
      plans.erase(text);
      throw;
    }
  }
  return plan;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats allocate_floats(int64_t count) {
  void* memory = std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Floats(static_cast<float*>(memory));
}

// Tiny numbers are taken as zero while this lives: they cannot be seen in the result, and arithmetic on them is slow.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushDenormals() {}
#endif
};

// One call of the operator: clips [N, S] -> out [N, F, features]. Groups are numbered through: clip * groups + group.
struct LogMelJob {
  const LogMelPlanStorage& tables;
  const char* clips;
  const int64_t* lengths;  // null: all of S samples
  bool is_int16;
  int64_t samples, frames, groups;
  float* out;
  float* mel;      // [N, F, B] what the kernel writes: out itself unless the features are others (MFCC)
  float* largest;  // [N * groups]

  int64_t length(int64_t clip) const { return lengths ? lengths[clip] : samples; }
  int64_t clip_frames(int64_t clip) const { return tables.config.num_frames(length(clip)); }
};

// What one thread needs to work on a job.
class LogMelWorker {
 public:
  explicit LogMelWorker(const LogMelJob& job);
  void run_groups(int64_t begin, int64_t end);
  void finish_clip(int64_t clip);

 private:
  void scale(int64_t clip, int64_t count) const;
  void transform_cosine(int64_t clip) const;
  void normalize(int64_t clip, int64_t count);

  const LogMelJob& job_;
  const LogMelConfig& config_;
  int64_t stride_, span_;  // between two frames' samples in input_, and of all of input_
  Floats input_, work_;
  std::vector<double> mean_, deviation_;
  FlushDenormals flush_;
};

LogMelWorker::LogMelWorker(const LogMelJob& job) : job_(job), config_(job.tables.config) {
  const int64_t readable = (config_.window_samples + 15) / 16 * 16;
  stride_ = std::min<int64_t>(config_.hop_samples, readable);  // frames that do not overlap are loaded one by one
  span_ = (LOG_MEL_GROUP - 1) * stride_ + readable;
  input_ = allocate_floats(span_);
  std::fill_n(input_.get(), span_, 0.0f);
  work_ = allocate_floats(log_mel_work_floats(config_.fft_size, config_.bands));
}

void LogMelWorker::run_groups(int64_t begin, int64_t end) {
  const auto load = AVPPC_CPU_SELECT(load_samples);
  const auto compute = AVPPC_CPU_SELECT(log_mel_group);
  const LogMelPlan& plan = job_.tables.plan;
  const int64_t hop = config_.hop_samples, window = config_.window_samples;
  const float silence = static_cast<float>(config_.silence()) * plan.output_scale + plan.output_shift;
  SampleSource source{};
  source.is_int16 = job_.is_int16;
  source.reflect = config_.framing == Framing::center && config_.padding == Padding::reflect;
  source.preemphasis = config_.preemphasis_scope == Scope::signal ? static_cast<float>(config_.preemphasis) : 0.0f;
  const int64_t clip_bytes = job_.samples * static_cast<int64_t>(job_.is_int16 ? sizeof(int16_t) : sizeof(float));

  for (int64_t number = begin; number < end; ++number) {
    const int64_t clip = number / job_.groups, first = number % job_.groups * LOG_MEL_GROUP;
    const int64_t room = std::min<int64_t>(LOG_MEL_GROUP, job_.frames - first);
    const int64_t count = std::clamp<int64_t>(job_.clip_frames(clip) - first, 0, room);
    float* target = job_.mel + (clip * job_.frames + first) * config_.bands;
    job_.largest[number] = -HUGE_VALF;
    if (count > 0) {
      source.clip = job_.clips + clip * clip_bytes;
      source.length = job_.length(clip);
      const int64_t start = config_.first_sample() + first * hop;
      if (stride_ == hop) {
        load(source, start, (count - 1) * hop + window, input_.get());
      } else {
        for (int64_t frame = 0; frame < count; ++frame) {
          load(source, start + frame * hop, window, input_.get() + frame * stride_);
        }
      }
      job_.largest[number] = compute(plan, input_.get(), stride_, static_cast<int>(count), work_.get(), target);
    }
    std::fill(target + count * config_.bands, target + room * config_.bands, silence);
  }
}

// What needs the whole clip: dynamic range, affine map, cosine transform, normalisation.
void LogMelWorker::finish_clip(int64_t clip) {
  const int64_t count = std::min(job_.clip_frames(clip), job_.frames);
  scale(clip, count);
  if (config_.mfcc > 0) transform_cosine(clip);
  if (config_.normalize == Normalize::per_feature) normalize(clip, count);
}

void LogMelWorker::scale(int64_t clip, int64_t count) const {
  float largest = count > 0 ? -HUGE_VALF : static_cast<float>(config_.silence());
  for (int64_t group = 0; group * LOG_MEL_GROUP < count; ++group) {
    const float value = job_.largest[clip * job_.groups + group];
    if (value > largest || std::isnan(value)) largest = value;
  }
  const float lowest = config_.has_dynamic_range ? largest - static_cast<float>(config_.dynamic_range) : -HUGE_VALF;
  const bool all_nan = std::isnan(lowest);
  const float reference = config_.relative_to_max ? largest : 0.0f;
  const float scale = static_cast<float>(config_.output_scale), shift = static_cast<float>(config_.output_shift);
  float* values = job_.mel + clip * job_.frames * config_.bands;
  for (int64_t i = 0; i < job_.frames * config_.bands; ++i) {
    const float value = values[i] < lowest || all_nan ? lowest : values[i];  // a NaN in values[i] stays
    values[i] = (value - reference) * scale + shift;
  }
}

void LogMelWorker::transform_cosine(int64_t clip) const {
  const float* dct = job_.tables.dct.data();
  for (int64_t frame = clip * job_.frames; frame < (clip + 1) * job_.frames; ++frame) {
    const float* bands = job_.mel + frame * config_.bands;
    for (int coefficient = 0; coefficient < config_.mfcc; ++coefficient) {
      float sum = 0.0f;
      for (int band = 0; band < config_.bands; ++band) sum += bands[band] * dct[coefficient * config_.bands + band];
      job_.out[frame * config_.mfcc + coefficient] = sum;
    }
  }
}

void LogMelWorker::normalize(int64_t clip, int64_t count) {
  const int features = config_.features();
  float* values = job_.out + clip * job_.frames * features;
  mean_.assign(features, 0.0);
  deviation_.assign(features, 0.0);
  for (int64_t i = 0; i < count * features; ++i) mean_[i % features] += values[i];
  for (double& value : mean_) value /= static_cast<double>(std::max<int64_t>(count, 1));
  for (int64_t i = 0; i < count * features; ++i) {
    const double centred = values[i] - mean_[i % features];
    deviation_[i % features] += centred * centred;
  }
  for (double& value : deviation_) {
    value = std::sqrt(value / static_cast<double>(std::max<int64_t>(count - 1, 1))) + NORMALIZE_EPSILON;
  }
  for (int64_t i = 0; i < count * features; ++i) {
    values[i] = static_cast<float>((values[i] - mean_[i % features]) / deviation_[i % features]);
  }
  std::fill(values + count * features, values + job_.frames * features, 0.0f);
}

// body(begin, end) over parts of 0 ... count on torch's threads; an exception in one of them is thrown here.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  struct Context {
    const Body& body;
    std::mutex mutex;
    std::exception_ptr error;
  } context{body, {}, {}};
  const auto call = [](int64_t begin, int64_t end, void* pointer) {
    Context& context = *static_cast<Context*>(pointer);
    try {
      context.body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(context.mutex);
      context.error = std::current_exception();
    }
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, call, &context));
  if (context.error) std::rethrow_exception(context.error);
}

void run(const LogMelJob& job, int64_t clips) {
  constexpr int64_t grain = 4;  // groups: about 20 us of work
  const bool finish = job.tables.config.needs_finish();
  uint32_t threads = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  if (finish && clips >= static_cast<int64_t>(threads)) {  // a clip is finished while it is in the cache
    parallel_for(clips, 1, [&](int64_t begin, int64_t end) {
      LogMelWorker worker(job);
      for (int64_t clip = begin; clip < end; ++clip) {
        worker.run_groups(clip * job.groups, (clip + 1) * job.groups);
        worker.finish_clip(clip);
      }
    });
    return;
  }
  parallel_for(clips * job.groups, grain, [&](int64_t begin, int64_t end) { LogMelWorker(job).run_groups(begin, end); });
  if (finish) {
    LogMelWorker worker(job);
    for (int64_t clip = 0; clip < clips; ++clip) worker.finish_clip(clip);
  }
}

Tensor log_mel_cpu(const Tensor& waveform, const std::optional<Tensor>& lengths, const std::string& config) {
  check_dim("waveform", waveform, 2);
  check_contiguous("waveform", waveform);
  const bool is_int16 = waveform.scalar_type() == ScalarType::Short;
  if (!is_int16) check_dtype("waveform", waveform, ScalarType::Float);
  const int64_t clips = waveform.size(0), samples = waveform.size(1);
  const auto plan = find_plan(config);
  const int64_t frames = plan->config.num_frames(samples);
  AVPPC_CHECK(clips > 0 && frames > 0, "waveform must have at least one clip and samples for one frame, got ", clips,
              " clips of ", samples, " samples");
  const int64_t* length_data = nullptr;
  if (lengths.has_value()) {
    check_dtype("lengths", *lengths, ScalarType::Long);
    check_contiguous("lengths", *lengths);
    AVPPC_CHECK(lengths->numel() == clips, "lengths must have ", clips, " elements, got ", lengths->numel());
    length_data = lengths->const_data_ptr<int64_t>();
    for (int64_t clip = 0; clip < clips; ++clip) {
      AVPPC_CHECK(length_data[clip] >= 0 && length_data[clip] <= samples, "lengths must be from 0 to ", samples, ", got ",
                  length_data[clip]);
    }
  }
  Tensor out = torch::stable::new_empty(waveform, {clips, frames, plan->config.features()}, ScalarType::Float);
  const int64_t groups = (frames + LOG_MEL_GROUP - 1) / LOG_MEL_GROUP;
  const Floats largest = allocate_floats(clips * groups);
  float* const out_data = out.mutable_data_ptr<float>();
  const Floats bands = plan->config.mfcc > 0 ? allocate_floats(clips * frames * plan->config.bands) : nullptr;
  run({*plan, static_cast<const char*>(waveform.const_data_ptr()), length_data, is_int16, samples, frames, groups, out_data,
       bands ? bands.get() : out_data, largest.get()},
      clips);
  return out;
}

}  // namespace
}  // namespace avppc

STABLE_TORCH_LIBRARY_FRAGMENT(avppc, library) {
  library.def("log_mel(Tensor waveform, Tensor? lengths, str config) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(avppc, CPU, library) { library.impl("log_mel", TORCH_BOX(&avppc::log_mel_cpu)); }
