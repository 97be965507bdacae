// A frame's crop as luma: pixels are summed as integers, so that one division is all the rounding there is.
#include "clips_kernel.h"

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

}  // namespace

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
