// avppc._C: what this build is, and the feature tables that the kernels use, for `avppc doctor` and for the tests.
// Needs no torch, and of Python the limited API alone: one build serves every version from 3.10 on.
// A configuration comes as avppc.LogMelConfig.to_text() writes it.
#include <Python.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu_dispatch.h"
#include "log_mel_tables.h"

namespace {

struct Release {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Object = std::unique_ptr<PyObject, Release>;  // null: a Python error is set

Object text(const std::string& value) {
  return Object(PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size())));
}

Object split(const std::string& value) {
  Object parts(PyList_New(0));
  for (size_t begin = 0; parts && begin < value.size();) {
    const size_t end = std::min(value.find(',', begin), value.size());
    const Object part = text(value.substr(begin, end - begin));
    if (!part || PyList_Append(parts.get(), part.get())) return nullptr;
    begin = end + 1;
  }
  return parts;
}

// Numbers as a memoryview of format "d" or "f", which numpy and torch take without a copy; rows follow each other.
template <typename Number>
Object table(const std::vector<Number>& values) {
  const auto* bytes = reinterpret_cast<const char*>(values.data());
  const Object copy(PyBytes_FromStringAndSize(bytes, static_cast<Py_ssize_t>(values.size() * sizeof(Number))));
  const Object view(copy ? PyMemoryView_FromObject(copy.get()) : nullptr);
  return Object(view ? PyObject_CallMethod(view.get(), "cast", "s", sizeof(Number) == 8 ? "d" : "f") : nullptr);
}

// Calls a function that may throw and gives its result to Python.
template <typename Function>
PyObject* guarded(const Function& function) {
  try {
    return function().release();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The table that `make` makes of the configuration in the one argument.
template <typename Make>
PyObject* table_of(PyObject* argument, const Make& make) {
  return guarded([&]() -> Object {
    const char* config = PyUnicode_AsUTF8AndSize(argument, nullptr);
    if (!config) return nullptr;
    return table(make(avppc::LogMelConfig::parse(config)));
  });
}

PyObject* build_info(PyObject*, PyObject*) {
  return guarded([]() -> Object {
    const std::string cuda = AVPPC_BUILD_CUDA;
    std::pair<const char*, Object> facts[] = {
        {"compiler", text(AVPPC_BUILD_COMPILER)},
        {"flags", text(AVPPC_BUILD_FLAGS)},
        {"torch", text(AVPPC_BUILD_TORCH)},
        {"cuda", cuda.empty() ? Object(Py_BuildValue("")) : text(cuda)},
        {"cuda_architectures", split(AVPPC_BUILD_CUDA_ARCHS)},
        {"cpu_levels", split(AVPPC_BUILD_CPU_LEVELS)},
        {"cpu_level", text(avppc::cpu_level_name(avppc::cpu_level()))},
    };
    Object info(PyDict_New());
    if (!info) return nullptr;
    for (const auto& [name, value] : facts) {
      if (!value || PyDict_SetItemString(info.get(), name, value.get())) return nullptr;
    }
    return info;
  });
}

PyObject* log_mel_window(PyObject*, PyObject* config) { return table_of(config, avppc::make_window); }

PyObject* log_mel_filter_bank(PyObject*, PyObject* config) { return table_of(config, avppc::make_filter_bank); }

PyObject* log_mel_cosine_transform(PyObject*, PyObject* config) { return table_of(config, avppc::make_dct); }

PyObject* log_mel_num_frames(PyObject*, PyObject* arguments) {
  return guarded([&]() -> Object {
    const char* config = nullptr;
    long long num_samples = 0;
    if (!PyArg_ParseTuple(arguments, "sL:log_mel_num_frames", &config, &num_samples)) return nullptr;
    return Object(PyLong_FromLongLong(avppc::LogMelConfig::parse(config).num_frames(num_samples)));
  });
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "Facts of this build: compiler, flags, torch, cuda (None: built without), cuda_architectures, cpu_levels\n"
     "(vector extensions compiled) and cpu_level (the one in use on this machine)."},
    {"log_mel_window", log_mel_window, METH_O, "[window_samples] float64."},
    {"log_mel_filter_bank", log_mel_filter_bank, METH_O, "[fft_size / 2 + 1, bands] float64, flat."},
    {"log_mel_cosine_transform", log_mel_cosine_transform, METH_O, "[mfcc, bands] float32, flat."},
    {"log_mel_num_frames", log_mel_num_frames, METH_VARARGS,
     "Frames of a clip, from its configuration and number of samples. ValueError names the field when the\n"
     "configuration is not valid."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "Build facts and feature tables of the compiled extension.", 0, methods,
    nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
