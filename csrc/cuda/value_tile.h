// Multiplies values by a head's matrix, tile by tile; head_gram and head_norms share it.
//
// A block takes 64 tokens of a head, a warp 16 of them. The matrix goes through shared memory in pieces of 64
// x 32. The product of values and matrix, n * d floats a head, stays in registers, where it is multiplied by
// the other factor and summed. T is the precision of the products, V the type of values and residual.
#pragma once

#include <type_traits>

#include "product.h"
#include "values.h"
#include "widen.h"

namespace pyglobenc {

namespace {

constexpr int DEPTH = 64, COLUMNS = 32;  // rows and columns of a piece of the matrix

// Precision into which values are split; half precision is exact in one part.
template <class T, class V>
using Left = std::conditional_t<sizeof(V) == 2, tf32, T>;

// The place of a warp: its first token, and the rows of its values.
template <class V>
struct Tokens {
    int b, head, first;
    const V* v;  // of the example and head

    DEVICE explicit Tokens(const ValueArgs& p) {
        const int blocks = (p.n + TOKENS - 1) / TOKENS;
        // Heads with the most other heads after them come first.
        const int rest = block() / blocks, batch = int(p.v.shape[0]);
        b = rest % batch;
        head = rest / batch;
        first = block() % blocks * TOKENS + warp() * 16;
        v = values(p, head);
    }

    DEVICE const V* values(const ValueArgs& p, int of_head) const {
        return static_cast<const V*>(p.v.data) + b * p.v.stride[0] + of_head / p.group * p.v.stride[1];
    }

    DEVICE int row(int half) const { return first + lane() / 4 + 8 * half; }
};

// Rows of values as the left factor, in parts.
template <class T>
struct Values {
    uint32_t of[DEPTH / 16][PARTS<T>][2][4];
};

// Rows g and g + 8, pieces t of each 16 d, from `start`.
template <class T, class V>
DEVICE void load_values(const ValueArgs& p, const Tokens<V>& tokens, int start, Values<T>& out) {
    UNROLL
    for (int c = 0; c < DEPTH / 16; ++c) {
        const int d = start + 16 * c + lane() % 4 * 4;
        Bytes16 rows[2] = {};
        UNROLL
        for (int half = 0; half < 2; ++half)
            if (tokens.row(half) < p.n && d < p.v.shape[3])
                rows[half] = load_four(tokens.v + tokens.row(half) * p.v.stride[2] + d);
        Bytes16 left[2];
        UNROLL
        for (int s = 0; s < 2; ++s)
            left[s] = Bytes16{
                {rows[0].word[2 * s], rows[1].word[2 * s], rows[0].word[2 * s + 1], rows[1].word[2 * s + 1]}};
        split<T>(left, out.of[c]);
    }
}

// Returns where a piece keeps the parts of two rows' entries of a column. Values that lanes read together lie
// in different banks.
template <class T>
DEVICE uint32_t* held_at(int row, int column) {
    return reinterpret_cast<uint32_t*>(shared()) +
           (row / 2 * COLUMNS + (column ^ 4 / PARTS<T> * (row / 4 % 4))) * 2 * PARTS<T>;
}

// Copies rows start to start + DEPTH - 1, and columns from `column` on, to shared memory, with zeros past the
// end of the matrix.
template <class T>
DEVICE void hold_piece(const ValueArgs& p, const float* matrix, int64_t stride, int width, int start,
                       int column) {
    constexpr int APART = 2 * VALUE_THREADS / 32,
                  AT_ONCE = 4;  // rows between a warp's pairs; number of pairs loaded at a time
    const int e = column + lane();
    const float* from = matrix + (start + 2 * warp()) * stride + e;
    ROLL for (int first = 2 * warp(); first < DEPTH;
              first += AT_ONCE * APART, from += AT_ONCE * APART * stride) {
        float entries[AT_ONCE][2];
        UNROLL
        for (int at = 0; at < 2 * AT_ONCE; ++at) {
            const int ahead = at / 2 * APART + at % 2;
            entries[at / 2][at % 2] =
                start + first + ahead < p.head_dim && e < width ? from[ahead * stride] : 0.0f;
        }
        UNROLL
        for (int at = 0; at < AT_ONCE; ++at) {
            uint32_t even[PARTS<T>], odd[PARTS<T>];
            split<T>(bits(entries[at][0]), even);
            split<T>(bits(entries[at][1]), odd);
            uint32_t* const to = held_at<T>(first + at * APART, lane());
            if constexpr (PARTS<T> == 1)
                *reinterpret_cast<Float2*>(to) = {from_bits(even[0]), from_bits(odd[0])};
            else
                *reinterpret_cast<Bytes16*>(to) = {{even[0], odd[0], even[1], odd[1]}};
        }
    }
}

// Adds the product of the values with the piece in shared memory to mixed.
template <class T, class L>
DEVICE void multiply_piece(const Values<L>& values, float (&mixed)[COLUMNS / 8][4]) {
    UNROLL
    for (int c = 0; c < DEPTH / 16; ++c) UNROLL
    for (int e = 0; e < COLUMNS / 8; ++e) {
        uint32_t right[PARTS<T>][4];
        UNROLL
        for (int pair = 0; pair < 2; ++pair) {
            const uint32_t* from = held_at<T>(16 * c + lane() % 4 * 4 + 2 * pair, 8 * e + lane() / 4);
            if constexpr (PARTS<T> == 1) {
                const Float2 rows = *reinterpret_cast<const Float2*>(from);
                right[0][2 * pair] = bits(rows.x), right[0][2 * pair + 1] = bits(rows.y);
            } else {
                const Bytes16 rows = *reinterpret_cast<const Bytes16*>(from);
                for (int at = 0; at < 4; ++at) right[at / 2][2 * pair + at % 2] = rows.word[at];
            }
        }
        multiply<T>(mixed[e], values.of[c], right);
    }
}

DEVICE float multiply_add(float x, float y, float sum) { return fmaf(x, y, sum); }
DEVICE double multiply_add(double x, double y, double sum) { return fma(x, y, sum); }

// Adds the row sums of (v matrix) * other, or of (v matrix)^2 without other, to sums. matrix is [dh, width]
// with rows `stride` apart; the rows of other are read in pieces. Sum is the type of products and sums:
// squares of floats have twice a float's exponent.
template <class T, class V, class Sum>
DEVICE void add_products(const ValueArgs& p, const Tokens<V>& tokens, const float* matrix, int64_t stride,
                         int width, const V* other, int64_t other_stride, Sum (&sums)[2]) {
    Values<Left<T, V>> left;
    for (int column = 0; column < width; column += COLUMNS) {
        float mixed[COLUMNS / 8][4] = {};
        for (int start = 0; start < p.head_dim; start += DEPTH) {
            barrier();
            hold_piece<T>(p, matrix, stride, width, start, column);
            if (column == 0 || p.head_dim > DEPTH) load_values(p, tokens, start, left);
            barrier();
            multiply_piece<T>(left, mixed);
        }
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = tokens.row(half), first = column + lane() % 4 * 2;
            const V* from = other + row * other_stride + first;
            UNROLL
            for (int e = 0; e < COLUMNS / 8; ++e) {
                const float x = mixed[e][2 * half], y = mixed[e][2 * half + 1];
                Float2 with = {x, y};
                if (other) with = row < p.n && first + 8 * e < width ? load_two(from + 8 * e) : Float2{0, 0};
                sums[half] = multiply_add(Sum(y), Sum(with.y), multiply_add(Sum(x), Sum(with.x), sums[half]));
            }
        }
    }
}

// Adds the row sums over the lanes that share a row.
template <class Sum>
DEVICE void add_lanes(Sum (&sums)[2]) {
    UNROLL
    for (int half = 0; half < 2; ++half)
        for (int mask = 1; mask < 4; mask *= 2) sums[half] += shuffle_xor(sums[half], mask);
}

inline int64_t value_blocks(const ValueArgs& p) {
    return (p.n + TOKENS - 1) / TOKENS * p.v.shape[0] * p.heads;
}

template <class T>
constexpr int VALUE_BYTES = DEPTH * COLUMNS * PARTS<T> * 4;

}  // namespace
}  // namespace pyglobenc
