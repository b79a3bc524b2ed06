// Defines tensor-core products of pieces of rows, in the requested precision.
#pragma once

#include "launch.h"

namespace pyglobenc {
namespace {

// The number of parts into which a float is split. T = float takes two parts of 11 bits each, which keep the
// float's digits. tf32 takes one, and tensor cores truncate it.
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

// Adds a b^T, 16 x 8 entries summed over one step, to c. The left factor, a[.][0] and a[.][1], has the layout
// of mma. The right factor has the layout of memory: each entry is 4 bytes of row g. The order of entries
// along d does not matter as long as both factors agree. A left factor that is exact in tf32 comes in 1 part.
//
// Three products of tf32, or two with an exact left factor, keep 22 of float32's 24 bits. Their sum starts
// from 0 and is added to c in float32. Tensor cores round sums towards 0, which would cost another 4 bits
// over a whole row.
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

// Write the parts of a left factor, and of a right one.
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
