// Multiplies values by a head's matrix, tile by tile. head_gram and head_norms share this code.
//
// A block takes 64 tokens of one head, and each of its warps takes 16 of them. The matrix is copied to shared
// memory in pieces of 64 x 32 entries. The product of values and matrix has n * d floats for each head. It
// stays in registers, where it is multiplied by the other factor and summed. T is the precision of the
// products, and V the type of the values and of the residual.
#pragma once

#include <type_traits>

#include "product.h"
#include "values.h"
#include "widen.h"

namespace pyglobenc {

namespace {

constexpr int DEPTH = 64, COLUMNS = 32;  // number of rows and columns of a piece of the matrix

// The precision of the parts that values are split into. Half precision is exact in one part of tf32.
template <class T, class V>
using ValuePrecision = std::conditional_t<sizeof(V) == 2, tf32, T>;

// The 16 tokens of a warp, from `first` on, and the rows of their values.
template <class V>
struct WarpTokens {
    int b, head, first;
    const V* v;  // values of the example and head

    DEVICE explicit WarpTokens(const ValueArgs& p) {
        const int blocks = (p.n + TOKENS - 1) / TOKENS;
        // The first heads have the most work, because G is computed for the heads after them. They come
        // first.
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

// Rows of values in parts, in the layout of the left factor of mma.
template <class T>
struct Values {
    uint32_t of[DEPTH / 16][PARTS<T>][2][4];
};

// Loads DEPTH columns of the values of the warp's rows g and g + 8, from column `start` on. This lane loads
// piece t of every 16 columns.
template <class T, class V>
DEVICE void load_values(const ValueArgs& p, const WarpTokens<V>& tokens, int start, Values<T>& out) {
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

// Returns where a piece holds the parts of two rows' entries in one column. Values that lanes read at the
// same time lie in different banks.
template <class T>
DEVICE uint32_t* held_at(int row, int column) {
    return reinterpret_cast<uint32_t*>(shared()) +
           (row / 2 * COLUMNS + (column ^ 4 / PARTS<T> * (row / 4 % 4))) * 2 * PARTS<T>;
}

// Copies a piece of the matrix to shared memory: DEPTH rows from `start` on, and COLUMNS columns from
// `column` on. Entries past the end of the matrix are 0.
template <class T>
DEVICE void hold_piece(const ValueArgs& p, const float* matrix, int64_t stride, int width, int start,
                       int column) {
    constexpr int APART = 2 * VALUE_THREADS / 32;  // rows between two pairs of rows of a warp
    constexpr int AT_ONCE = 4;                     // pairs of rows loaded at a time
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

// Adds the product of the values and the piece in shared memory to `mixed`.
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

// Adds the row sums of (v matrix) * other to `sums`. Without `other`, these are the row sums of (v matrix)^2.
// matrix is [dh, width], with rows `stride` apart. Sum is the type of products and sums; squares of floats
// need a type with a larger exponent.
template <class T, class V, class Sum>
DEVICE void add_products(const ValueArgs& p, const WarpTokens<V>& tokens, const float* matrix, int64_t stride,
                         int width, const V* other, int64_t other_stride, Sum (&sums)[2]) {
    Values<ValuePrecision<T, V>> left;
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

// Adds up the sums of the lanes that share a row.
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
