// Converts 16-bit floats to float32 exactly. The bit manipulation works with any compiler and on any device.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyglobenc {
namespace {

inline float as_float(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline float widen_bf16(uint16_t x) { return as_float(uint32_t(x) << 16); }

inline float widen_f16(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000u) << 16, exponent = (x >> 10) & 31u, fraction = x & 0x3ffu;
    if (exponent == 31) return as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
    // A subnormal number is fraction * 2^-24.
    const float magnitude = float(fraction) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
}

}  // namespace
}  // namespace pyglobenc
