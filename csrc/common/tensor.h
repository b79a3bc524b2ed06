// Takes tensors as they are (data_ptr, shape, stride, dtype), without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "view.h"

namespace pyglobenc {

inline View view(const pybind11::handle& tensor) {
    static const std::pair<const char*, Type> types[] = {
        {"torch.float32", Type::f32}, {"torch.float16", Type::f16}, {"torch.bfloat16", Type::bf16}, {"torch.int64", Type::i64},
        {"torch.bool", Type::u8},       {"torch.float64", Type::f64}};
    View out;
    if (tensor.is_none()) return out;
    const std::string name = pybind11::str(tensor.attr("dtype"));
    const std::pair<const char*, Type>* found = nullptr;
    for (const auto& type : types)
        if (name == type.first) found = &type;
    const pybind11::tuple shape = tensor.attr("shape"), stride = tensor.attr("stride")();
    if (!found || shape.size() > 4) throw pybind11::type_error("unsupported tensor of " + name);
    out.type = found->second;
    out.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    for (size_t axis = 0; axis < shape.size(); ++axis) {
        out.shape[axis] = shape[axis].cast<int64_t>();
        out.stride[axis] = stride[axis].cast<int64_t>();
    }
    return out;
}

}  // namespace pyglobenc
