// Registers full of numbers, for kernel sources (see cpu_dispatch.h): from and to memory, over a row of any length, and
// their sum.
#pragma once

#include <cstdint>

#include "cpu_dispatch.h"

namespace avppc::AVPPC_CPU_NAMESPACE {
namespace {

// A whole register of any vector type.
template <typename Vector, typename Number>
__attribute__((always_inline)) inline Vector load(const Number* source) {
  Vector value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}

template <typename Vector, typename Number>
__attribute__((always_inline)) inline void store(Number* target, Vector value) {
  __builtin_memcpy(target, &value, sizeof(value));
}

inline vfloat broadcast(float x) { return x - vfloat{}; }

// `count` lanes from memory, the others `fill`; a constant count of CPU_LANES is one instruction.
inline vfloat load(const float* p, int64_t count, float fill = 0.0f) {
  vfloat x = broadcast(fill);
  __builtin_memcpy(&x, p, count * sizeof(float));
  return x;
}

inline void store(float* p, vfloat x, int64_t count) { __builtin_memcpy(p, &x, count * sizeof(float)); }

// The sum of the lanes, in float or double, of halves and their halves.
template <typename Number>
Number total(vfloat x) {
  Number sums[CPU_LANES];
  for (int lane = 0; lane < CPU_LANES; ++lane) sums[lane] = x[lane];
  for (int width = CPU_LANES / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

// body(j, lanes) for each register's worth of 0..count-1; lanes is a constant but for the last.
template <class Body>
__attribute__((always_inline)) inline void for_each_vector(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + CPU_LANES <= count; j += CPU_LANES) body(j, int64_t{CPU_LANES});
  if (j < count) body(j, count - j);
}

}  // namespace
}  // namespace avppc::AVPPC_CPU_NAMESPACE
