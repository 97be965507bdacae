// What training does to a batch of clips before the encoders see it, on the CPU: spans are cut out of them, their
// pictures become luma, and luma becomes motion. Python would cut and crop clip by clip; torch writes and reads all
// pictures anew for each step of an expression.
#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "clips_kernel.h"
#include "rounding.h"

namespace avppc {
namespace {

constexpr int64_t BYTES_PER_THREAD = 1 << 17;  // that a thread at least reads: waking it takes some 5 us

Tensor new_like(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

// spans[r] = clips[r % N, starts[r] : starts[r] + length], r from 0 to R - 1; R is a multiple of N.
Tensor cut_spans(const Tensor& clips, const Tensor& starts, int64_t length) {
  AVPPC_CHECK(clips.dim() >= 2, "clips must have at least 2 dimensions, got ", clips.dim());
  check_contiguous("clips", clips);
  check_dim("starts", starts, 1);
  check_dtype("starts", starts, ScalarType::Long);
  check_contiguous("starts", starts);
  const int64_t count = clips.size(0), steps = clips.size(1), spans = starts.size(0);
  AVPPC_CHECK(clips.numel() > 0 && spans % count == 0, "starts must be ", count, " or a multiple, got ", spans);
  AVPPC_CHECK(length >= 1 && length <= steps, "length must be from 1 to ", steps, ", got ", length);
  const int64_t* first = starts.const_data_ptr<int64_t>();
  for (int64_t span = 0; span < spans; ++span) {
    AVPPC_CHECK(first[span] >= 0 && first[span] <= steps - length, "starts must be from 0 to ", steps - length,
                ", got ", first[span]);
  }
  std::vector<int64_t> shape(clips.sizes().begin(), clips.sizes().end());
  shape[0] = spans;
  shape[1] = length;
  Tensor out = new_like(clips, shape, clips.scalar_type());
  const int64_t step = clips.numel() / (count * steps) * clips.element_size();
  const auto* from = static_cast<const char*>(clips.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t size = length * step;
  torch::stable::parallel_for(0, spans, ceil_div(BYTES_PER_THREAD, size), [&](int64_t begin, int64_t end) {
    for (int64_t span = begin; span < end; ++span) {
      std::memcpy(to + span * size, from + (span % count * steps + first[span]) * step, size);
    }
  });
  return out;
}

void check_places(const char* name, const Tensor& places, int64_t count, int64_t last) {
  check_dtype(name, places, ScalarType::Long);
  check_contiguous(name, places);
  AVPPC_CHECK(places.dim() == 1 && places.size(0) == count, name, " must have shape [", count, "]");
  const int64_t* place = places.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < count; ++n) {
    AVPPC_CHECK(place[n] >= 0 && place[n] <= last, name, " must be from 0 to ", last, ", got ", place[n]);
  }
}

// Of each clip [T, H, W] the square from its row and column on, as luma from 0 to 1 reduced to `side` by block means;
// mirrored where flips says so.
Tensor crop_luma(const Tensor& video, const Tensor& rows, const Tensor& columns, const Tensor& flips, int64_t crop,
                 int64_t side) {
  check_dtype("video", video, ScalarType::Byte);
  check_dim("video", video, 4);
  const int64_t count = video.size(0), frames = video.size(1), height = video.size(2), width = video.size(3);
  AVPPC_CHECK(video.numel() > 0 && video.stride(3) == 1, "video must have rows without gaps, and not be empty");
  AVPPC_CHECK(crop >= 1 && crop <= std::min(height, width), "crop must be from 1 to ", std::min(height, width),
              ", got ", crop);
  AVPPC_CHECK(side >= 1 && side <= crop && crop % side == 0, "side must divide crop = ", crop, ", got ", side);
  check_places("rows", rows, count, height - crop);
  check_places("columns", columns, count, width - crop);
  check_dtype("flips", flips, ScalarType::Bool);
  check_contiguous("flips", flips);
  AVPPC_CHECK(flips.dim() == 1 && flips.size(0) == count, "flips must have shape [", count, "]");
  Tensor out = new_like(video, {count, frames, side, side}, ScalarType::Float);
  const auto* pixels = video.const_data_ptr<uint8_t>();
  const int64_t *row = rows.const_data_ptr<int64_t>(), *column = columns.const_data_ptr<int64_t>();
  const bool* flip = flips.const_data_ptr<bool>();
  const int64_t clip_stride = video.stride(0), frame_stride = video.stride(1), stride = video.stride(2);
  float* luma = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(
      0, count * frames, ceil_div(BYTES_PER_THREAD, crop * crop), [&](int64_t begin, int64_t end) {
        std::vector<uint32_t> sums(crop);
        for (int64_t frame = begin; frame < end; ++frame) {
          const int64_t clip = frame / frames;
          const uint8_t* first =
              pixels + clip * clip_stride + frame % frames * frame_stride + row[clip] * stride + column[clip];
          AVPPC_CPU_SELECT(crop_luma_frame)
          (first, stride, crop, crop / side, flip[clip], sums.data(), luma + frame * side * side);
        }
      });
  return out;
}

// Three frames of motion and the frame itself of every stride-th frame from phase on: [N, T, H, W] luma ->
// [N T', H, W, 4], the channels of a pixel side by side. frames_of_clip(luma, frames, pixels, mean, out) fills in a
// clip's.
template <typename FramesOfClip>
Tensor motion_of(const Tensor& video, int64_t stride, int64_t phase, const FramesOfClip& frames_of_clip) {
  check_dtype("video", video, ScalarType::Float);
  check_dim("video", video, 4);
  check_contiguous("video", video);
  const int64_t count = video.size(0), frames = video.size(1), height = video.size(2), width = video.size(3);
  AVPPC_CHECK(video.numel() > 0, "video must not be empty");
  AVPPC_CHECK(stride >= 1, "stride must be at least 1, got ", stride);
  AVPPC_CHECK(phase >= 0 && phase < frames, "phase must be from 0 to ", frames - 1, ", got ", phase);
  const int64_t taken = ceil_div(frames - phase, stride), pixels = height * width;
  Tensor out = new_like(video, {count * taken, height, width, 4}, ScalarType::Float);
  const float* luma = video.const_data_ptr<float>();
  float* channels = out.mutable_data_ptr<float>();
  const int64_t bytes = frames * pixels * static_cast<int64_t>(sizeof(float));
  torch::stable::parallel_for(0, count, ceil_div(BYTES_PER_THREAD, bytes), [&](int64_t begin, int64_t end) {
    std::vector<float> mean(pixels);
    for (int64_t clip = begin; clip < end; ++clip) {
      frames_of_clip(luma + clip * frames * pixels, frames, pixels, mean.data(), channels + clip * taken * pixels * 4);
    }
  });
  return out;
}

// Motion against the mean of the clip.
Tensor motion_frames(const Tensor& video, int64_t stride, int64_t phase) {
  return motion_of(video, stride, phase, [=](const float* luma, int64_t frames, int64_t pixels, float* mean, float* out) {
    AVPPC_CPU_SELECT(motion_frames_clip)(luma, frames, pixels, phase, stride, mean, out);
  });
}

// Motion against the mean of the frames around each.
Tensor local_motion_frames(const Tensor& video, int64_t reach, int64_t stride, int64_t phase) {
  AVPPC_CHECK(reach >= 1, "reach must be at least 1, got ", reach);
  return motion_of(video, stride, phase, [=](const float* luma, int64_t frames, int64_t pixels, float* mean, float* out) {
    AVPPC_CPU_SELECT(local_motion_frames_clip)(luma, frames, pixels, phase, stride, reach, mean, out);
  });
}

}  // namespace
}  // namespace avppc

STABLE_TORCH_LIBRARY_FRAGMENT(avppc, library) {
  library.def("cut_spans(Tensor clips, Tensor starts, int length) -> Tensor");
  library.def(
      "crop_luma(Tensor video, Tensor rows, Tensor columns, Tensor flips, int crop, int side) -> Tensor");
  library.def("motion_frames(Tensor video, int stride, int phase) -> Tensor");
  library.def("local_motion_frames(Tensor video, int reach, int stride, int phase) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(avppc, CPU, library) {
  library.impl("cut_spans", TORCH_BOX(&avppc::cut_spans));
  library.impl("crop_luma", TORCH_BOX(&avppc::crop_luma));
  library.impl("motion_frames", TORCH_BOX(&avppc::motion_frames));
  library.impl("local_motion_frames", TORCH_BOX(&avppc::local_motion_frames));
}
