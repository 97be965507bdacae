// The loops of batch norm and ReLU. Numbers are taken a period of channels at a time, so that the vector registers are
// full whatever the number of channels; each is read and written once a loop.
#include "batch_norm_kernel.h"

#include "cpu_vectors.h"

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

typedef uint16_t vbfloat16 __attribute__((vector_size(CPU_LANES * sizeof(uint16_t))));

// `lanes` numbers as floats.
__attribute__((always_inline)) inline vfloat load_floats(const float* p, int64_t lanes) { return load(p, lanes); }

__attribute__((always_inline)) inline vfloat load_floats(const uint16_t* p, int64_t lanes) {
  vbfloat16 bits{};
  __builtin_memcpy(&bits, p, lanes * sizeof(uint16_t));
  return reinterpret_cast<vfloat>(__builtin_convertvector(bits, vuint) << 16);
}

__attribute__((always_inline)) inline void store_floats(float* p, vfloat x, int64_t lanes) { store(p, x, lanes); }

// The nearest bfloat16s, the even one of two.
__attribute__((always_inline)) inline void store_floats(uint16_t* p, vfloat x, int64_t lanes) {
  const vuint bits = reinterpret_cast<vuint>(x);
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = vuint{} + 0x7fc0;
  const vbfloat16 result = __builtin_convertvector(x == x ? rounded : nan, vbfloat16);
  __builtin_memcpy(p, &result, lanes * sizeof(uint16_t));
}

// body(number), a number of the type that x and y have.
template <class Body>
void with_type(ChannelRows shape, const Body& body) {
  if (shape.bfloat16) {
    body(uint16_t{});
  } else {
    body(float{});
  }
}

// body(i, j, lanes) for each register's worth of the rows: from number i on, the j-th of its period.
template <class Body>
__attribute__((always_inline)) inline void for_each_register(ChannelRows shape, const Body& body) {
  const int64_t numbers = shape.rows * shape.channels;
  for (int64_t first = 0; first < numbers; first += shape.period) {
    const int64_t count = numbers - first < shape.period ? numbers - first : shape.period;
    for_each_vector(count, [&](int64_t j, int64_t lanes) { body(first + j, j, lanes); });
  }
}

// add(i, j, lanes, sum, other) adds numbers i ..., the j-th ... of their period, to the two sums of their channels.
// Lanes beyond `lanes` are not looked at.
template <class Add>
__attribute__((always_inline)) inline void sum_by_channel(ChannelRows shape, float* first, float* second,
                                                          const Add& add) {
  float sums[MOST_PERIOD], others[MOST_PERIOD];
  for (int64_t j = 0; j < shape.period; ++j) sums[j] = others[j] = 0.0f;
  for_each_register(shape, [&](int64_t i, int64_t j, int64_t lanes) {
    vfloat sum = load(sums + j, lanes), other = load(others + j, lanes);
    add(i, j, lanes, sum, other);
    store(sums + j, sum, lanes);
    store(others + j, other, lanes);
  });
  for (int64_t channel = 0; channel < shape.channels; ++channel) {
    float sum = 0.0f, other = 0.0f;
    for (int64_t j = channel; j < shape.period; j += shape.channels) {
      sum += sums[j];
      other += others[j];
    }
    first[channel] = sum;
    second[channel] = other;
  }
}

// Of x as normalised by its channels: its distance from the mean, and the result before the ReLU.
struct Normalised {
  vfloat centred, z;
};

template <class Number>
__attribute__((always_inline)) inline Normalised normalise(const Number* x, ChannelScales scales, int64_t i, int64_t j,
                                                           int64_t lanes) {
  const vfloat centred = load_floats(x + i, lanes) - load(scales.mean + j, lanes);
  return {centred, centred * load(scales.scale + j, lanes) + load(scales.bias + j, lanes)};
}

// x where the ReLU lets z through: also where z is NaN.
inline vfloat through_relu(vfloat z, vfloat x) { return z <= 0.0f ? vfloat{} : x; }

}  // namespace

void sum_channels(const void* x, ChannelRows shape, const float* pivot, float* sums, float* squares) {
  with_type(shape, [=](auto number) {
    const auto* from = static_cast<const decltype(number)*>(x);
    sum_by_channel(shape, sums, squares, [=](int64_t i, int64_t j, int64_t lanes, vfloat& sum, vfloat& square) {
      const vfloat centred = load_floats(from + i, lanes) - load(pivot + j, lanes);
      sum += centred;
      square += centred * centred;
    });
  });
}

void normalise_relu(const void* x, ChannelRows shape, ChannelScales scales, void* y) {
  with_type(shape, [=](auto number) {
    const auto* from = static_cast<const decltype(number)*>(x);
    auto* to = static_cast<decltype(number)*>(y);
    for_each_register(shape, [=](int64_t i, int64_t j, int64_t lanes) {
      const vfloat z = normalise(from, scales, i, j, lanes).z;
      store_floats(to + i, through_relu(z, z), lanes);
    });
  });
}

void sum_gradients(const void* dy, const void* x, ChannelRows shape, ChannelScales scales, float* sums,
                   float* products) {
  with_type(shape, [=](auto number) {
    const auto* gradient = static_cast<const decltype(number)*>(dy);
    const auto* from = static_cast<const decltype(number)*>(x);
    sum_by_channel(shape, sums, products, [=](int64_t i, int64_t j, int64_t lanes, vfloat& sum, vfloat& product) {
      const Normalised x = normalise(from, scales, i, j, lanes);
      const vfloat dz = through_relu(x.z, load_floats(gradient + i, lanes));
      sum += dz;
      product += dz * x.centred;
    });
  });
}

void spread_gradients(const void* dy, const void* x, ChannelRows shape, ChannelScales scales, const float* level,
                      const float* slope, void* dx) {
  with_type(shape, [=](auto number) {
    const auto* gradient = static_cast<const decltype(number)*>(dy);
    const auto* from = static_cast<const decltype(number)*>(x);
    auto* to = static_cast<decltype(number)*>(dx);
    for_each_register(shape, [=](int64_t i, int64_t j, int64_t lanes) {
      const Normalised x = normalise(from, scales, i, j, lanes);
      const vfloat dz = through_relu(x.z, load_floats(gradient + i, lanes));
      const vfloat spread = load(level + j, lanes) + load(slope + j, lanes) * x.centred;
      store_floats(to + i, load(scales.scale + j, lanes) * dz - spread, lanes);
    });
  });
}

}  // namespace avppc::AVPPC_CPU_NAMESPACE
