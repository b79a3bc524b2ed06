// Reads tensors through their Python attributes (data_ptr, shape, stride, dtype), without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "view.h"

namespace pyglobenc {

// Returns the type of a torch.dtype. A dtype is one object per process, so its name is compared only the
// first time.
inline Type type_of(const pybind11::handle& dtype) {
    static const std::pair<const char*, Type> types[] = {
        {"torch.float32", Type::f32}, {"torch.float16", Type::f16}, {"torch.bfloat16", Type::bf16},
        {"torch.int64", Type::i64},   {"torch.bool", Type::u8},     {"torch.float64", Type::f64},
        {"torch.int32", Type::i32}};
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

// Returns an attribute of a tensor, and the result of a method without arguments. pybind11's own accessors
// create an object for the name and a caster for each integer, which takes 1 us a tensor instead of 0.4.
inline pybind11::object attribute(const pybind11::handle& tensor, PyObject* name) {
    PyObject* const out = PyObject_GetAttr(tensor.ptr(), name);
    if (!out) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(out);
}

inline pybind11::object call(const pybind11::handle& tensor, PyObject* name) {
    PyObject* const out = PyObject_CallMethodNoArgs(tensor.ptr(), name);
    if (!out) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(out);
}

inline void* pointer(const pybind11::handle& tensor) {
    static PyObject* const POINTER = PyUnicode_InternFromString("data_ptr");
    return PyLong_AsVoidPtr(call(tensor, POINTER).ptr());
}

inline View view(const pybind11::handle& tensor) {
    static PyObject *const SHAPE = PyUnicode_InternFromString("shape"),
                           *const STRIDE = PyUnicode_InternFromString("stride"),
                           *const DTYPE = PyUnicode_InternFromString("dtype");
    View out;
    if (tensor.is_none()) return out;
    const pybind11::tuple shape = attribute(tensor, SHAPE), stride = call(tensor, STRIDE);
    if (shape.size() > 4)
        throw pybind11::type_error("unsupported tensor of " + std::to_string(shape.size()) + " axes");
    out.type = type_of(attribute(tensor, DTYPE));
    out.data = pointer(tensor);
    for (size_t axis = 0; axis < shape.size(); ++axis) {
        out.shape[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), axis));
        out.stride[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), axis));
    }
    return out;
}

}  // namespace pyglobenc
