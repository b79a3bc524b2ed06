// Defines products of matrices of bf16 on the tile registers of Intel's processors (AMX), and the same
// registers in plain C++, with which tests run these kernels on any processor that has AVX-512.
//
// A tile has 16 rows of 64 bytes. A float is a sum of up to three bf16, its parts, and a product of two
// floats is the sum of the products of their parts. Like the instructions' operands, parts below float32's
// smallest normal number count as 0.
#pragma once

#include "simd.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

constexpr int TILE = 16;  // rows of a tile, and its columns of 32 bits

// Returns the columns of 32 bits of a row of numbers: two bf16 each, and whole tiles.
static inline int64_t tile_width(int64_t numbers) { return (numbers + 2 * TILE - 1) / (2 * TILE) * TILE; }

// Returns the bf16 nearest to each number, as the upper half of a float, and subtracts it from the number. The
// remainders are exact, so that bf16 is one part, float16 is two parts, and float32 is three.
static inline Ints take_part(Floats& rest) {
    const Ints bits = reinterpret_cast<Ints>(rest);
    // The largest numbers would be rounded to infinity, and NaN to any number.
    const Ints rounded = (bits & 0x7fffffff) < 0x7f7f8000 ? bits + 0x7fff + (bits >> 16 & 1) : bits;
    const Ints part = rounded & ~0xffff;
    rest -= reinterpret_cast<Floats>(part);
    return part;
}

// Splits numbers into sums of `parts` bf16. Part p of numbers 2 c and 2 c + 1 is written to the 32 bits at
// out[p * step + c].
static inline void split(const float* numbers,  // [2 * TILE]
                         int parts, int64_t step, float* out) {
    for (int i = 0; i < 2 * TILE; i += W) {
        Floats rest;
        std::memcpy(&rest, numbers + i, sizeof rest);
        for (int p = 0; p < parts; ++p) {
            const Halves words = __builtin_convertvector(take_part(rest) >> 16, Halves);
            std::memcpy(reinterpret_cast<uint16_t*>(out + p * step) + i, &words, sizeof words);
        }
    }
}

#if TILES
#ifdef PYGLOBENC_EMULATE_TILES

// The registers of one thread. The instructions flush subnormal operands and results to zero.
struct EmulatedTiles {
    bool configured = false;
    uint32_t tile[8][TILE][TILE] = {};

    static float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
    static float half(uint32_t bits) {
        float out;
        std::memcpy(&out, &bits, sizeof out);
        return flush(out);
    }
    uint32_t (&at(int t))[TILE][TILE] {
        if (!configured) __builtin_trap();
        return tile[t];
    }
    void zero(int t) { std::memset(at(t), 0, sizeof tile[t]); }
    void load(int t, const void* from, int64_t bytes) {
        for (int r = 0; r < TILE; ++r)
            std::memcpy(at(t)[r], static_cast<const char*>(from) + r * bytes, sizeof tile[t][r]);
    }
    void store(int t, void* to, int64_t bytes) {
        for (int r = 0; r < TILE; ++r)
            std::memcpy(static_cast<char*>(to) + r * bytes, at(t)[r], sizeof tile[t][r]);
    }
    // Adds a b to c, as TDPBF16PS does: the products of even and of odd columns are summed apart.
    void multiply(int c, int a, int b) {
        for (int r = 0; r < TILE; ++r)
            for (int n = 0; n < TILE; ++n) {
                float even = 0, odd = 0, sum;
                for (int k = 0; k < TILE; ++k) {
                    const uint32_t x = at(a)[r][k], y = at(b)[k][n];
                    even = flush(std::fma(half(x << 16), half(y << 16), even));
                    odd = flush(std::fma(half(x & 0xffff0000u), half(y & 0xffff0000u), odd));
                }
                std::memcpy(&sum, &at(c)[r][n], sizeof sum);
                sum = flush(flush(sum) + flush(even + odd));
                std::memcpy(&at(c)[r][n], &sum, sizeof sum);
            }
    }
};
static thread_local EmulatedTiles emulated_tiles;

#define TILE_ZERO(t) emulated_tiles.zero(t)
#define TILE_LOAD(t, from, bytes) emulated_tiles.load(t, from, bytes)
#define TILE_STORE(t, to, bytes) emulated_tiles.store(t, to, bytes)
#define TILE_MULTIPLY(c, a, b) emulated_tiles.multiply(c, a, b)

// Configures the tile registers of this thread, as long as it exists.
struct TileRegisters {
    TileRegisters() { emulated_tiles.configured = true; }
    ~TileRegisters() { emulated_tiles.configured = false; }
};

#else

#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, bytes) _tile_loadd(t, from, bytes)
#define TILE_STORE(t, to, bytes) _tile_stored(t, to, bytes)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

struct TileRegisters {
    TileRegisters() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
        } config;
        // The intrinsic does not tell the compiler that it reads memory.
        asm volatile("" ::"r"(&config) : "memory");
        _tile_loadconfig(&config);
    }
    // Otherwise the system would save the registers at each change of threads.
    ~TileRegisters() { _tile_release(); }
};

#endif

// Computes out[r, i] = sum_c left[c, i] * right[r, c] for 16 rows and VT vectors of tokens. Rows of right lie
// right_step apart, and those of out lie `step` apart. Products of parts a and b with a + b > 2 are left out,
// since they are below float32's rounding. With two parts on both sides there are four products, with three
// parts there are six. One instruction does the work of 512 fused multiply-adds of 16 lanes: scores of 48
// keys, 64 queries and dh = 64 take 24 instructions from bfloat16 and 144 from float32, instead of 12,288.
template <int VT>
__attribute__((noinline)) static void tile_products(const float* left,  // [left_parts, width, I]
                                                    int left_parts,
                                                    const float* right,  // [TILE, right_parts, width]
                                                    int right_parts, int64_t right_step, int64_t width,
                                                    float* out,  // [TILE, I]
                                                    int64_t step) {
    // The intrinsics do not tell the compiler that they read memory.
    asm volatile("" ::: "memory");
    TILE_ZERO(0);
    if (VT > 1) TILE_ZERO(1);
    if (VT > 2) TILE_ZERO(2);
    if (VT > 3) TILE_ZERO(3);
    // The small products come first, so that the large sum is rounded less often.
    for (int b = right_parts - 1; b >= 0; --b)
        for (int a = left_parts - 1; a >= 0; --a) {
            if (a + b > 2) continue;
            for (int64_t c = 0; c < width; c += TILE) {
                const float* const x = left + (a * width + c) * I;
                TILE_LOAD(4, right + b * width + c, 4 * right_step);
                TILE_LOAD(5, x, 4 * I);
                TILE_MULTIPLY(0, 4, 5);
                if (VT > 1) {
                    TILE_LOAD(6, x + W, 4 * I);
                    TILE_MULTIPLY(1, 4, 6);
                }
                if (VT > 2) {
                    TILE_LOAD(7, x + 2 * W, 4 * I);
                    TILE_MULTIPLY(2, 4, 7);
                }
                if (VT > 3) {
                    TILE_LOAD(5, x + 3 * W, 4 * I);
                    TILE_MULTIPLY(3, 4, 5);
                }
            }
        }
    TILE_STORE(0, out, 4 * step);
    if (VT > 1) TILE_STORE(1, out + W, 4 * step);
    if (VT > 2) TILE_STORE(2, out + 2 * W, 4 * step);
    if (VT > 3) TILE_STORE(3, out + 3 * W, 4 * step);
}

#else

struct TileRegisters {};

#endif

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
