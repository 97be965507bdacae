// avppc::log_mel for CPU tensors: work split over threads, and what needs a whole clip.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"
#include "log_mel_cpu_kernel.h"
#include "log_mel_cpu_plan.h"
#include "log_mel_index.h"
#include "parallel_work.h"
#include "rounding.h"

namespace avppc {
namespace {

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats allocate_floats(int64_t count) {
  const size_t bytes = round_up(static_cast<size_t>(count) * sizeof(float), 64);
  void* memory = std::aligned_alloc(64, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return Floats(static_cast<float*>(memory));
}

// Asks for pages of 2 MiB under the whole ones of them in memory that is about to be written, as numpy does: a large
// new tensor has no pages yet, and to fault on each of 4 KiB costs up to a third of a call.
void ask_for_huge_pages([[maybe_unused]] float* memory, [[maybe_unused]] int64_t count) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(memory), huge);
  const uintptr_t end = reinterpret_cast<uintptr_t>(memory + count) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may be refused
#endif
}

// Memory that a thread keeps from one call to the next, unless it is large.
class Scratch {
 public:
  // Room for so many floats, 64-byte aligned; what it held is lost.
  float* floats(int64_t count) {
    constexpr int64_t kept = int64_t{1} << 21;
    static thread_local Floats memory;
    static thread_local int64_t size = 0;
    if (count > kept) {
      large_ = allocate_floats(count);
      return large_.get();
    }
    if (count > size) {
      memory = allocate_floats(count);
      size = count;
    }
    return memory.get();
  }

 private:
  Floats large_;
};

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

  int64_t sample_bytes() const { return is_int16 ? sizeof(int16_t) : sizeof(float); }
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
  struct Range {
    const char *begin, *end;
  };

  // The samples in memory that a group reads, and what is to come into the cache while one is computed.
  Range samples_of(int64_t group) const;
  LogMelAhead ahead_of(int64_t group, bool has_next, float* target, int64_t count) const;
  void scale(int64_t clip, int64_t count) const;
  void transform_cosine(int64_t clip) const;
  void normalize(int64_t clip, int64_t count);

  const LogMelJob& job_;
  const LogMelConfig& config_;
  Scratch scratch_;
  float* input_;  // samples of the frames of one group
  LogMelWork work_;
  std::vector<double> mean_, deviation_;
  FlushDenormals flush_;
};

LogMelWorker::LogMelWorker(const LogMelJob& job) : job_(job), config_(job.tables.config) {
  const LogMelPlan& plan = job.tables.plan;
  const int64_t zero_row = int64_t{plan.row_count - 1} * plan.row_width;
  const int64_t zero_sample = int64_t{plan.window_samples} * LOG_MEL_MAX_DOUBLES;
  const auto aligned = [](int64_t floats) { return round_up(floats, 16); };
  const int64_t input = aligned(job.tables.input_floats()), rows = aligned(zero_row + plan.row_width);
  const int64_t conditioned = 2 * (zero_sample + LOG_MEL_MAX_DOUBLES);
  const int64_t spectrum = 2 * int64_t{2} * plan.fft.points * LOG_MEL_MAX_DOUBLES;
  const int64_t product = plan.chirp.slots != nullptr ? spectrum : 0;
  const int64_t power = int64_t{plan.points + 1} * LOG_MEL_GROUP, mel = aligned(plan.bands) * LOG_MEL_GROUP;
  input_ = scratch_.floats(input + rows + conditioned + spectrum + product + power + mel);
  work_.rows = input_ + input;
  work_.conditioned = reinterpret_cast<double*>(work_.rows + rows);
  work_.spectrum = work_.conditioned + conditioned / 2;
  work_.product = work_.spectrum + spectrum / 2;
  work_.power = reinterpret_cast<float*>(work_.product + product / 2);
  work_.mel = work_.power + power;
  std::fill_n(input_, input, 0.0f);
  std::fill_n(work_.rows + zero_row, plan.row_width, 0.0f);
  // With D doubles in a register the zero sample stands at D * window_samples: clear it for every D.
  std::fill_n(work_.conditioned, conditioned / 2, 0.0);
}

void LogMelWorker::run_groups(int64_t begin, int64_t end) {
  const auto load = AVPPC_CPU_SELECT(load_samples);
  const auto compute = AVPPC_CPU_SELECT(log_mel_group);
  const LogMelPlan& plan = job_.tables.plan;
  const int64_t hop = config_.hop_samples, window = config_.window_samples;
  const float silence = static_cast<float>(
      config_.needs_finish() ? config_.silence() : config_.silence() * config_.output_scale + config_.output_shift);
  SampleSource source{};
  source.is_int16 = job_.is_int16;
  source.padding = config_.padding;
  source.preemphasis = config_.preemphasis_scope == Scope::signal ? static_cast<float>(config_.preemphasis) : 0.0f;
  const bool in_place = plan.stride == hop && !source.is_int16 && source.preemphasis == 0.0f;
  const int64_t clip_bytes = job_.samples * job_.sample_bytes();

  for (int64_t number = begin; number < end; ++number) {
    const int64_t clip = number / job_.groups, first = number % job_.groups * LOG_MEL_GROUP;
    const int64_t room = std::min<int64_t>(LOG_MEL_GROUP, job_.frames - first);
    const int64_t count = std::clamp<int64_t>(job_.clip_frames(clip) - first, 0, room);
    float* target = job_.mel + (clip * job_.frames + first) * config_.bands;
    job_.largest[number] = -HUGE_VALF;
    if (count > 0) {
      source.clip = job_.clips + clip * clip_bytes;
      source.length = job_.length(clip);
      const int64_t start = config_.frames().first + first * hop;
      const float* input = input_;
      if (in_place && start >= 0 && start + job_.tables.input_floats() <= source.length) {
        input = static_cast<const float*>(source.clip) + start;
      } else if (plan.stride == hop) {
        load(source, start, (count - 1) * hop + window, input_);
      } else {
        for (int64_t frame = 0; frame < count; ++frame) {
          load(source, start + frame * hop, window, input_ + frame * plan.stride);
        }
      }
      job_.largest[number] = compute(plan, input, static_cast<int>(count), work_,
                                     ahead_of(number, number + 1 < end, target, count * config_.bands), target);
    }
    std::fill(target + count * config_.bands, target + room * config_.bands, silence);
  }
}

LogMelAhead LogMelWorker::ahead_of(int64_t group, bool has_next, float* target, int64_t count) const {
  LogMelAhead ahead{nullptr, nullptr, reinterpret_cast<char*>(target), reinterpret_cast<char*>(target + count)};
  if (has_next && job_.tables.plan.stride == config_.hop_samples) {  // else most of the samples are in no frame
    const Range next = samples_of(group + 1);
    ahead.read = std::max(next.begin, samples_of(group).end);  // groups of a clip share samples
    ahead.read_end = std::max(next.end, ahead.read);
  }
  return ahead;
}

LogMelWorker::Range LogMelWorker::samples_of(int64_t group) const {
  const int64_t clip = group / job_.groups, length = job_.length(clip), hop = config_.hop_samples;
  const int64_t begin = config_.frames().first + group % job_.groups * LOG_MEL_GROUP * hop;
  const int64_t end = begin + (LOG_MEL_GROUP - 1) * hop + config_.window_samples;
  const char* const samples = job_.clips + clip * job_.samples * job_.sample_bytes();
  return {samples + std::clamp<int64_t>(begin, 0, length) * job_.sample_bytes(),
          samples + std::clamp<int64_t>(end, 0, length) * job_.sample_bytes()};
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
  const float reference =
      std::isnan(largest) || config_.relative_to_max ? largest : 0.0f;  // NaN makes all the clip NaN
  const int64_t size = job_.frames * config_.bands;
  AVPPC_CPU_SELECT(scale_values)(job_.mel + clip * size, size, lowest, reference,
                                 static_cast<float>(config_.output_scale), static_cast<float>(config_.output_shift));
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
  const auto for_each = [&](const auto& body) {  // frame by frame, whatever the number of threads: sums are repeatable
    for (int64_t frame = 0; frame < count; ++frame) {
      for (int i = 0; i < features; ++i) body(values[frame * features + i], i);
    }
  };
  mean_.assign(features, 0.0);
  for_each([&](float value, int i) { mean_[i] += value; });
  for (double& mean : mean_) mean /= static_cast<double>(std::max<int64_t>(count, 1));
  deviation_.assign(features, 0.0);
  for_each([&](float value, int i) { deviation_[i] += (value - mean_[i]) * (value - mean_[i]); });
  for (double& deviation : deviation_) {
    deviation = std::sqrt(deviation / static_cast<double>(std::max<int64_t>(count - 1, 1))) + NORMALIZE_EPSILON;
  }
  for_each([&](float& value, int i) { value = static_cast<float>((value - mean_[i]) / deviation_[i]); });
  std::fill(values + count * features, values + job_.frames * features, 0.0f);
}

// work(worker, begin, end) for portions of 0 ... count, on torch's threads.
template <typename Work>
void share_out(const LogMelJob& job, int64_t count, int64_t portion, const Work& work) {
  const int64_t portions = ceil_div(count, portion);
  share_items(
      portions, torch::stable::get_num_threads(),
      [&](int64_t, const auto& next) {
        LogMelWorker worker(job);
        for (int64_t i = next(); i < portions; i = next()) {
          work(worker, i * portion, std::min((i + 1) * portion, count));
        }
      },
      [] {});
}

void run(const LogMelJob& job, int64_t clips) {
  constexpr int64_t portion = 8;  // groups: about 50 us of work
  const bool finish = job.tables.config.needs_finish();
  if (finish && clips >= torch::stable::get_num_threads()) {  // a clip is finished while it is in the cache
    share_out(job, clips, 1, [&](LogMelWorker& worker, int64_t clip, int64_t) {
      worker.run_groups(clip * job.groups, (clip + 1) * job.groups);
      worker.finish_clip(clip);
    });
    return;
  }
  share_out(job, clips * job.groups, portion,
            [](LogMelWorker& worker, int64_t begin, int64_t end) { worker.run_groups(begin, end); });
  if (finish) {
    share_out(job, clips, 1, [](LogMelWorker& worker, int64_t clip, int64_t) { worker.finish_clip(clip); });
  }
}

Tensor log_mel_cpu(const Tensor& waveform, const std::optional<Tensor>& lengths, const std::string& config) {
  check_dim("waveform", waveform, 2);
  check_contiguous("waveform", waveform);
  const bool is_int16 = waveform.scalar_type() == ScalarType::Short;
  if (!is_int16) check_dtype("waveform", waveform, ScalarType::Float);
  const int64_t clips = waveform.size(0), samples = waveform.size(1);
  const auto plan = find_log_mel_plan(config);
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
      AVPPC_CHECK(length_data[clip] >= 0 && length_data[clip] <= samples, "lengths must be from 0 to ", samples,
                  ", got ", length_data[clip]);
    }
  }
  Tensor out = torch::stable::new_empty(waveform, {clips, frames, plan->config.features()}, ScalarType::Float);
  const int64_t groups = ceil_div(frames, LOG_MEL_GROUP);
  const Floats largest = allocate_floats(clips * groups);
  float* const out_data = out.mutable_data_ptr<float>();
  const Floats bands = plan->config.mfcc > 0 ? allocate_floats(clips * frames * plan->config.bands) : nullptr;
  ask_for_huge_pages(out_data, clips * frames * plan->config.features());
  run({*plan, static_cast<const char*>(waveform.const_data_ptr()), length_data, is_int16, samples, frames, groups,
       out_data, bands ? bands.get() : out_data, largest.get()},
      clips);
  return out;
}

}  // namespace
}  // namespace avppc

STABLE_TORCH_LIBRARY_FRAGMENT(avppc, library) {
  library.def("log_mel(Tensor waveform, Tensor? lengths, str config) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(avppc, CPU, library) { library.impl("log_mel", TORCH_BOX(&avppc::log_mel_cpu)); }
