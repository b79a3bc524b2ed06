// Turns the probabilities of a tile into norms and adds them to the result. Each lane has one key, and the
// warps divide the pairs of queries among themselves.
//
// A (query, key) pair takes H (H + 1) / 2 + H multiply-adds in float32. Tensor cores would not be faster. To
// keep float32's digits, alpha and G would have to be split in two and multiplied three times. For 16 x 8
// pairs of 12 heads that is 48 mma, and another 350 instructions to split, unpack and add the lanes. The
// plain form takes 360 instructions in all. With shuffles instead of shared memory, the tile of a warp would
// be so small that reading the queries becomes the limit.
//
// The following costs were counted in the sm_90 code for BERT-base in bfloat16; they were not measured. A
// pair takes 2.4 instructions up to alpha, 3.5 after it and 0.3 for its tile. At 4 instructions a cycle that
// is 1.6 cycles of a multiprocessor. Shared memory and L1 move 96 bytes for alpha and 48 each for keys and
// queries, which is 1.5 cycles at 128 bytes a cycle. The 12 exponentials take 0.75 cycles, and the products
// about 0.6.
#pragma once

#include "pair_tile.h"

namespace pyglobenc {
namespace {

BOTH int blocks_of(int heads) { return (heads + SIDE - 1) / SIDE; }

// Returns the number of heads of alpha, including the zeros that fill up its last block.
BOTH int padded_heads(int heads) {
    return heads > 16 ? blocks_of(heads) * SIDE : heads > 12 ? 16 : heads > 8 ? 12 : 8;
}

// The coefficients of the quadratic form of this lane's key: the upper triangle for HEADS heads, row by row.
// Computes the squared norms of queries 2 pair and 2 pair + 1 with this key.
template <int HEADS, int QUERIES>
struct Form {
    static constexpr int SIZE = HEADS * (HEADS + 1) / 2;
    float of[SIZE];

    DEVICE void load(const float* packed) {  // [SIZE, KEYS]
        UNROLL
        for (int e = 0; e < SIZE; ++e) of[e] = packed[e * KEYS + lane()];
    }

    // alpha is the address of the first head's value for the two queries and the key.
    DEVICE Float2 operator()(const PairArgs&, const Place&, const Float2* alpha, int) const {
        Float2 a[HEADS], sum = {0, 0};
        UNROLL
        for (int h = 0; h < HEADS; ++h) a[h] = alpha[h * (QUERIES / 2 * KEYS)];
        int e = 0;
        UNROLL
        for (int h = 0; h < HEADS; ++h) {
            Float2 row = {of[e] * a[h].x, of[e] * a[h].y};
            ++e;
            UNROLL
            for (int g = h + 1; g < HEADS; ++g, ++e)
                row = {fmaf(of[e], a[g].x, row.x), fmaf(of[e], a[g].y, row.y)};
            sum = {fmaf(row.x, a[h].x, sum.x), fmaf(row.y, a[h].y, sum.y)};
        }
        return sum;
    }

    DEVICE void prepare(const PairArgs&, const Place&, const Float2*) {}
};

// The same for more heads than registers hold. The warps divide the blocks of 8 x 8 coefficients among
// themselves. Each warp takes all queries, and the results of the warps are added in shared memory.
template <int QUERIES>
struct Form<WIDE, QUERIES> {
    const float* packed;

    DEVICE void load(const float* from) { packed = from; }

    DEVICE static Float2 one(const Float2* alpha, const Float2* other, const float (&of)[SIDE][SIDE]) {
        Float2 b[SIDE], sum = {0, 0};
        UNROLL
        for (int g = 0; g < SIDE; ++g) b[g] = other[g * (QUERIES / 2 * KEYS)];
        UNROLL
        for (int h = 0; h < SIDE; ++h) {
            const Float2 a = alpha[h * (QUERIES / 2 * KEYS)];
            Float2 row = {0, 0};
            UNROLL
            for (int g = 0; g < SIDE; ++g)
                row = {fmaf(of[h][g], b[g].x, row.x), fmaf(of[h][g], b[g].y, row.y)};
            sum = {fmaf(row.x, a.x, sum.x), fmaf(row.y, a.y, sum.y)};
        }
        return sum;
    }

    DEVICE void prepare(const PairArgs& p, const Place& place, const Float2* alpha) {
        const int side = blocks_of(p.heads);
        Float2* partial = place.at<Float2>(p.tile.partial) + place.warp * (QUERIES / 2 * KEYS);
        int at = 0;
        for (int row = 0; row < side; ++row)
            for (int col = row; col < side; ++col, ++at) {
                if (at % p.tile.warps != place.warp) continue;
                float of[SIDE][SIDE];
                UNROLL
                for (int e = 0; e < SIDE * SIDE; ++e)
                    of[e / SIDE][e % SIDE] = packed[(at * SIDE * SIDE + e) * KEYS + lane()];
                for (int pair = 0; pair < QUERIES / 2; ++pair) {
                    const Float2* here = alpha + pair_at(pair, lane());
                    const Float2 sum = one(here + row * SIDE * (QUERIES / 2 * KEYS),
                                           here + col * SIDE * (QUERIES / 2 * KEYS), of);
                    Float2& to = partial[pair * KEYS + lane()];
                    to = at < p.tile.warps ? sum : Float2{to.x + sum.x, to.y + sum.y};
                }
            }
        barrier(1 + place.group, 32 * p.tile.warps);
    }

    DEVICE Float2 operator()(const PairArgs& p, const Place& place, const Float2*, int pair) const {
        const int side = blocks_of(p.heads), all = side * (side + 1) / 2;
        Float2 sum = {0, 0};
        for (int w = 0; w < p.tile.warps && w < all; ++w) {
            const Float2 part = place.at<Float2>(p.tile.partial)[(w * (QUERIES / 2) + pair) * KEYS + lane()];
            sum = {sum.x + part.x, sum.y + part.y};
        }
        return sum;
    }
};

// The positions of two queries. The position of a query that is padding is -1.
struct alignas(8) QueryPair {
    int even, odd;
};

// Returns what the residual adds to the squared norm where the even or the odd query of a pair is the key.
template <int QUERIES>
DEVICE float own_term(const PairArgs& p, const Place& place, const Float2* alpha, bool odd) {
    const float* own = place.at<float>(p.tile.own) + lane();
    float sum = 0;
    ROLL for (int h = 0; h < p.heads; ++h, own += KEYS, alpha += QUERIES / 2 * KEYS) sum =
        fmaf(odd ? alpha->y : alpha->x, *own, sum);
    return 2 * sum + *own;
}

// The queries first to last - 1.
struct QueryRange {
    int first, last;

    DEVICE bool has(int query) const { return unsigned(query - first) < unsigned(last - first); }

    // Returns a range that contains the queries of all lanes of the warp.
    DEVICE QueryRange of_warp() const {
        QueryRange out = {first < last ? first : INT32_MAX, first < last ? last : 0};
        UNROLL
        for (int mask = 16; mask; mask /= 2) {
            const int low = shuffle_xor(out.first, mask), high = shuffle_xor(out.last, mask);
            out.first = low < out.first ? low : out.first;
            out.last = high > out.last ? high : out.last;
        }
        return out;
    }
};

// Returns the queries that see this lane's key: those in its window and its sequence. No query sees a padded
// key.
DEVICE QueryRange queries_of_key(const PairArgs& p, int b, int key) {
    if (key >= p.n || (p.key_mask.data && !element<uint8_t>(p.key_mask, b, key))) return {0, 0};
    const int low = p.spans ? p.spans[key] : 0, high = p.spans ? p.spans[p.n + key] : p.n;
    return {key - p.right > low ? key - p.right : low, key + p.left + 1 < high ? key + p.left + 1 : high};
}

// Returns one share of these queries, in whole tiles.
DEVICE QueryRange share_of(const QueryRange& all, int share, int shares, int queries) {
    if (all.last <= all.first) return {0, 0};
    const int first = all.first / queries * queries, tiles = (all.last - first + queries - 1) / queries;
    const int each = (tiles + shares - 1) / shares * queries, start = first + share * each;
    return {start, start + each < all.last ? start + each : all.last};
}

// Computes the norms of the tile's queries with this lane's key and passes them to the result. The first
// query is row `first` of `rows`.
template <bool ROLLOUT, int HEADS, int QUERIES>
DEVICE void take_queries(const PairArgs& p, const Place& place, const QueryRange& seen, const int* positions,
                         const float (&weights)[MAX_ROWS][QUERIES], int first, int rows,
                         const Form<HEADS, QUERIES>& form, float (&sums)[MAX_ROWS]) {
    const Float2* alpha = place.at<Float2>(p.tile.alpha) + pair_at(place.warp, lane());
    // True if one of the tile's queries may be one of the keys. It is the same for all lanes.
    const int ahead = place.block * KEYS - first;
    const bool meets = p.cross.data && (p.rows.data || (-KEYS < ahead && ahead < QUERIES));
    for (int pair = place.warp; pair < QUERIES / 2; pair += p.tile.warps, alpha += p.tile.warps * KEYS) {
        const QueryPair at = reinterpret_cast<const QueryPair*>(positions)[pair];
        Float2 square = form(p, place, alpha, pair);
        if (meets) {
            if (at.even == place.key) square.x += own_term<QUERIES>(p, place, alpha, false);
            if (at.odd == place.key) square.y += own_term<QUERIES>(p, place, alpha, true);
        }
        const Float2 norm = {seen.has(at.even) ? sqrt_approx(positive_part(square.x)) : 0.0f,
                             seen.has(at.odd) ? sqrt_approx(positive_part(square.y)) : 0.0f};
        if constexpr (ROLLOUT) {
            UNROLL
            for (int line = 0; line < MAX_ROWS; ++line) {
                const Float2 by = reinterpret_cast<const Float2*>(weights[line])[pair];
                sums[line] = fmaf(norm.y, by.y, fmaf(norm.x, by.x, sums[line]));
                if (p.n_rows == 1) break;
            }
        } else if (place.key < p.n) {
            const int row = first + 2 * pair;
            if (row < rows) element<float>(p.out, place.b, row, place.key) = norm.x * weights[0][2 * pair];
            if (row + 1 < rows)
                element<float>(p.out, place.b, row + 1, place.key) = norm.y * weights[0][2 * pair + 1];
        }
    }
}

}  // namespace
}  // namespace pyglobenc
