// Values through a head's matrix, tile by tile: what head_gram and head_norms share.
//
// A block takes 64 tokens of a head, a warp 16 of them. The matrix goes through shared memory in pieces of 64 x 32; the product of values
// and matrix stays in registers, where it meets what it is multiplied with and is summed: n * d floats a head that are never written.
#pragma once

#include "product.h"
#include "values.h"

namespace pyglobenc {

namespace {

constexpr int DEPTH = 64, COLUMNS = 32, STRIDE = COLUMNS + 2;  // of the piece of the matrix; 4 rows lie 8 banks apart

// Where a warp works: its first token, and its values' rows.
struct Tokens {
    int b, head, first;
    const float* v;  // of the example and head

    DEVICE explicit Tokens(const ValueArgs& p) {
        const int blocks = (p.n + TOKENS - 1) / TOKENS;
        // heads with the most others after them first
        const int rest = block() / blocks, batch = int(p.v.shape[0]);
        b = rest % batch;
        head = rest / batch;
        first = block() % blocks * TOKENS + warp() * 16;
        v = values(p, head);
    }

    DEVICE const float* values(const ValueArgs& p, int of_head) const {
        return static_cast<const float*>(p.v.data) + b * p.v.stride[0] + of_head / p.group * p.v.stride[1];
    }

    DEVICE int row(int half) const { return first + lane() / 4 + 8 * half; }
};

// Rows of values as the left factor: rows g and g + 8, pieces t of each 16 d, from `start`.
DEVICE void load_values(const ValueArgs& p, const Tokens& tokens, int start, Piece (&out)[DEPTH / 16][2]) {
    UNROLL
    for (int c = 0; c < DEPTH / 16; ++c) {
        const int d = start + 16 * c + lane() % 4 * 4;
        Piece rows[2] = {};
        UNROLL
        for (int half = 0; half < 2; ++half)
            if (tokens.row(half) < p.n && d < p.v.shape[3])
                rows[half] = *reinterpret_cast<const Piece*>(tokens.v + tokens.row(half) * p.v.stride[2] + d);
        UNROLL
        for (int s = 0; s < 2; ++s)
            out[c][s] = Piece{{rows[0].word[2 * s], rows[1].word[2 * s], rows[0].word[2 * s + 1], rows[1].word[2 * s + 1]}};
    }
}

// sums += rows of (v matrix) . other, or of its square without other; matrix [dh, width] with rows `stride` apart.
template <class T>
DEVICE void add_products(const ValueArgs& p, const Tokens& tokens, const float* matrix, int64_t stride, int width, const float* other,
                         int64_t other_stride, float (&sums)[2]) {
    float* const held = reinterpret_cast<float*>(shared());
    Piece left[DEPTH / 16][2];
    for (int column = 0; column < width; column += COLUMNS) {
        float mixed[COLUMNS / 8][4] = {};
        for (int start = 0; start < p.head_dim; start += DEPTH) {
            barrier();
            for (int at = thread(); at < DEPTH * COLUMNS; at += threads()) {
                const int d = start + at / COLUMNS, e = column + at % COLUMNS;
                held[at / COLUMNS * STRIDE + at % COLUMNS] = d < p.head_dim && e < width ? matrix[d * stride + e] : 0.0f;
            }
            if (column == 0 || p.head_dim > DEPTH) load_values(p, tokens, start, left);
            barrier();
            UNROLL
            for (int c = 0; c < DEPTH / 16; ++c)
                UNROLL
                for (int e = 0; e < COLUMNS / 8; ++e) {
                    Piece right;
                    UNROLL
                    for (int word = 0; word < 4; ++word)
                        right.word[word] = bits(held[(16 * c + lane() % 4 * 4 + word) * STRIDE + 8 * e + lane() / 4]);
                    product<T>(mixed[e], left[c], right);
                }
        }
        UNROLL
        for (int e = 0; e < COLUMNS / 8; ++e)
            UNROLL
            for (int at = 0; at < 4; ++at) {
                const int row = tokens.row(at / 2), to = column + 8 * e + lane() % 4 * 2 + at % 2;
                const float with = !other ? mixed[e][at] : row < p.n && to < width ? other[row * other_stride + to] : 0.0f;
                sums[at / 2] = fmaf(mixed[e][at], with, sums[at / 2]);
            }
    }
}

// The rows' sums, over the lanes that share them.
DEVICE void add_lanes(float (&sums)[2]) {
    UNROLL
    for (int half = 0; half < 2; ++half)
        for (int mask = 1; mask < 4; mask *= 2) sums[half] += shuffle_xor(sums[half], mask);
}

inline int64_t value_blocks(const ValueArgs& p) { return (p.n + TOKENS - 1) / TOKENS * p.v.shape[0] * p.heads; }

constexpr int VALUE_BYTES = DEPTH * STRIDE * 4;

}  // namespace
}  // namespace pyglobenc
