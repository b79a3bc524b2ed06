// Binds GlobEnc's ops to Python. These functions only turn tensors into arguments.
#pragma once

#include <pybind11/pybind11.h>

#include "../common/tensor.h"
#include "ops.h"

namespace pyglobenc {

template <void (*RUN)(const PairArgs&, bool, void*)>
void bind_pair_op(const pybind11::tuple& tensors, float scaling, int left, int right, int shares, bool exact,
                  uintptr_t stream) {
    PairArgs p;
    View* const views[] = {&p.q,           &p.k,         &p.lse,      &p.gram,      &p.cross,
                           &p.residual_sq, &p.rstd,      &p.key_mask, &p.rows,      &p.r,
                           &p.cu_seqlens,  &p.log_scale, &p.out,      &p.out_scale, &p.room};
    for (size_t index = 0; index < tensors.size(); ++index) *views[index] = view(tensors[index]);
    p.scaling = scaling;
    p.left = left;
    p.right = right;
    p.shares = shares;
    p.tile = choose_tile(int(p.q.shape[1]), int(p.k.shape[1]), int(p.q.shape[3]),
                         p.q.type == Type::f32 ? 4 : 2, shared_limit());
    RUN(p, exact, reinterpret_cast<void*>(stream));
}

inline pybind11::tuple bind_tile(int heads, int kv_heads, int head_dim, int size) {
    const PairTile tile = choose_tile(heads, kv_heads, head_dim, size, shared_limit());
    return pybind11::make_tuple(tile.groups * KEYS, tile.queries);
}

inline int64_t bind_room(int64_t batch, int heads, int64_t n, int64_t n_queries, int64_t rows, int shares,
                         bool packed_sequences) {
    return choose_room(batch, heads, n, n_queries, rows, shares, packed_sequences).size;
}

// The tensors are v, matrix, x, cross, out and out_cross. The matrix is [H, dh, ...].
template <void (*RUN)(const ValueArgs&, bool, void*)>
void bind_value_op(const pybind11::tuple& tensors, bool exact, uintptr_t stream) {
    ValueArgs p;
    View* const views[] = {&p.v, &p.matrix, &p.x, &p.cross, &p.out, &p.out_cross};
    for (size_t index = 0; index < tensors.size(); ++index) *views[index] = view(tensors[index]);
    p.n = int(p.v.shape[2]);
    p.heads = int(p.matrix.shape[0]);
    p.group = p.heads / int(p.v.shape[1]);
    p.head_dim = int(p.matrix.shape[1]);
    p.width = int(p.x ? p.cross.shape[2] : p.matrix.shape[2]);
    RUN(p, exact, reinterpret_cast<void*>(stream));
}

inline void bind_mapped_square(const pybind11::object& x, const pybind11::list& gammas, int width,
                               const pybind11::object& out, uintptr_t stream) {
    SquareArgs p = {view(x), {}, int(gammas.size()), width, static_cast<float*>(view(out).data)};
    if (p.count > SquareArgs::MAX_COUNT) throw pybind11::value_error("too many gammas");
    for (int k = 0; k < p.count; ++k) p.gammas[k] = static_cast<const float*>(view(gammas[k]).data);
    mapped_square(p, reinterpret_cast<void*>(stream));
}

inline void bind_proximity(const pybind11::object& alpha, const pybind11::object& f, const pybind11::object& y,
                           const pybind11::object& out, uintptr_t stream) {
    proximity({view(alpha), view(f), view(y), view(out)}, reinterpret_cast<void*>(stream));
}

inline void bind_globenc(pybind11::module_& m) {
    m.def("rollout_step", bind_pair_op<rollout_step>);
    m.def("pair_norms", bind_pair_op<pair_norms>);
    m.def("head_gram", bind_value_op<head_gram>);
    m.def("head_norms", bind_value_op<head_norms>);
    m.def("mapped_square", bind_mapped_square);
    m.def("proximity", bind_proximity);
    m.def("pair_tile", bind_tile,
          "Return the keys of a block and the queries of a tile on the current device; 0 keys if none fit.");
    m.def("pair_room", bind_room,
          "Return the floats of scratch memory that a call needs, from B, H, n, the number of queries, T or "
          "0, shares and whether sequences are packed.");
    m.attr("MAX_ROWS") = int(MAX_ROWS);
    m.attr("MAX_HEADS") = int(MAX_HEADS);
}

}  // namespace pyglobenc
