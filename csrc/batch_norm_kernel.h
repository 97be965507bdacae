// Batch norm and ReLU over rows of channels, a portion of the rows at a time; see batch_norm_kernel.cpp.
#pragma once

#include <cstdint>

#include "cpu_dispatch.h"

namespace avppc {

// Numbers in rows, one of each channel; float, or bfloat16.
struct ChannelRows {
  int64_t rows, channels;
  // Numbers that a kernel takes at a time, a multiple of `channels` up to MOST_PERIOD. What is given by channel below
  // holds so many numbers, those of the channels over and over.
  int64_t period;
  bool bfloat16;
};

constexpr int64_t MOST_PERIOD = 1024;  // sums of that many numbers stay in the first cache

// How a channel is normalised: (x - mean) * scale + bias, of `period` numbers each.
struct ChannelScales {
  const float *mean, *scale, *bias;
};

AVPPC_CPU_DECLARE(
    // Sums of x - pivot and of its square, [channels] each.
    void sum_channels(const void* x, ChannelRows shape, const float* pivot, float* sums, float* squares);

    // y = max(0, normalised x); NaN stays NaN.
    void normalise_relu(const void* x, ChannelRows shape, ChannelScales scales, void* y);

    // Of the gradient dz that the ReLU lets through: sums of dz and of dz * (x - mean), [channels] each.
    void sum_gradients(const void* dy, const void* x, ChannelRows shape, ChannelScales scales, float* sums,
                       float* products);

    // dx = scale * dz - level - slope * (x - mean); level and slope of `period` numbers.
    void spread_gradients(const void* dy, const void* x, ChannelRows shape, ChannelScales scales, const float* level,
                          const float* slope, void* dx);)

}  // namespace avppc
