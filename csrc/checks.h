// Checks of the operators' arguments: each message names the argument, what came and what is allowed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>  // TORCH_ERROR_CODE_CHECK; STABLE_TORCH_... is there from torch 2.13 on

#include <sstream>
#include <stdexcept>
#include <string>

// RuntimeError in Python, as STD_TORCH_CHECK gives it, but without the function, file and line of the machine that
// built.
#define AVPPC_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(avppc::join_message("avppc: ", __VA_ARGS__))

namespace avppc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string join_message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  AVPPC_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got ", tensor.dim());
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  AVPPC_CHECK(tensor.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
              torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  AVPPC_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_same_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  AVPPC_CHECK(tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
              " must be on the device of ", other_name);
}

}  // namespace avppc
