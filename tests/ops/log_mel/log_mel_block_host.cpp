// Runs the blocks of csrc/log_mel.cu on the host: every step for one thread after the other, in rising or falling
// order, with shared memory full of NaN at first. Compiled and called by test_log_mel_block.py.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "log_mel_block.h"
#include "log_mel_launch.h"

namespace avppc {
namespace {

constexpr int FINISH_THREADS = 512;

struct HostThreads {
  int threads;
  bool falling;

  int count() const { return threads; }
  template <typename Step>
  void each(const Step& step) const {
    for (int i = 0; i < threads; ++i) step(falling ? threads - 1 - i : i);
  }
  template <typename Step>
  void each_lane(const Step& step) const {
    each([&](int thread) { step(thread / LOG_MEL_WARP, thread % LOG_MEL_WARP); });
  }
};

std::vector<double> nan_memory(int64_t bytes) {
  return std::vector<double>(bytes / sizeof(double) + 2, std::numeric_limits<double>::quiet_NaN());
}

struct Call {
  const void* clips;
  const int64_t* lengths;
  int64_t clip_count, samples, max_shared;
  bool is_int16, falling;
  float* out;
};

template <typename Real>
int run(const LogMelConfig& config, const Call& call) {
  const LogMelTableMemory<Real> tables(config);
  const std::vector<char> memory = tables.bytes();
  LogMelArguments<Real> a{};
  a.tables = tables.at(memory.data());
  a.finish = tables.finish(memory.data());
  a.framing = config.frames();
  a.clips = call.clips;
  a.lengths = call.lengths;
  a.signal_preemphasis = config.preemphasis_scope == Scope::signal ? static_cast<float>(config.preemphasis) : 0.0f;
  a.is_int16 = call.is_int16;
  a.padding = config.padding;
  a.out = call.out;
  const int warps = plan_log_mel_blocks(a, call.samples, call.max_shared);
  if (warps == 0) return 0;
  const bool second = a.finish.needed && !a.whole;
  std::vector<float> bands(second && config.mfcc > 0 ? call.clip_count * a.frames * config.bands : 0);
  std::vector<float> maxima(second ? call.clip_count * a.chunks : 0, std::numeric_limits<float>::quiet_NaN());
  a.mel = bands.empty() ? a.out : bands.data();
  a.largest = maxima.data();
  a.tables.track_largest = a.tables.track_largest && (second || a.whole);

  const LogMelShared shared = log_mel_shared(a, warps);
  for (int64_t block = 0; block < (a.whole ? call.clip_count : call.clip_count * a.chunks); ++block) {
    std::vector<double> shared_memory = nan_memory(shared.size);
    log_mel_fwd_block(a, block, reinterpret_cast<char*>(shared_memory.data()), shared,
                      HostThreads{warps * LOG_MEL_WARP, call.falling});
  }
  for (int64_t clip = 0; second && clip < call.clip_count; ++clip) {
    std::vector<double> parts = nan_memory(8 * LOG_MEL_PARTS * a.finish.features);
    std::vector<double> statistics = nan_memory(8 * 2 * a.finish.features);
    std::vector<float> largest(FINISH_THREADS);
    const int64_t length = call.lengths != nullptr ? call.lengths[clip] : call.samples;
    log_mel_finish_block(a.finish, a.frames, a.framing.frames(length), maxima.data() + clip * a.chunks,
                         a.tables.track_largest ? a.chunks : 0, largest.data(), parts.data(), statistics.data(),
                         a.mel + clip * a.frames * config.bands, a.out + clip * a.frames * a.finish.features,
                         HostThreads{FINISH_THREADS, call.falling});
  }
  return second ? 2 : 1;
}

}  // namespace
}  // namespace avppc

// Returns the number of launches, 0 where max_shared is too small, -1 for a bad configuration.
extern "C" int log_mel_on_host(const char* config, const void* clips, int is_int16, const int64_t* lengths,
                               int64_t clip_count, int64_t samples, int64_t max_shared, int doubles, int falling,
                               float* out) {
  try {
    const avppc::LogMelConfig parsed = avppc::LogMelConfig::parse(config);
    const avppc::Call call{clips, lengths, clip_count, samples, max_shared, is_int16 != 0, falling != 0, out};
    return doubles ? avppc::run<double>(parsed, call) : avppc::run<float>(parsed, call);
  } catch (const std::invalid_argument&) {
    return -1;
  }
}
