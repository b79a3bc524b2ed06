// Binds the relevance kernels to Python. These functions only turn tensors into pointers and sizes.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../common/tensor.h"
#include "relevance.h"

namespace pyglobenc {

template <class T = float>
T* data_of(const pybind11::handle& tensor) {
    return tensor.is_none() ? nullptr : static_cast<T*>(pointer(tensor));
}

inline int64_t count_of(const pybind11::handle& tensor) { return tensor.attr("numel")().cast<int64_t>(); }

inline void* stream_of(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

inline void bind_clone(const pybind11::list& parts, const pybind11::object& x, const pybind11::object& out,
                       uintptr_t stream) {
    CloneParts given = {{}, int(parts.size())};
    if (given.count > CloneParts::MAX_COUNT) throw pybind11::value_error("too many parts");
    for (int k = 0; k < given.count; ++k) given.each[k] = data_of(parts[k]);
    clone_relevance(given, data_of(x), data_of(out), count_of(x), stream_of(stream));
}

inline void bind_add(const pybind11::tuple& tensors, int examples, int64_t width, int longest,
                     float stabilizer, bool rescale, uintptr_t stream) {
    add_relevance({data_of(tensors[0]), data_of(tensors[1]), data_of(tensors[2]), data_of<int>(tensors[3]),
                   data_of<double>(tensors[4]), data_of(tensors[5]), data_of(tensors[6]), width, examples,
                   longest, stabilizer, rescale},
                  stream_of(stream));
}

// The tensors are x, weight, bound and flags.
inline LinearArgs linear_args(const pybind11::tuple& tensors) {
    const View weight = view(tensors[1]), flags = view(tensors[3]);
    return {data_of(tensors[0]),  static_cast<float*>(weight.data),
            data_of(tensors[2]),  static_cast<int32_t*>(flags.data),
            flags.shape[0],       weight.stride[0],
            weight.stride[1],     int(weight.shape[1]),
            int(weight.shape[0]), int(flags.shape[1])};
}

inline void bind_quotient(const pybind11::tuple& common, const pybind11::tuple& own, float least,
                          uintptr_t stream) {
    linear_quotient(
        {linear_args(common), data_of(own[0]), data_of(own[1]), data_of(own[2]), data_of(own[3]), least},
        stream_of(stream));
}

inline void bind_product(const pybind11::tuple& common, const pybind11::tuple& own, uintptr_t stream) {
    linear_product({linear_args(common), data_of(own[0]), data_of(own[1])}, stream_of(stream));
}

inline RelevanceArgs relevance_args(const pybind11::tuple& tensors, const pybind11::tuple& outputs,
                                    float scaling, float stabilizer, int left, int right, bool additive,
                                    int longest) {
    RelevanceArgs args = {};
    View* const views[] = {&args.q,   &args.k,        &args.v,    &args.s, &args.grad,
                           &args.lse, &args.key_mask, &args.rows, &args.w, &args.cu_seqlens};
    for (size_t index = 0; index < tensors.size(); ++index) *views[index] = view(tensors[index]);
    float** const floats[] = {&args.r_q, &args.r_k, &args.r_v, &args.step, &args.map};
    for (size_t index = 0; index < 5; ++index) *floats[index] = data_of(outputs[index]);
    args.sums = data_of<double>(outputs[5]);
    args.scaling = scaling;
    args.stabilizer = stabilizer;
    args.left = left;
    args.right = right;
    args.additive = additive;
    args.examples = int(args.cu_seqlens ? args.cu_seqlens.shape[0] - 1 : args.k.shape[0]);
    args.longest = longest;
    return args;
}

template <void (*RUN)(const RelevanceArgs&, void*)>
void bind_pairs(const pybind11::tuple& tensors, const pybind11::tuple& outputs, float scaling,
                float stabilizer, int left, int right, bool additive, int longest, uintptr_t stream) {
    RUN(relevance_args(tensors, outputs, scaling, stabilizer, left, right, additive, longest),
        stream_of(stream));
}

inline void bind_relevance(pybind11::module_& m) {
    m.def("clone_relevance", bind_clone);
    m.def("add_relevance", bind_add);
    m.def("add_relevance_parts", add_relevance_parts,
          "Return the largest number of partial sums, from the number of elements and of examples.");
    m.def("linear_quotient", bind_quotient);
    m.def("linear_product", bind_product);
    m.attr("LINEAR_STRIP") = LINEAR_STRIP;
    m.def("relevance_rows", bind_pairs<relevance_rows>);
    m.def("relevance_columns", bind_pairs<relevance_columns>);
    m.def("relevance_maps", bind_pairs<relevance_maps>);
    m.def("relevance_shared", relevance_shared,
          "Return the bytes of shared memory that these three kernels need for a head size.");
    m.attr("MAX_STEP_ROWS") = int(RelevanceArgs::MAX_STEP_ROWS);
}

}  // namespace pyglobenc
