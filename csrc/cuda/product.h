// Tensor-core products of pieces of rows, in the precision asked for.
#pragma once

#include "launch.h"

namespace pyglobenc {
namespace {

// A float's leading 11 digits and the rest.
DEVICE void split(uint32_t x, uint32_t& high, uint32_t& low) {
    high = bits(round_tf32(from_bits(x)));
    low = bits(round_tf32(from_bits(x) - from_bits(high)));
}

// c += a b^T of 16 x 8 entries over a step: the left factor as mma takes it, a[0] and a[1], the right one as it lies, 4 bytes of row g
// each; which entries meet in which product doesn't matter if both sides agree. T float keeps float32's digits, tf32 tensor cores' own.
template <class T>
DEVICE void product(float (&c)[4], const Piece (&a)[2], const Piece& b) {
    UNROLL
    for (int s = 0; s < 2; ++s) {
        const uint32_t right[2] = {b.word[2 * s], b.word[2 * s + 1]};
        mma<T>(c, a[s].word, right);
    }
}

// Three products of tf32 keep 22 digits of float32's. They are summed from 0 and added to c as float32 is: tensor cores round their sums
// towards 0, which over a whole row would cost another 4 digits.
template <>
DEVICE void product<float>(float (&c)[4], const Piece (&a)[2], const Piece& b) {
    uint32_t high[2][4], low[2][4], b_high[2][2], b_low[2][2];
    UNROLL
    for (int s = 0; s < 2; ++s) {
        UNROLL
        for (int e = 0; e < 4; ++e) split(a[s].word[e], high[s][e], low[s][e]);
        UNROLL
        for (int e = 0; e < 2; ++e) split(b.word[2 * s + e], b_high[s][e], b_low[s][e]);
    }
    float sum[4] = {};
    UNROLL
    for (int s = 0; s < 2; ++s) mma<tf32>(sum, low[s], b_high[s]), mma<tf32>(sum, high[s], b_low[s]);
    UNROLL
    for (int s = 0; s < 2; ++s) mma<tf32>(sum, high[s], b_high[s]);
    UNROLL
    for (int e = 0; e < 4; ++e) c[e] += sum[e];
}

}  // namespace
}  // namespace pyglobenc
