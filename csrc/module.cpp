// avppc._C: what this build is, and the feature tables that the kernels use, for `avppc doctor` and for the tests.
// Needs no torch. A configuration comes as avppc.LogMelConfig.to_text() writes it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cpu_dispatch.h"
#include "log_mel_tables.h"

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

template <typename Number>
py::array_t<Number> to_array(const std::vector<Number>& values, std::vector<py::ssize_t> shape) {
  return py::array_t<Number>(std::move(shape), values.data());
}

py::array_t<double> window(const std::string& text) {
  const avppc::LogMelConfig config = avppc::LogMelConfig::parse(text);
  return to_array(avppc::make_window(config), {config.window_samples});
}

py::array_t<double> filter_bank(const std::string& text) {
  const avppc::LogMelConfig config = avppc::LogMelConfig::parse(text);
  return to_array(avppc::make_filter_bank(config), {config.bins(), config.bands});
}

py::array_t<float> cosine_transform(const std::string& text) {
  const avppc::LogMelConfig config = avppc::LogMelConfig::parse(text);
  return to_array(avppc::make_dct(config), {config.mfcc, config.bands});
}

int64_t num_frames(const std::string& text, int64_t num_samples) {
  return avppc::LogMelConfig::parse(text).num_frames(num_samples);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts and feature tables of the compiled extension.";
  module.def("build_info", &build_info,
             "Facts of this build: compiler, flags, torch, cuda (None: built without), cuda_architectures, cpu_levels\n"
             "(vector extensions compiled) and cpu_level (the one in use on this machine).");
  module.def("log_mel_window", &window, py::arg("config"), "[window_samples] float64.");
  module.def("log_mel_filter_bank", &filter_bank, py::arg("config"), "[fft_size / 2 + 1, bands] float64.");
  module.def("log_mel_cosine_transform", &cosine_transform, py::arg("config"), "[mfcc, bands] float32.");
  module.def("log_mel_num_frames", &num_frames, py::arg("config"), py::arg("num_samples"),
             "Frames of a clip. ValueError names the field when the configuration is not valid.");
}
