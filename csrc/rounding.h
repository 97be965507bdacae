// Whole numbers from 0 on, divided or rounded up. Static, so that kernels can use it: see cpu_dispatch.h.
#pragma once

#include <type_traits>

namespace avppc {

template <typename Integer>
static constexpr Integer ceil_div(Integer n, std::type_identity_t<Integer> by) {
  return (n + by - 1) / by;
}

template <typename Integer>
static constexpr Integer round_up(Integer n, std::type_identity_t<Integer> multiple) {
  return ceil_div(n, multiple) * multiple;
}

}  // namespace avppc
