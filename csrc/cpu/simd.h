// Vectors of floats of the instruction set that this file is compiled for, and 2^x on them.
//
// Everything lives in a namespace named after the instruction set: the linker must never take one set's function for another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// W lanes; a register tile of V vectors of queries times J keys leaves registers for V loads and a broadcast
#if defined(__AVX512F__)
constexpr int W = 16, V = 4, J = 6;
#elif defined(__AVX2__)
constexpr int W = 8, V = 2, J = 6;
#else
constexpr int W = 4, V = 2, J = 4;
#endif
constexpr int I = W * V;  // queries of a block

typedef float Floats __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));

static inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }  // p aligned to the vector
static inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }
static inline Floats splat(float x) { return x - Floats{}; }

static inline float sum(Floats x) {
    // pairwise, the same order for every length of the vector
    float lanes[W];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int half = W / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
}

// Root of x, 0 where x is negative; NaN stays.
static inline Floats root(Floats x) {
    x = x < 0 ? Floats{} : x;
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#else
    Floats out;
    for (int l = 0; l < W; ++l) out[l] = __builtin_sqrtf(x[l]);
    return out;
#endif
}

// 2^x, relative error below 1.2e-7 (1 ulp) where the result is normal; inf, 0 and NaN as the limits say, subnormal results rounded.
// Minimax polynomial of degree 6 on [-0.5, 0.5], its own error 1.9e-9.
static inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
    const Floats f = _mm512_reduce_ps(x, 0), whole = x - f;
#else
    // beyond these the result is 0 or inf; written so that NaN passes
    x = x < -160.0f ? splat(-160.0f) : x;
    x = x > 129.0f ? splat(129.0f) : x;
    const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
    const Floats f = x - (shifted - 12582912.0f);
#endif
    Floats p = splat(1.53458122e-4f);
    p = p * f + 1.33999312e-3f;
    p = p * f + 9.61848896e-3f;
    p = p * f + 5.55032878e-2f;
    p = p * f + 2.40226469e-1f;
    p = p * f + 6.93147206e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, whole);
#else
    // two factors: one power of two can't reach the subnormals
    const Ints n = reinterpret_cast<Ints>(shifted) - 0x4b400000, half = n >> 1;
    const Floats first = reinterpret_cast<Floats>((half + 127) << 23), second = reinterpret_cast<Floats>((n - half + 127) << 23);
    return p * first * second;
#endif
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
