// Defines the product of small matrices in registers from which scores, Gram matrices and cross terms are
// computed.
#pragma once

#include "pack.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// Computes acc[j][v] = sum_c left[c, v] * right[j, c] for VT vectors of tokens and C rows, which lie `step`
// apart. The function is inlined, so that acc stays in registers.
template <int C, int VT, Unit UNIT>
__attribute__((always_inline)) static inline void products(const float* left,   // [width, I]
                                                           const float* right,  // [C, width]
                                                           int64_t step, int64_t width, Floats acc[C][VT]) {
    UNROLL for (int j = 0; j < C; ++j) UNROLL for (int v = 0; v < VT; ++v) acc[j][v] = Floats{};
    for (int64_t c = 0; c < width; ++c, left += I) {
        Floats x[VT];
        UNROLL for (int v = 0; v < VT; ++v) x[v] = load(left + v * W);
        UNROLL for (int j = 0; j < C; ++j) {
            const float y = right[j * step + c];
            UNROLL for (int v = 0; v < VT; ++v) {
                if constexpr (UNIT == Unit::single)
                    acc[j][v] += x[v] * splat(y);
                else
                    acc[j][v] = multiply_pairs(x[v], y, acc[j][v]);
            }
        }
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
