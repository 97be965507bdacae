// Batch norm of training and the ReLU behind it as one operator, on the CPU: two passes over the numbers forward, two
// backward. torch takes the ReLU's gradient in a pass of its own and keeps a thread busy with as little as a channel.
// Sums are taken in portions of PORTION rows whatever the threads, and those of the portions in double and in order: the
// result has the same bits with any number of threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "batch_norm_kernel.h"
#include "checks.h"
#include "parallel_work.h"
#include "rounding.h"

namespace avppc {
namespace {

constexpr int64_t PORTION = 256;             // rows that are summed in float
constexpr int64_t NUMBERS_PER_ITEM = 1 << 16;  // that a thread takes at a time: some 20 us of work
constexpr int64_t LEAST_PERIOD = 64;            // numbers: few to add up at the end of a portion, many for a register

// Numbers by channel as the kernels take them: over and over, a period long.
std::vector<float> repeated(const std::vector<float>& channels, int64_t period) {
  std::vector<float> numbers(period);
  for (int64_t j = 0; j < period; ++j) numbers[j] = channels[j % channels.size()];
  return numbers;
}

// x [..., C], contiguous, as rows of channels.
ChannelRows rows_of(const char* name, const Tensor& x) {
  AVPPC_CHECK(x.dim() >= 2 && x.numel() > 0, name, " must have at least 2 dimensions and not be empty");
  check_contiguous(name, x);
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  if (!bfloat16) check_dtype(name, x, ScalarType::Float);
  const int64_t channels = x.size(x.dim() - 1);
  AVPPC_CHECK(channels <= MOST_PERIOD, name, " must have at most ", MOST_PERIOD, " channels, got ", channels);
  return {x.numel() / channels, channels, round_up(LEAST_PERIOD, channels), bfloat16};
}

// The channels' numbers of a tensor [C].
std::vector<float> numbers_of(const char* name, const Tensor& tensor, int64_t channels) {
  check_dtype(name, tensor, ScalarType::Float);
  check_contiguous(name, tensor);
  AVPPC_CHECK(tensor.dim() == 1 && tensor.size(0) == channels, name, " must have shape [", channels, "]");
  const float* first = tensor.const_data_ptr<float>();
  return {first, first + channels};
}

const void* row(const Tensor& x, ChannelRows shape, int64_t row) {
  const int64_t bytes = shape.channels * (shape.bfloat16 ? 2 : 4);
  return static_cast<const char*>(x.const_data_ptr()) + row * bytes;
}

void* row(Tensor& x, ChannelRows shape, int64_t at) {
  return const_cast<void*>(row(static_cast<const Tensor&>(x), shape, at));
}

// work(first, rows) for portions of the rows, as many at a time as make an item, on torch's threads.
template <class Work>
void share_rows(ChannelRows shape, const Work& work) {
  const int64_t portions = std::max<int64_t>(1, NUMBERS_PER_ITEM / (PORTION * shape.channels));
  const int64_t step = portions * PORTION, items = ceil_div(shape.rows, step);
  share_items(
      items, torch::stable::get_num_threads(),
      [&](int64_t, const auto& next) {
        for (int64_t item = next(); item < items; item = next()) {
          work(item * step, std::min(step, shape.rows - item * step));
        }
      },
      [] {});
}

// Two sums by channel over all rows. sum(first, rows, sums, others) takes those of a portion.
struct Sums {
  std::vector<double> first, second;
};

template <class Sum>
Sums sum_rows(ChannelRows shape, const Sum& sum) {
  const int64_t channels = shape.channels, portions = ceil_div(shape.rows, PORTION);
  std::vector<float> parts(portions * 2 * channels);
  share_rows(shape, [&](int64_t first, int64_t rows) {
    for (int64_t start = first; start < first + rows; start += PORTION) {
      float* sums = parts.data() + start / PORTION * 2 * channels;
      sum(start, std::min(PORTION, first + rows - start), sums, sums + channels);
    }
  });
  Sums sums{std::vector<double>(channels), std::vector<double>(channels)};
  for (int64_t portion = 0; portion < portions; ++portion) {
    const float* part = parts.data() + portion * 2 * channels;
    for (int64_t channel = 0; channel < channels; ++channel) {
      sums.first[channel] += part[channel];
      sums.second[channel] += part[channels + channel];
    }
  }
  return sums;
}

Tensor new_channels(const Tensor& like, const std::vector<float>& numbers) {
  const std::vector<int64_t> size{static_cast<int64_t>(numbers.size())};
  Tensor out = torch::stable::new_empty(like, {size.data(), size.size()}, ScalarType::Float);
  std::copy(numbers.begin(), numbers.end(), out.mutable_data_ptr<float>());
  return out;
}

// (y [..., C], mean [C], biased variance [C]) of x [..., C]: y = relu((x - mean) / sqrt(variance + eps) weight + bias).
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   double eps) {
  const ChannelRows shape = rows_of("x", x);
  const int64_t channels = shape.channels;
  const std::vector<float> weights = numbers_of("weight", weight, channels), biases = numbers_of("bias", bias, channels);
  // Each channel's mean over the first portion: sums of what is left of x lose no digits to a large mean.
  std::vector<float> pivot(channels), none(MOST_PERIOD), unused(channels);
  const int64_t few = std::min(PORTION, shape.rows);
  AVPPC_CPU_SELECT(sum_channels)
  (x.const_data_ptr(), {few, channels, shape.period, shape.bfloat16}, none.data(), pivot.data(), unused.data());
  for (float& value : pivot) value = std::isfinite(value) ? value / static_cast<float>(few) : 0.0f;
  const std::vector<float> pivots = repeated(pivot, shape.period);
  const Sums sums = sum_rows(shape, [&](int64_t first, int64_t rows, float* centred, float* squares) {
    AVPPC_CPU_SELECT(sum_channels)
    (row(x, shape, first), {rows, channels, shape.period, shape.bfloat16}, pivots.data(), centred, squares);
  });
  std::vector<float> mean(channels), variance(channels), scale(channels);
  for (int64_t channel = 0; channel < channels; ++channel) {
    const double count = static_cast<double>(shape.rows), offset = sums.first[channel] / count;
    const double spread = sums.second[channel] / count - offset * offset;
    mean[channel] = static_cast<float>(pivot[channel] + offset);
    variance[channel] = static_cast<float>(spread < 0.0 ? 0.0 : spread);  // NaN stays
    scale[channel] = static_cast<float>(weights[channel] / std::sqrt(static_cast<double>(variance[channel]) + eps));
  }
  const std::vector<float> means = repeated(mean, shape.period), scales = repeated(scale, shape.period),
                           shifts = repeated(biases, shape.period);
  Tensor y = torch::stable::empty_like(x);
  share_rows(shape, [&](int64_t first, int64_t rows) {
    AVPPC_CPU_SELECT(normalise_relu)
    (row(x, shape, first), {rows, channels, shape.period, shape.bfloat16}, {means.data(), scales.data(), shifts.data()},
     row(y, shape, first));
  });
  return {y, new_channels(weight, mean), new_channels(weight, variance)};
}

// (dx [..., C], dweight [C], dbias [C]) from dy [..., C] and what batch_norm_relu was given and gave.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                            const Tensor& bias, const Tensor& mean,
                                                            const Tensor& variance, double eps) {
  const ChannelRows shape = rows_of("x", x);
  const int64_t channels = shape.channels;
  check_contiguous("dy", dy);
  check_dtype("dy", dy, x.scalar_type());
  AVPPC_CHECK(dy.numel() == x.numel(), "dy must have as many numbers as x");
  const std::vector<float> weights = numbers_of("weight", weight, channels),
                           variances = numbers_of("variance", variance, channels);
  std::vector<float> scale(channels), level(channels), slope(channels), dweight(channels), dbias(channels);
  std::vector<double> inverse(channels);
  for (int64_t channel = 0; channel < channels; ++channel) {
    inverse[channel] = 1.0 / std::sqrt(static_cast<double>(variances[channel]) + eps);
    scale[channel] = static_cast<float>(weights[channel] * inverse[channel]);
  }
  const std::vector<float> means = repeated(numbers_of("mean", mean, channels), shape.period),
                           scales = repeated(scale, shape.period),
                           shifts = repeated(numbers_of("bias", bias, channels), shape.period);
  const ChannelScales normal{means.data(), scales.data(), shifts.data()};
  const Sums sums = sum_rows(shape, [&](int64_t first, int64_t rows, float* gradients, float* products) {
    AVPPC_CPU_SELECT(sum_gradients)
    (row(dy, shape, first), row(x, shape, first), {rows, channels, shape.period, shape.bfloat16}, normal, gradients,
     products);
  });
  for (int64_t channel = 0; channel < channels; ++channel) {
    const double count = static_cast<double>(shape.rows), product = sums.second[channel] * inverse[channel];
    dbias[channel] = static_cast<float>(sums.first[channel]);
    dweight[channel] = static_cast<float>(product);
    level[channel] = static_cast<float>(scale[channel] * sums.first[channel] / count);
    slope[channel] = static_cast<float>(scale[channel] * product * inverse[channel] / count);
  }
  const std::vector<float> levels = repeated(level, shape.period), slopes = repeated(slope, shape.period);
  Tensor dx = torch::stable::empty_like(x);
  share_rows(shape, [&](int64_t first, int64_t rows) {
    AVPPC_CPU_SELECT(spread_gradients)
    (row(dy, shape, first), row(x, shape, first), {rows, channels, shape.period, shape.bfloat16}, normal, levels.data(),
     slopes.data(), row(dx, shape, first));
  });
  return {dx, new_channels(weight, dweight), new_channels(weight, dbias)};
}

}  // namespace
}  // namespace avppc

STABLE_TORCH_LIBRARY_FRAGMENT(avppc, library) {
  library.def("batch_norm_relu(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  library.def(
      "batch_norm_relu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor variance, "
      "float eps) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(avppc, CPU, library) {
  library.impl("batch_norm_relu", TORCH_BOX(&avppc::batch_norm_relu));
  library.impl("batch_norm_relu_backward", TORCH_BOX(&avppc::batch_norm_relu_backward));
}
