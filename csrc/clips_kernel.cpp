// From stored pixels to what the encoders take. Crops: pixels are summed as integers, so that one division is all the
// rounding there is. Motion: sums of at most a frame in float, of frames in double.
#include "clips_kernel.h"

#include "cpu_vectors.h"

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

// The sums of a row of blocks, in sums[0 .. crop / block - 1].
void sum_blocks(const uint8_t* pixels, int64_t stride, int64_t crop, int64_t block, uint32_t* sums) {
  for (int64_t x = 0; x < crop; ++x) sums[x] = pixels[x];
  for (int64_t row = 1; row < block; ++row) {
    pixels += stride;
    for (int64_t x = 0; x < crop; ++x) sums[x] += pixels[x];
  }
  for (int64_t x = 0; x < crop / block; ++x) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < block; ++i) sum += sums[x * block + i];
    sums[x] = sum;
  }
}

void mirror_row(float* row, int64_t size) {
  for (int64_t left = 0, right = size - 1; left < right; ++left, --right) {
    const float value = row[left];
    row[left] = row[right];
    row[right] = value;
  }
}

double sum(const float* x, int64_t count) {
  vfloat sums{};
  for_each_vector(count, [&](int64_t i, int64_t lanes) { sums += load(x + i, lanes); });
  return total<double>(sums);
}

// Of x less `mean`, or less the means at its places. Lanes beyond the end add nothing.
double sum_of_squares(const float* x, float mean, int64_t count) {
  vfloat sums{};
  for_each_vector(count, [&](int64_t i, int64_t lanes) {
    const vfloat centred = load(x + i, lanes, mean) - mean;
    sums += centred * centred;
  });
  return total<double>(sums);
}

double sum_of_squares(const float* x, const float* means, int64_t count) {
  vfloat sums{};
  for_each_vector(count, [&](int64_t i, int64_t lanes) {
    const vfloat centred = load(x + i, lanes) - load(means + i, lanes);
    sums += centred * centred;
  });
  return total<double>(sums);
}

float contrast_of(const float* frame, float level, int64_t pixels) {
  return static_cast<float>(__builtin_sqrt(sum_of_squares(frame, level, pixels) / static_cast<double>(pixels)));
}

}  // namespace

void motion_frames_clip(const float* luma, int64_t frames, int64_t pixels, int64_t phase, int64_t stride, float* mean,
                        float* out) {
  for_each_vector(pixels, [&](int64_t i, int64_t lanes) {
    vfloat sums{};
    for (int64_t t = 0; t < frames; ++t) sums += load(luma + t * pixels + i, lanes);
    store(mean + i, sums / static_cast<float>(frames), lanes);
  });
  double squares = 0;
  for (int64_t t = 0; t < frames; ++t) squares += sum_of_squares(luma + t * pixels, mean, pixels);
  const float deviation = static_cast<float>(__builtin_sqrt(squares / static_cast<double>(frames * pixels))) + 0.02f;
  for (int64_t t = phase; t < frames; t += stride, out += 4 * pixels) {
    const float* here = luma + t * pixels;
    const float* before = t > 0 ? here - pixels : here;
    const float* after = t + 1 < frames ? here + pixels : here;
    const float level = static_cast<float>(sum(here, pixels) / static_cast<double>(pixels));
    const float contrast = contrast_of(here, level, pixels) + 1e-3f;
    for (int64_t i = 0; i < pixels; ++i) {
      out[4 * i] = (before[i] - mean[i]) / deviation;
      out[4 * i + 1] = (here[i] - mean[i]) / deviation;
      out[4 * i + 2] = (after[i] - mean[i]) / deviation;
      out[4 * i + 3] = (here[i] - level) / contrast;
    }
  }
}

void local_motion_frames_clip(const float* luma, int64_t frames, int64_t pixels, int64_t phase, int64_t stride,
                              int64_t reach, float* mean, float* out) {
  for (int64_t t = phase; t < frames; t += stride, out += 4 * pixels) {
    const int64_t first = t > reach ? t - reach : 0, end = frames - t > reach ? t + reach + 1 : frames;
    for_each_vector(pixels, [&](int64_t i, int64_t lanes) {
      vfloat sums{};
      for (int64_t near = first; near < end; ++near) sums += load(luma + near * pixels + i, lanes);
      store(mean + i, sums / static_cast<float>(end - first), lanes);
    });
    const float* here = luma + t * pixels;
    const float* before = t > 0 ? here - pixels : here;
    const float* after = t + 1 < frames ? here + pixels : here;
    const float level = static_cast<float>(sum(here, pixels) / static_cast<double>(pixels));
    const float contrast = contrast_of(here, level, pixels);
    const float still = contrast + 1e-3f, step = (contrast + 0.02f) / 4.0f;
    for (int64_t i = 0; i < pixels; ++i) {
      out[4 * i] = (before[i] - mean[i]) / step;
      out[4 * i + 1] = (here[i] - mean[i]) / step;
      out[4 * i + 2] = (after[i] - mean[i]) / step;
      out[4 * i + 3] = (here[i] - level) / still;
    }
  }
}

void crop_luma_frame(const uint8_t* pixels, int64_t stride, int64_t crop, int64_t block, bool mirror, uint32_t* sums,
                     float* out) {
  const int64_t side = crop / block;
  const float whole = static_cast<float>(255 * block * block);
  for (int64_t row = 0; row < side; ++row, out += side, pixels += block * stride) {
    if (block == 1) {
      for (int64_t x = 0; x < side; ++x) out[x] = pixels[x] / whole;
    } else if (block == 2) {
      const uint8_t* below = pixels + stride;
      for (int64_t x = 0; x < side; ++x) {
        out[x] = static_cast<float>(pixels[2 * x] + pixels[2 * x + 1] + below[2 * x] + below[2 * x + 1]) / whole;
      }
    } else {
      sum_blocks(pixels, stride, crop, block, sums);
      for (int64_t x = 0; x < side; ++x) out[x] = static_cast<float>(static_cast<int32_t>(sums[x])) / whole;
    }
    if (mirror) mirror_row(out, side);
  }
}

}  // namespace avppc::AVPPC_CPU_NAMESPACE
