// Tensors in and out of the stable ABI, and checks of op arguments.
//
// An error is std::invalid_argument, which Python sees as ValueError:
//   <op>: <argument> must be <expected>, got <actual>; <what to change>
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "dist_int8/numeric.h"

namespace dist_int8 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype " + std::to_string(static_cast<int>(type));
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

[[noreturn]] inline void fail(const char* op, const std::string& message) {
  throw std::invalid_argument(std::string(op) + ": " + message);
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline DataType data_type(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    case ScalarType::Half:
      return DataType::kFloat16;
    default:
      fail(op, std::string(argument) + " must be float32, bfloat16 or float16, got " +
                   name_of(tensor.scalar_type()) + "; convert it first");
  }
}

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor,
                        ScalarType expected) {
  if (tensor.scalar_type() == expected) return;
  fail(op, std::string(argument) + " must be " + name_of(expected) + ", got " +
               name_of(tensor.scalar_type()) + "; convert it first");
}

struct Dimension {
  const char* name;
  int64_t size;  // -1: any
};

// Shape and contiguity. The names of `expected` read like "[M, K=576]" in the error.
inline void check_shape(const char* op, const char* argument, const Tensor& tensor,
                        std::initializer_list<Dimension> expected) {
  bool matches = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (const Dimension& dimension : expected) {
    matches = matches && (dimension.size < 0 || tensor.size(i) == dimension.size);
    ++i;
  }
  if (!matches) {
    std::string text = "[";
    for (const Dimension& dimension : expected) {
      text += (text.size() == 1 ? "" : ", ") + std::string(dimension.name);
      if (dimension.size >= 0) text += "=" + std::to_string(dimension.size);
    }
    fail(op, std::string(argument) + " must be " + text + "], got " + shape_of(tensor) +
                 "; check the shapes of this layer");
  }
  if (!tensor.is_contiguous()) {
    fail(op,
         std::string(argument) + " must be contiguous, got strides of a view; call .contiguous()");
  }
}

inline void check_cpu(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_cpu()) {
    fail(op, std::string(argument) + " must be on the CPU, got another device; move it");
  }
}

inline void check_same_device(const char* op, const char* argument, const Tensor& tensor,
                              const Tensor& x) {
  if (tensor.is_cpu() != x.is_cpu() || tensor.get_device_index() != x.get_device_index()) {
    fail(op, std::string(argument) + " must be on the device of x, got another one; move it");
  }
}

// K is small enough for exact int32 sums.
inline void check_features(const char* op, int64_t K) {
  if (K > kMaxInputFeatures) {
    fail(op, "K must be at most " + std::to_string(kMaxInputFeatures) + ", got " +
                 std::to_string(K) + "; split the layer over K");
  }
}

// A contiguous tensor without going through the dispatcher.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like) {
  int64_t strides[4];
  int64_t stride = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes.begin()[i];
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

inline const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline const float* float_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

}  // namespace dist_int8
