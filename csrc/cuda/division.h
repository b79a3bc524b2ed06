// Defines the guarded division of the relevance rules, exactly as pyglobenc/backends/shared/safe_division.py
// does. Also loads and stores four floats at any alignment, and sums over a warp and over a block.
#pragma once

#include "../common/simt.h"

namespace pyglobenc {
namespace {

// Returns a / safe(b), and 0 where b is 0. safe(b) is b + 1e-9, or 1e-9 where that sum is 0. With a
// stabilizer, safe(b) is b + stabilizer * sign(b).
template <class T>
DEVICE T safe_divide(T a, T b, T stabilizer = 0) {
    T den = b + T(1e-9);
    if (den == 0) den = T(1e-9);
    if (stabilizer != 0) den = b < 0 ? b - stabilizer : b + stabilizer;
    return b == 0 ? T(0) : a / den;
}

DEVICE float magnitude(float x) { return from_bits(bits(x) & 0x7fffffffu); }
DEVICE double magnitude(double x) { return x < 0 ? -x : x; }

struct alignas(16) Float4 {
    float x[4];
};

DEVICE bool whole(const float* p, int64_t at, int64_t count) {
    return at + 4 <= count && reinterpret_cast<uintptr_t>(p + at) % 16 == 0;
}

// Loads p[at] to p[at + 3], with 0 from p[count] on.
DEVICE Float4 load_four(const float* p, int64_t at, int64_t count) {
    if (whole(p, at, count)) return *reinterpret_cast<const Float4*>(p + at);
    Float4 out;
    UNROLL
    for (int e = 0; e < 4; ++e) out.x[e] = at + e < count ? p[at + e] : 0.0f;
    return out;
}

DEVICE void store_four(float* p, int64_t at, int64_t count, const Float4& four) {
    if (whole(p, at, count)) {
        *reinterpret_cast<Float4*>(p + at) = four;
        return;
    }
    UNROLL
    for (int e = 0; e < 4; ++e)
        if (at + e < count) p[at + e] = four.x[e];
}

template <class T>
DEVICE T sum_over_warp(T x) {
    for (int step = 16; step; step /= 2) x += shuffle_xor(x, step);
    return x;
}

// Replaces every x by its sum over the threads of the block. The sum is always taken in the same order. It
// uses the first N * threads() / 32 entries of shared().
template <int N, class T>
DEVICE void sum_over_block(T (&x)[N]) {
    T* const of_warps = reinterpret_cast<T*>(shared());
    UNROLL
    for (int k = 0; k < N; ++k) {
        x[k] = sum_over_warp(x[k]);
        if (lane() == 0) of_warps[N * warp() + k] = x[k];
    }
    barrier();
    UNROLL
    for (int k = 0; k < N; ++k) {
        x[k] = 0;
        for (int from = 0; from < threads() / 32; ++from) x[k] += of_warps[N * from + k];
    }
}

}  // namespace
}  // namespace pyglobenc
