// avppc._C: what this build is, for `avppc doctor` and for the tests. Needs no torch.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu_dispatch.h"

namespace py = pybind11;

namespace {

py::list split(const std::string& text) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = AVPPC_BUILD_COMPILER;
  info["flags"] = AVPPC_BUILD_FLAGS;
  info["torch"] = AVPPC_BUILD_TORCH;
  info["cuda"] = std::string(AVPPC_BUILD_CUDA).empty() ? py::object(py::none()) : py::object(py::str(AVPPC_BUILD_CUDA));
  info["cuda_architectures"] = split(AVPPC_BUILD_CUDA_ARCHS);
  info["cpu_levels"] = split(AVPPC_BUILD_CPU_LEVELS);
  info["cpu_level"] = avppc::cpu_level_name(avppc::cpu_level());
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts and feature tables of the compiled extension.";
  module.def("build_info", &build_info,
             "Facts of this build: compiler, flags, torch, cuda (None: built without), cuda_architectures, cpu_levels\n"
             "(vector extensions compiled) and cpu_level (the one in use on this machine).");
}
