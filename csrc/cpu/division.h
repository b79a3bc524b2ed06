// Defines the guarded division of the relevance rules, exactly as pyglobenc/backends/shared/safe_division.py
// does, and loops over arrays.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

constexpr float GUARD = 1e-9f;
// The number of elements that a thread takes at a time. Each such stretch of an array has its own sums.
constexpr int64_t STRETCH = 1 << 14;

// Returns a / safe(b), and 0 where b is 0. safe(b) is b + 1e-9, or 1e-9 where that sum is 0. With a
// stabilizer, safe(b) is b + stabilizer * sign(b).
static inline Floats safe_divide(Floats a, Floats b, float stabilizer) {
    Floats den;
    if (stabilizer != 0) {
        den = b < 0 ? b - stabilizer : b + stabilizer;
    } else {
        den = b + GUARD;
        den = den == 0 ? splat(GUARD) : den;
    }
    const Floats quotient = a / den;
    return b == 0 ? Floats{} : quotient;
}

// Returns the same for one number in double precision.
static inline double safe_divide(double a, double b) {
    if (b == 0) return 0;
    const double den = b + 1e-9;
    return a / (den == 0 ? 1e-9 : den);
}

// Calls body(i, count) for each vector of [first, last). The vector starts at i and has `count` lanes, which
// is a compile-time constant for whole vectors.
template <class Body>
static inline void vectors(int64_t first, int64_t last, const Body& body) {
    int64_t i = first;
    for (; i + W <= last; i += W) body(i, W);
    if (i < last) body(i, last - i);
}

// Calls body(stretch, first, last) for each stretch of [0, count), in parallel.
template <class Body>
static inline void stretches(int64_t count, int threads, const Body& body) {
    const int64_t parts = (count + STRETCH - 1) / STRETCH;
    threads = parts < 4 ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * STRETCH;
        body(part, first, first + STRETCH < count ? first + STRETCH : count);
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
