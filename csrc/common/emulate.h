// Implements the primitives of simt.h on the CPU, where each thread is a fiber.
#pragma once

#include <cmath>

#include "fibers.h"
#include "half.h"

namespace pyglobenc {

inline int block() { return emulated::machine.block; }
inline int thread() { return emulated::machine.thread; }
inline int threads() { return emulated::machine.threads; }
inline int warp() { return thread() / 32; }
inline int lane() { return thread() % 32; }
inline char* shared() { return emulated::machine.shared; }
inline void barrier(int id, int count) {
    emulated::arrive(emulated::machine.gates[id], count, "barrier", true);
}
inline void barrier() { barrier(0, threads()); }
inline void warp_barrier() { emulated::exchange(0, "warp_barrier", true); }

template <class V>
V shuffle(V x, int from) {
    return emulated::taken<V>(emulated::exchange(x, "shuffle"), from & 31);
}

template <class V>
V shuffle_xor(V x, int mask) {
    return emulated::taken<V>(emulated::exchange(x, "shuffle_xor"), lane() ^ mask);
}

inline bool any(bool flag) {
    const char* slots = emulated::exchange(flag, "any");
    bool out = false;
    for (int from = 0; from < 32; ++from) out |= emulated::taken<bool>(slots, from);
    return out;
}

template <class V>
V load(const char* from) {
    return *reinterpret_cast<const V*>(from);
}

inline const char* settled(const char* p) { return p; }

inline uint32_t bits(float x) {
    uint32_t out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}

inline float from_bits(uint32_t x) { return as_float(x); }
inline float widen(bf16 x) { return widen_bf16(x.bits); }
inline float widen(f16 x) { return widen_f16(x.bits); }

template <class T>
T narrow(float x);
template <>
inline bf16 narrow<bf16>(float x) {
    if (std::isnan(x)) return {0x7fff};
    return {uint16_t((bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16)};
}
template <>
inline f16 narrow<f16>(float x) {
    const uint16_t sign = uint16_t(bits(x) >> 16 & 0x8000);
    const float size = std::fabs(x);
    if (std::isnan(x)) return {0x7fff};
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    // The number is rounded to the nearest multiple of the smallest step at its size, and ties to even.
    const int exponent = size < 6.103515625e-5f ? -14 : std::ilogb(size);
    const int steps = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return {uint16_t(sign | (size < 6.103515625e-5f ? steps : ((exponent + 14) << 10) + steps))};
}

template <class T>
uint32_t pack(float low, float high) {
    return uint32_t(narrow<T>(high).bits) << 16 | narrow<T>(low).bits;
}

template <class T>
Float2 unpack(uint32_t x) {
    return {widen(T{uint16_t(x)}), widen(T{uint16_t(x >> 16)})};
}

inline float round_tf32(float x) { return from_bits((bits(x) + 0x1000u) & 0xffffe000u); }

inline float exp2_approx(float x) { return x < -126 ? 0.0f : std::exp2(x); }
inline float sqrt_approx(float x) { return std::sqrt(x); }

namespace emulated {

struct Operands {
    uint32_t a[4], b[2];
};

// Rounds a sum of exact products towards 0, as tensor cores do (Fasi et al., Numerical behavior of NVIDIA
// tensor cores, 2021).
inline float towards_zero(double x) {
    const float out = float(x);
    return std::isfinite(out) && std::fabs(double(out)) > std::fabs(x) ? std::nextafter(out, 0.0f) : out;
}

// Returns entry (row, k) of the left factor, and entry (k, column) of the right one.
template <class T>
struct Entries {
    static constexpr int DEPTH = 16;
    static float half(uint32_t pair, int k) { return widen(T{uint16_t(k % 2 ? pair >> 16 : pair)}); }
    static float left(const char* slots, int row, int k) {
        return half(taken<Operands>(slots, row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k);
    }
    static float right(const char* slots, int k, int column) {
        return half(taken<Operands>(slots, column * 4 + k % 8 / 2).b[k / 8], k);
    }
};

template <>
struct Entries<tf32> {
    static constexpr int DEPTH = 8;
    static float cut(uint32_t x) { return from_bits(x & 0xffffe000u); }
    static float left(const char* slots, int row, int k) {
        return cut(taken<Operands>(slots, row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]);
    }
    static float right(const char* slots, int k, int column) {
        return cut(taken<Operands>(slots, column * 4 + k % 4).b[k / 4]);
    }
};

// Returns the 4 bytes that this lane holds of each of N matrices, or of their transposes.
template <int N>
void matrices(uint32_t (&r)[N], const void* row, bool transposed, const char* what) {
    if (lane() < 8 * N && uintptr_t(row) % 16) fail(std::string(what) + " of unaligned rows");
    const char* slots = exchange(row, what);
    for (int m = 0; m < N; ++m) {
        uint16_t pair[2];
        for (int c = 0; c < 2; ++c) {
            const int i = transposed ? lane() % 4 * 2 + c : lane() / 4,
                      j = transposed ? lane() / 4 : lane() % 4 * 2 + c;
            pair[c] = static_cast<const uint16_t*>(taken<const void*>(slots, 8 * m + i))[j];
        }
        r[m] = uint32_t(pair[1]) << 16 | pair[0];
    }
}

}  // namespace emulated

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    using E = emulated::Entries<T>;
    const emulated::Operands mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const char* slots = emulated::exchange(mine, "mma");
    for (int e = 0; e < 4; ++e) {
        double sum = c[e];
        for (int k = 0; k < E::DEPTH; ++k)
            sum += double(E::left(slots, lane() / 4 + e / 2 * 8, k)) *
                   E::right(slots, k, lane() % 4 * 2 + e % 2);
        c[e] = emulated::towards_zero(sum);
    }
}

template <int N>
void load_matrices(uint32_t (&r)[N], const void* row) {
    emulated::matrices(r, row, false, "load_matrices");
}

template <int N>
void load_matrices_transposed(uint32_t (&r)[N], const void* row) {
    emulated::matrices(r, row, true, "load_matrices_transposed");
}

template <int BYTES>
void copy_async(void* to, const void* from, bool ok) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "copies are of 4, 8 or 16 bytes");
    if (uintptr_t(to) % BYTES || (ok && uintptr_t(from) % BYTES))
        emulated::fail("copy_async of unaligned bytes");
    emulated::touch(to, BYTES, true);
    std::memset(to, 0xff, BYTES);
    emulated::machine.fibers[thread()].copies.back().push_back({to, ok ? from : nullptr, BYTES});
}

inline void commit_copies() { emulated::machine.fibers[thread()].copies.emplace_back(); }

template <int N>
void wait_copies() {
    auto& groups = emulated::machine.fibers[thread()].copies;
    while (int(groups.size()) > N + 1) {
        for (const emulated::Copy& copy : groups.front()) {
            emulated::touch(copy.to, copy.bytes, true);
            if (copy.from)
                std::memcpy(copy.to, copy.from, copy.bytes);
            else
                std::memset(copy.to, 0, copy.bytes);
        }
        groups.pop_front();
    }
}

}  // namespace pyglobenc
