// Takes tensors as they are (data_ptr, shape, stride, dtype), without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "view.h"

namespace pyglobenc {

// Type of a torch.dtype, which is one object for the life of the process: compared by name when it is first met only.
inline Type type_of(const pybind11::handle& dtype) {
    static const std::pair<const char*, Type> types[] = {
        {"torch.float32", Type::f32}, {"torch.float16", Type::f16}, {"torch.bfloat16", Type::bf16}, {"torch.int64", Type::i64},
        {"torch.bool", Type::u8},       {"torch.float64", Type::f64},  {"torch.int32", Type::i32}};
    static const PyObject* met[std::size(types)] = {};
    for (size_t index = 0; index < std::size(types); ++index)
        if (met[index] == dtype.ptr()) return types[index].second;
    const std::string name = pybind11::str(dtype);
    for (size_t index = 0; index < std::size(types); ++index)
        if (name == types[index].first) {
            met[index] = dtype.ptr();
            return types[index].second;
        }
    throw pybind11::type_error("unsupported tensor of " + name);
}

inline View view(const pybind11::handle& tensor) {
    View out;
    if (tensor.is_none()) return out;
    const pybind11::tuple shape = tensor.attr("shape"), stride = tensor.attr("stride")();
    if (shape.size() > 4) throw pybind11::type_error("unsupported tensor of " + std::to_string(shape.size()) + " axes");
    out.type = type_of(tensor.attr("dtype"));
    out.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    for (size_t axis = 0; axis < shape.size(); ++axis) {
        out.shape[axis] = shape[axis].cast<int64_t>();
        out.stride[axis] = stride[axis].cast<int64_t>();
    }
    return out;
}

}  // namespace pyglobenc
