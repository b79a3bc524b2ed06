// From a tile's probabilities to norms and on to the result: a lane is a key, the warps share out the queries.
//
// H (H + 1) / 2 + H multiply-adds a pair, in float32. Tensor cores would take three products of two halves each (16 bits do not keep the
// error rule), 48 of mma a 16 x 8 pairs, and the splitting, unpacking and transposing around them as many issue slots as the plain form.
#pragma once

#include "pair_tile.h"

namespace pyglobenc {
namespace {

BOTH int blocks_of(int heads) { return (heads + SIDE - 1) / SIDE; }

// Coefficients of one lane's key for HEADS heads, the upper triangle row by row.
template <int HEADS>
struct Form {
    static constexpr int SIZE = HEADS * (HEADS + 1) / 2;
    float of[SIZE];

    DEVICE void load(const float* packed) {  // [SIZE, KEYS]
        UNROLL
        for (int e = 0; e < SIZE; ++e) of[e] = packed[e * KEYS + lane()];
    }

    // Norm squared of query i.
    DEVICE float operator()(const PairArgs& p, const Place& place, int i) const {
        const float* alpha = place.floats(p.tile.alpha) + i * KEYS + column(i, lane());
        const int stride = p.tile.queries * KEYS;
        float a[HEADS], sum = 0;
        UNROLL
        for (int h = 0; h < HEADS; ++h) a[h] = h < p.heads ? alpha[h * stride] : 0.0f;
        int e = 0;
        UNROLL
        for (int h = 0; h < HEADS; ++h) {
            float row = of[e++] * a[h];
            UNROLL
            for (int g = h + 1; g < HEADS; ++g) row = fmaf(of[e++], a[g], row);
            sum = fmaf(row, a[h], sum);
        }
        return sum;
    }

    DEVICE void prepare(const PairArgs&, const Place&, const int*) {}
};

// More heads than registers hold: the warps share out blocks of 8 x 8 coefficients, each for all queries, and sum up in shared memory.
template <>
struct Form<WIDE> {
    const float* packed;

    DEVICE void load(const float* from) { packed = from; }

    // Its sum over one block, for heads of the rows and of the columns.
    DEVICE static float one(const float* alpha, const float* other, int stride, int rows, int columns, const float (&of)[SIDE][SIDE]) {
        float a[SIDE], b[SIDE], sum = 0;
        UNROLL
        for (int h = 0; h < SIDE; ++h) {
            a[h] = h < rows ? alpha[h * stride] : 0.0f;
            b[h] = h < columns ? other[h * stride] : 0.0f;
        }
        UNROLL
        for (int h = 0; h < SIDE; ++h) {
            float row = 0;
            UNROLL
            for (int g = 0; g < SIDE; ++g) row = fmaf(of[h][g], b[g], row);
            sum = fmaf(row, a[h], sum);
        }
        return sum;
    }

    DEVICE void prepare(const PairArgs& p, const Place& place, const int* positions) {
        const int side = blocks_of(p.heads), stride = p.tile.queries * KEYS;
        float* partial = place.floats(p.tile.partial) + place.warp * stride;
        int at = 0;
        for (int row = 0; row < side; ++row)
            for (int col = row; col < side; ++col, ++at) {
                if (at % p.tile.warps != place.warp) continue;
                float of[SIDE][SIDE];
                UNROLL
                for (int e = 0; e < SIDE * SIDE; ++e) of[e / SIDE][e % SIDE] = packed[(at * SIDE * SIDE + e) * KEYS + lane()];
                for (int i = 0; i < p.tile.queries; ++i) {
                    if (positions[i] < 0) continue;
                    const float* alpha = place.floats(p.tile.alpha) + i * KEYS + column(i, lane());
                    const float sum = one(alpha + row * SIDE * stride, alpha + col * SIDE * stride, stride, p.heads - row * SIDE,
                                          p.heads - col * SIDE, of);
                    float& to = partial[i * KEYS + lane()];
                    to = at < p.tile.warps ? sum : to + sum;
                }
            }
        barrier(1 + place.group, 32 * p.tile.warps);
    }

    DEVICE float operator()(const PairArgs& p, const Place& place, int i) const {
        const int side = blocks_of(p.heads), all = side * (side + 1) / 2;
        float sum = 0;
        for (int w = 0; w < p.tile.warps && w < all; ++w) sum += place.floats(p.tile.partial)[(w * p.tile.queries + i) * KEYS + lane()];
        return sum;
    }
};

// What the residual adds where the query is the key.
DEVICE float own_term(const PairArgs& p, const Place& place, int i) {
    const float* alpha = place.floats(p.tile.alpha) + i * KEYS + column(i, lane());
    float sum = 0;
    for (int h = 0; h < p.heads; ++h)
        sum = fmaf(alpha[h * p.tile.queries * KEYS], place.floats(p.tile.cross)[h * KEYS + lane()], sum);
    return 2 * sum + element<float>(p.residual_sq, place.b, place.key);
}

// Queries first to last - 1.
struct Seen {
    int first, last;

    // Those that a lane of the warp has.
    DEVICE Seen of_warp() const {
        Seen out = {first < last ? first : INT32_MAX, first < last ? last : 0};
        UNROLL
        for (int mask = 16; mask; mask /= 2) {
            const int low = shuffle_xor(out.first, mask), high = shuffle_xor(out.last, mask);
            out.first = low < out.first ? low : out.first;
            out.last = high > out.last ? high : out.last;
        }
        return out;
    }
};

// Queries that see this lane's key: those in its window and its sequence, none for padding.
DEVICE Seen seen_from(const PairArgs& p, int b, int key) {
    if (key >= p.n || (p.key_mask.data && !element<uint8_t>(p.key_mask, b, key))) return {0, 0};
    const int low = p.spans.data ? element<int>(p.spans, 0, key) : 0, high = p.spans.data ? element<int>(p.spans, 1, key) : p.n;
    return {key - p.right > low ? key - p.right : low, key + p.left + 1 < high ? key + p.left + 1 : high};
}

// One share of them, in whole tiles of queries.
DEVICE Seen share_of(const Seen& all, int share, int shares, int queries) {
    if (all.last <= all.first) return {0, 0};
    const int first = all.first / queries * queries, tiles = (all.last - first + queries - 1) / queries;
    const int each = (tiles + shares - 1) / shares * queries, start = first + share * each;
    return {start, start + each < all.last ? start + each : all.last};
}

// Norms of the tile's queries with this lane's key, taken up by the result. `row` is the first query's in the list of queries.
template <bool ROLLOUT, int HEADS>
DEVICE void take_queries(const PairArgs& p, const Place& place, const Seen& seen, const int* positions, const float* weights, int row,
                         int rows, const Form<HEADS>& form, float (&sums)[MAX_ROWS]) {
    for (int t = place.warp; t < p.tile.queries && row + t < rows; t += p.tile.warps) {
        const int i = positions[t];
        float norm = 0;
        if (i >= 0) {
            float square = form(p, place, t);
            // the same for all lanes: one query in n is met here
            if (p.cross.data && i / KEYS == place.block) square += i == place.key ? own_term(p, place, t) : 0.0f;
            norm = seen.first <= i && i < seen.last ? sqrt_approx(fmaxf(square, 0.0f)) : 0.0f;
        }
        if (!ROLLOUT) {
            if (place.key < p.n) element<float>(p.out, place.b, row + t, place.key) = norm * weights[t];
        } else if (p.n_rows == 1) {
            sums[0] = fmaf(norm, weights[t], sums[0]);
        } else {
            UNROLL
            for (int line = 0; line < MAX_ROWS; ++line) sums[line] = fmaf(norm, weights[line * p.tile.queries + t], sums[line]);
        }
    }
}

}  // namespace
}  // namespace pyglobenc
