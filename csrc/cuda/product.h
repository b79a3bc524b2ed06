// Tensor-core products of pieces of rows, in the requested precision.
#pragma once

#include "launch.h"

namespace pyglobenc {
namespace {

// Number of parts into which a float is split: two of 11 bits each for T = float, to keep its digits; one for
// tf32, which tensor cores truncate.
template <class T>
constexpr int PARTS = 1;
template <>
constexpr int PARTS<float> = 2;

template <class T>
DEVICE void split(uint32_t x, uint32_t (&parts)[PARTS<T>]) {
    parts[0] = x;
    if constexpr (PARTS<T> == 2) {
        parts[0] = bits(round_tf32(from_bits(x)));
        parts[1] = bits(round_tf32(from_bits(x) - from_bits(parts[0])));
    }
}

// Adds a b^T of 16 x 8 entries over one step to c. The left factor is laid out as mma takes it, a[.][0] and
// a[.][1]; the right one as it lies in memory, 4 bytes of row g each. The order of entries along d does not
// matter as long as both sides agree. A left factor that is exact in tf32 comes in 1 part.
//
// Three products of tf32, or two with such a left factor, keep 22 of float32's 24 bits. They are summed from
// 0 and added to c in float32, because tensor cores round their sums towards 0, which over a whole row would
// cost another 4 bits.
template <class T, int LEFT>
DEVICE void multiply(float (&c)[4], const uint32_t (&a)[LEFT][2][4], const uint32_t (&b)[PARTS<T>][4]) {
    if constexpr (PARTS<T> == 1) {
        UNROLL
        for (int s = 0; s < 2; ++s) {
            const uint32_t right[2] = {b[0][2 * s], b[0][2 * s + 1]};
            mma<T>(c, a[0][s], right);
        }
    } else {
        float sum[4] = {};
        UNROLL
        for (int s = 0; s < 2; ++s) {
            const uint32_t high[2] = {b[0][2 * s], b[0][2 * s + 1]}, low[2] = {b[1][2 * s], b[1][2 * s + 1]};
            if constexpr (LEFT == 2) mma<tf32>(sum, a[1][s], high);
            mma<tf32>(sum, a[0][s], low);
        }
        UNROLL
        for (int s = 0; s < 2; ++s) {
            const uint32_t high[2] = {b[0][2 * s], b[0][2 * s + 1]};
            mma<tf32>(sum, a[0][s], high);
        }
        UNROLL
        for (int e = 0; e < 4; ++e) c[e] += sum[e];
    }
}

// Return the parts of a left factor, and of a right one.
template <class T>
DEVICE void split(const Bytes16 (&a)[2], uint32_t (&parts)[PARTS<T>][2][4]) {
    UNROLL
    for (int at = 0; at < 8; ++at) {
        uint32_t of[PARTS<T>];
        split<T>(a[at / 4].word[at % 4], of);
        for (int part = 0; part < PARTS<T>; ++part) parts[part][at / 4][at % 4] = of[part];
    }
}

template <class T>
DEVICE void split(const Bytes16& b, uint32_t (&parts)[PARTS<T>][4]) {
    UNROLL
    for (int at = 0; at < 4; ++at) {
        uint32_t of[PARTS<T>];
        split<T>(b.word[at], of);
        for (int part = 0; part < PARTS<T>; ++part) parts[part][at] = of[part];
    }
}

template <class T>
DEVICE void product(float (&c)[4], const Bytes16 (&a)[2], const Bytes16& b) {
    uint32_t left[PARTS<T>][2][4], right[PARTS<T>][4];
    split<T>(a, left);
    split<T>(b, right);
    multiply<T>(c, left, right);
}

}  // namespace
}  // namespace pyglobenc
