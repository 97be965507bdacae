// avppc::log_mel for CUDA tensors. log_mel_block.h says what a block does; here are the kernels, their launches and
// the tables on the device. One launch; two where a clip's features depend on all its frames and do not fit one block.
#include <cuda_runtime.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "checks.h"
#include "log_mel_block.h"
#include "log_mel_launch.h"
#include "log_mel_tables.h"

#define AVPPC_CUDA_CHECK(call)                                                                     \
  do {                                                                                             \
    const cudaError_t error = (call);                                                              \
    AVPPC_CHECK(error == cudaSuccess, "log_mel: ", #call, " failed: ", cudaGetErrorString(error)); \
  } while (0)

namespace avppc {
namespace {

constexpr int MAX_THREADS = 8 * LOG_MEL_WARP;
constexpr int FINISH_THREADS = 512;

// The threads of the running block, as log_mel_block.h wants them.
struct DeviceThreads {
  __device__ int count() const { return blockDim.x; }
  template <typename Step>
  __device__ __forceinline__ void each(const Step& step) const {
    step(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <typename Step>
  __device__ __forceinline__ void each_lane(const Step& step) const {
    step(static_cast<int>(threadIdx.x) / LOG_MEL_WARP, static_cast<int>(threadIdx.x) % LOG_MEL_WARP);
    __syncwarp();
  }
};

template <typename Real>
__global__ void __launch_bounds__(MAX_THREADS, 2)
    log_mel_fwd_kernel(const __grid_constant__ LogMelArguments<Real> arguments,
                       const __grid_constant__ LogMelShared shared) {
  extern __shared__ __align__(16) char memory[];
  log_mel_fwd_block(arguments, blockIdx.x, memory, shared, DeviceThreads{});
}

// A block a clip: what needs all its frames.
__global__ void __launch_bounds__(FINISH_THREADS)
    log_mel_finish_kernel(const __grid_constant__ LogMelFinish finish, const __grid_constant__ LogMelFraming framing,
                          const int64_t* lengths, int64_t samples, int64_t frames, const float* maxima, int64_t chunks,
                          float* mel, float* out) {
  extern __shared__ __align__(16) char memory[];
  const int64_t clip = blockIdx.x;
  const int64_t given = lengths != nullptr ? lengths[clip] : samples;
  double* parts = reinterpret_cast<double*>(memory);
  double* statistics = parts + LOG_MEL_PARTS * finish.features;
  float* largest = reinterpret_cast<float*>(statistics + 2 * finish.features);
  log_mel_finish_block(finish, frames, framing.frames(given < samples ? given : samples), maxima + clip * chunks,
                       chunks, largest, parts, statistics, mel + clip * frames * finish.bands,
                       out + clip * frames * finish.features, DeviceThreads{});
}

template <typename Real>
struct DeviceTables {
  LogMelTables<Real> tables;
  LogMelFinish finish;
};

// The tables of a configuration on the current device: copied at their first use, kept. (A stream that is being
// captured into a graph cannot do that: call once before.) They are copied in the caller's stream, which alone is sure
// to read them later, and waited for, since the next call may come on another.
template <typename Real>
DeviceTables<Real> find_tables(const std::string& config, const LogMelConfig& parsed, int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, std::string>, DeviceTables<Real>> all;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = all.find({device, config});
  if (found != all.end()) return found->second;
  const LogMelTableMemory<Real> tables(parsed);
  const size_t size = tables.bytes().size();
  char* memory = nullptr;
  AVPPC_CUDA_CHECK(cudaMalloc(&memory, size));
  AVPPC_CUDA_CHECK(cudaMemcpyAsync(memory, tables.bytes().data(), size, cudaMemcpyHostToDevice, stream));
  AVPPC_CUDA_CHECK(cudaStreamSynchronize(stream));
  return all[{device, config}] = {tables.at(memory), tables.finish(memory)};
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  AVPPC_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

Tensor new_floats(const Tensor& like, int64_t first, int64_t second, int64_t third) {
  const std::array<int64_t, 3> shape{first, second, third};
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, ScalarType::Float);
}

template <typename Real>
void launch_log_mel(const Tensor& waveform, const int64_t* lengths, const std::string& text, const LogMelConfig& config,
                    Tensor& out, int device, cudaStream_t stream) {
  const DeviceTables<Real> tables = find_tables<Real>(text, config, device, stream);
  LogMelArguments<Real> a{};
  a.tables = tables.tables;
  a.finish = tables.finish;
  a.framing = config.frames();
  a.clips = waveform.const_data_ptr();
  a.lengths = lengths;
  a.signal_preemphasis = config.preemphasis_scope == Scope::signal ? static_cast<float>(config.preemphasis) : 0.0f;
  a.is_int16 = waveform.scalar_type() == ScalarType::Short;
  a.padding = config.padding;
  a.out = out.mutable_data_ptr<float>();

  const int64_t clips = waveform.size(0);
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int warps = plan_log_mel_blocks(a, waveform.size(1), most);
  AVPPC_CHECK(warps > 0, "log_mel: fft_size ", config.fft_size, " needs more shared memory than this device has");
  const int64_t blocks = a.whole ? clips : clips * a.chunks;
  AVPPC_CHECK(blocks < (int64_t{1} << 31), "log_mel: ", clips, " clips of ", a.frames,
              " frames are too many for one call");

  // Before `finish`, bands go where the features will be, unless those are others.
  const bool second = a.finish.needed && !a.whole;
  std::optional<Tensor> bands, maxima;
  if (second && a.finish.mfcc > 0) bands = new_floats(out, clips, a.frames, config.bands);
  if (second) maxima = new_floats(out, clips, a.chunks, 1);
  a.mel = bands ? bands->mutable_data_ptr<float>() : a.out;
  a.largest = maxima ? maxima->mutable_data_ptr<float>() : nullptr;
  a.tables.track_largest = a.tables.track_largest && (second || a.whole);

  const LogMelShared shared = log_mel_shared(a, warps);
  if (shared.size > 48 * 1024) {
    AVPPC_CUDA_CHECK(cudaFuncSetAttribute(log_mel_fwd_kernel<Real>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared.size)));
  }
  log_mel_fwd_kernel<Real><<<static_cast<unsigned>(blocks), warps * LOG_MEL_WARP, shared.size, stream>>>(a, shared);
  AVPPC_CUDA_CHECK(cudaGetLastError());
  if (!second) return;
  const int64_t chunks = a.tables.track_largest ? a.chunks : 0;
  const int64_t bytes = 8 * (LOG_MEL_PARTS + 2) * config.features() + 4 * FINISH_THREADS;
  log_mel_finish_kernel<<<static_cast<unsigned>(clips), FINISH_THREADS, bytes, stream>>>(
      a.finish, a.framing, lengths, a.samples, a.frames, a.largest, chunks, a.mel, a.out);
  AVPPC_CUDA_CHECK(cudaGetLastError());
}

Tensor log_mel_cuda(const Tensor& waveform, const std::optional<Tensor>& lengths, const std::string& text) {
  check_dim("waveform", waveform, 2);
  check_contiguous("waveform", waveform);
  if (waveform.scalar_type() != ScalarType::Short) check_dtype("waveform", waveform, ScalarType::Float);
  const LogMelConfig config = LogMelConfig::parse(text);
  AVPPC_CHECK(has_fft_plan(config.fft_size / 2), "fft_size must be at least 12 and have no prime factor above 5 on a ",
              "GPU, got ", config.fft_size);
  const int64_t clips = waveform.size(0), samples = waveform.size(1), frames = config.num_frames(samples);
  AVPPC_CHECK(clips > 0 && frames > 0, "waveform must have at least one clip and samples for one frame, got ", clips,
              " clips of ", samples, " samples");
  if (lengths.has_value()) {
    check_dtype("lengths", *lengths, ScalarType::Long);
    check_contiguous("lengths", *lengths);
    check_same_device("lengths", *lengths, "waveform", waveform);
    AVPPC_CHECK(lengths->numel() == clips, "lengths must have ", clips, " elements, got ", lengths->numel());
  }
  const int device = waveform.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  Tensor out = new_floats(waveform, clips, frames, config.features());
  const int64_t* length_data = lengths.has_value() ? lengths->const_data_ptr<int64_t>() : nullptr;
  // Double precision keeps quiet bands beside loud ones right, as on the CPU. GPUs for games do it 32 or 64 times
  // slower.
  const bool fast_doubles = device_attribute(cudaDevAttrSingleToDoublePrecisionPerfRatio, device) <= 2;
  const auto launch = fast_doubles ? launch_log_mel<double> : launch_log_mel<float>;
  launch(waveform, length_data, text, config, out, device, static_cast<cudaStream_t>(stream));
  return out;
}

}  // namespace
}  // namespace avppc

STABLE_TORCH_LIBRARY_IMPL(avppc, CUDA, library) { library.impl("log_mel", TORCH_BOX(&avppc::log_mel_cuda)); }
