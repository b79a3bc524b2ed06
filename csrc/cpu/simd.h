// Defines vectors of floats of the instruction set that this file is compiled for, and e^x on them.
//
// All functions are in a namespace named after the instruction set, so that the linker cannot confuse the
// functions of two sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// A vector has W lanes. A tile of V vectors of queries and J keys is kept in registers, and leaves enough of
// them for V loads and a broadcast.
#if defined(__AVX512F__)
constexpr int W = 16, V = 4, J = 6;
#elif defined(__AVX2__)
constexpr int W = 8, V = 2, J = 6;
#else
constexpr int W = 4, V = 2, J = 4;
#endif
constexpr int I = W * V;  // queries of a block

// Whether products are computed on tile registers, and the keys of a tile of scores.
#if defined(__AMX_BF16__)
#define TILES 1
constexpr int KEYS = 16;
#else
#define TILES 0
constexpr int KEYS = J;
#endif

// Used before a loop over a register tile. Without early unrolling, the compiler would keep the tile in
// memory.
#define UNROLL _Pragma("GCC unroll 8")

typedef float Floats __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));

// Loads and stores a vector at an address that is aligned to the vector.
static inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }
static inline Floats splat(float x) { return x - Floats{}; }

// Loads up to W floats; the remaining lanes are 0.
static inline Floats load_some(const float* p, int64_t count) {
    Floats out = {};
    std::memcpy(&out, p, sizeof(float) * (count < W ? count : W));
    return out;
}

static inline void store_some(float* p, Floats x, int64_t count) {
    std::memcpy(p, &x, sizeof(float) * (count < W ? count : W));
}

static inline Ints magnitude_bits(Floats x) { return reinterpret_cast<Ints>(x) & 0x7fffffff; }
static inline Floats magnitude(Floats x) { return reinterpret_cast<Floats>(magnitude_bits(x)); }

// Converts 16-bit floats exactly.
static inline Floats widen_bf16(Halves x) {
    return reinterpret_cast<Floats>(__builtin_convertvector(x, Ints) << 16);
}

static inline Floats widen_f16(Halves x) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)x);
#else
    const Ints wide = __builtin_convertvector(x, Ints), bits = (wide & 0x7fff) << 13;
    // The exponents' biases differ by 112. Infinity and NaN have the largest exponent, also in float32.
    const Ints normal = bits + (bits >= 0x0f800000 ? Ints{} + (224 << 23) : Ints{} + (112 << 23));
    // A subnormal number is fraction * 2^-24, which is the last bit of 2^-14 + fraction * 2^-24.
    const Ints least = Ints{} + (113 << 23);
    const Floats subnormal = reinterpret_cast<Floats>(bits + least) - reinterpret_cast<Floats>(least);
    const Floats magnitude = bits < 0x00800000 ? subnormal : reinterpret_cast<Floats>(normal);
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(magnitude) | (wide & 0x8000) << 16);
#endif
}

static inline float sum(Floats x) {
    // The lanes are added in pairs, so that the order is the same for every vector length.
    float lanes[W];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int half = W / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
}

// Interleaves the lanes of a and b, from lane FROM on.
template <int FROM, size_t... L>
static inline Floats interleave(Floats a, Floats b, std::index_sequence<L...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, int(FROM + L / 2 + L % 2 * W)...);
#else
    return __builtin_shuffle(a, b, Ints{int(FROM + L / 2 + L % 2 * W)...});
#endif
}

// Transposes a W * W square. A round moves the last bit of the lane's number into the row's number, and the
// first bit of the row's number into the lane's.
static inline void transpose(Floats rows[W]) {
    constexpr auto lanes = std::make_index_sequence<W>();
    for (int round = 1; round < W; round *= 2) {
        Floats next[W];
        for (int r = 0; r < W / 2; ++r) {
            next[2 * r] = interleave<0>(rows[r], rows[r + W / 2], lanes);
            next[2 * r + 1] = interleave<W / 2>(rows[r], rows[r + W / 2], lanes);
        }
        for (int r = 0; r < W; ++r) rows[r] = next[r];
    }
}

// Whether one instruction multiplies and adds two bf16 in the 32 bits of a lane.
#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
static inline Floats multiply_pairs(Floats x, float pair, Floats sum) {
    int32_t bits;
    std::memcpy(&bits, &pair, sizeof bits);
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)(Ints{} + bits));
}
#else
constexpr bool PAIRS = false;
#endif

// Returns max(x, 0). NaN stays NaN, and -inf gives NaN: a sum that overflowed may stand for any number.
static inline Floats positive_part(Floats x) { return x - (x < 0 ? x : Floats{}); }

// Returns the square root of the positive part of x.
static inline Floats root(Floats x) {
    x = positive_part(x);
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

// Returns e^x. The relative error is below 9e-8 + 3e-9 * |x| where the result is normal. Subnormal results
// are rounded, -inf gives 0, inf and large x give inf, NaN stays NaN. Uses a minimax polynomial of degree 6
// on [-ln 2 / 2, ln 2 / 2] with an error of 3.8e-9.
static inline Floats exp(Floats x) {
#if defined(__AVX512F__)
    // If either operand is NaN, the instruction returns the second one.
    x = _mm512_max_ps(splat(-110.0f), x);
    const Floats n = _mm512_roundscale_ps(x * 1.44269504f, 0);
#else
    x = x < -110.0f ? splat(-110.0f) : x;
    x = x > 89.5f ? splat(89.5f) : x;
    const Floats shifted =
        x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
    const Floats n = shifted - 12582912.0f;
#endif
#if defined(__FMA__)
    const Floats r = x - n * 0.693147182f;
#else
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // the first product is exact
#endif
    Floats p = splat(1.38145923e-3f);
    p = p * r + 8.36871024e-3f;
    p = p * r + 4.16683877e-2f;
    p = p * r + 1.66665207e-1f;
    p = p * r + 4.99999935e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, n);
#else
    // Two factors, because a single power of two cannot reach the subnormal numbers.
    const Ints whole = reinterpret_cast<Ints>(shifted) - 0x4b400000, half = whole >> 1;
    const Floats first = reinterpret_cast<Floats>((half + 127) << 23),
                 second = reinterpret_cast<Floats>((whole - half + 127) << 23);
    return p * first * second;
#endif
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
