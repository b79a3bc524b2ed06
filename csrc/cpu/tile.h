// Computes the norms of a tile of KEYS keys and V vectors of queries, from scores, probabilities and quadratic
// forms of all heads.
#pragma once

#include "pack.h"
#include "products.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// Writes the probabilities of one head, exp(scale * q_i . k_j + offset_i), to alpha[j * key_stride + i]. The
// function is not inlined, because the compiler keeps the sums in registers only in a separate function.
template <int VT, Unit UNIT>
__attribute__((noinline)) static void probabilities(const float* q,       // [width, I]
                                                    const float* k,       // [KEYS, width]
                                                    const float* offset,  // [I]
                                                    float scale, int64_t width, float* alpha,
                                                    int64_t key_stride) {
#if TILES
    constexpr int count = parts(UNIT);
    tile_products<VT>(q, count, k, count, width, width / count, alpha, key_stride);
#else
    Floats acc[J][VT];
    products<J, VT, UNIT>(q, k, width, width, acc);
    UNROLL for (int j = 0; j < J; ++j) UNROLL for (int v = 0; v < VT; ++v)
        store(alpha + j * key_stride + v * W, acc[j][v]);
#endif
    for (int j = 0; j < KEYS; ++j, alpha += key_stride)
        for (int v = 0; v < VT; ++v)
            store(alpha + v * W, exp(load(alpha + v * W) * scale + load(offset + v * W)));
}

// Returns the function that computes the probabilities from packed vectors of a unit.
template <int VT>
static auto probabilities_from(Unit unit) {
    if constexpr (TILES)
        return unit == Unit::one_part    ? probabilities<VT, Unit::one_part>
               : unit == Unit::two_parts ? probabilities<VT, Unit::two_parts>
                                         : probabilities<VT, Unit::three_parts>;
    else
        return unit == Unit::single ? probabilities<VT, Unit::single>
                                    : probabilities<VT, PAIRS ? Unit::pair : Unit::single>;
}

// Computes a^T G a of one key for VT vectors of queries. pack_form has written the form.
template <int VT>
static inline void quadratic_form(const float* alpha,  // [H, I]
                                  const float* form, int64_t H, Floats out[VT]) {
    for (int v = 0; v < VT; ++v) out[v] = Floats{};
    int64_t g = 0;
    for (; g + 1 < H; g += 2) {
        Floats even[VT] = {}, odd[VT] = {};
        const float* a = alpha + g * I;
        for (int64_t h = g; h < H; ++h, form += 2, a += I) {
            const Floats e = splat(form[0]), o = splat(form[1]);
            for (int v = 0; v < VT; ++v) {
                const Floats x = load(a + v * W);
                even[v] += e * x;
                odd[v] += o * x;
            }
        }
        for (int v = 0; v < VT; ++v) {
            out[v] += load(alpha + g * I + v * W) * even[v];
            out[v] += load(alpha + (g + 1) * I + v * W) * odd[v];
        }
    }
    if (g < H)
        for (int v = 0; v < VT; ++v) {
            const Floats x = load(alpha + g * I + v * W);
            out[v] += splat(form[0]) * x * x;
        }
}

// Adds the terms of the residual connection to the squared norms of the queries that are the key itself.
static inline void add_own(const PairArgs& args, int64_t b, int32_t key, const int32_t* position,
                           const float* alpha, float* sq) {
    const int64_t H = args.q.shape[1];
    for (int l = 0; l < I; ++l) {
        if (position[l] != key) continue;
        float cross = 0;
        for (int64_t h = 0; h < H; ++h) cross += alpha[h * I + l] * number(args.cross, b, key, h);
        sq[l] += 2 * cross + number(args.residual_sq, b, key);
    }
}

// Sets the norms of pairs outside the window to 0.
static inline void hide(int32_t key, const int32_t* position, int64_t left, int64_t right, float* norm) {
    for (int l = 0; l < I; ++l) {
        const int64_t ahead = int64_t(key) - position[l];
        if ((right >= 0 && ahead > right) || (left >= 0 && ahead < -left)) norm[l] = 0;
    }
}

// Says how a tile of keys [low_key, high_key] overlaps the window of a block of queries [low, high]: whether
// all pairs are hidden, some of them are, and whether a query may be one of the keys.
struct Overlap {
    bool hidden, partly, own;

    Overlap(const PairArgs& args, int64_t low_key, int64_t high_key, int64_t low, int64_t high) {
        const bool right = args.right >= 0, left = args.left >= 0;
        hidden = (right && low_key - high > args.right) || (left && high_key - low < -args.left);
        partly = (right && high_key - low > args.right) || (left && low_key - high < -args.left);
        own = args.cross && low_key <= high && low <= high_key;
    }
};

// Computes the norms of one tile from the probabilities, without the row scale.
template <int VT>
static void tile_norms(const PairArgs& args, const Example& example, const Overlap& overlap,
                       const int32_t* keys, int64_t count, const float* form, const int32_t* position,
                       const float* alpha, float* norm) {
    const int64_t H = args.q.shape[1], size = form_size(H);
    for (int64_t j = 0; j < count; ++j, form += size, alpha += H * I, norm += I) {
        Floats sq[VT];
        quadratic_form<VT>(alpha, form, H, sq);
        for (int v = 0; v < VT; ++v) store(norm + v * W, sq[v]);
        if (overlap.own) add_own(args, example.b, keys[j], position, alpha, norm);
        for (int v = 0; v < VT; ++v) store(norm + v * W, root(load(norm + v * W)));
        if (overlap.partly) hide(keys[j], position, args.left, args.right, norm);
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
