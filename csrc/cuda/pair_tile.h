// Norms of (query, key) pairs, tile by tile, all heads: norm[i, j]^2 = a^T G[j] a + (i == j) (2 a . c[i] + residual_sq[i]),
// a = alpha[:, i, j] (Modarressi et al., 2022, eq. 6 to 10, expanded over heads).
//
// A group of warps owns 32 keys and streams queries. First the warps share out the heads: scores by mma from query fragments that come
// straight from global memory (pieces of 16 bytes, the order of d permuted alike in q and k) and keys held in shared memory in the order of
// fragments; alpha goes to shared memory as float32. Then they share out the queries, and a lane is a key: it keeps the H (H + 1) / 2
// coefficients of its form in registers, reads alpha without conflicts and sums over queries in a register, with no shuffle at all.
#pragma once

#include "pairs.h"
#include "product.h"

namespace pyglobenc {
namespace {

constexpr int WIDE = 0;   // in the place of a number of heads: more than 16, forms in blocks of 8 x 8
constexpr int SIDE = 8;   // of such a block

template <class T>
DEVICE T& element(const View& view, int64_t i0, int64_t i1) {
    return static_cast<T*>(view.data)[i0 * view.stride[0] + i1 * view.stride[1]];
}

template <class T>
DEVICE T& element(const View& view, int64_t i0, int64_t i1, int64_t i2) {
    return static_cast<T*>(view.data)[i0 * view.stride[0] + i1 * view.stride[1] + i2 * view.stride[2]];
}

// Where a query's row of q and its lse lie: bytes and elements from their head's.
struct Row {
    int64_t q, lse;
};

// Where a group of warps works.
struct Place {
    int b, share, first_row;     // example; part of the queries; row of the rollout
    int block;                   // of KEYS keys
    int group, warp, thread;     // in the block; in the group
    int key;                     // of this lane
    char* memory;                // the group's
    const char *q, *k;           // of the example, from this lane's pieces on
    const float* lse;            // of the example

    template <class E>
    DEVICE E* at(int offset) const {
        return reinterpret_cast<E*>(memory + offset);
    }
};

// Fragments of queries, 8 of them each: two pieces of row g; and its lse.
template <int QUERIES>
struct Fragments {
    Piece piece[QUERIES / 8][2];
    float lse[QUERIES / 8];
};

// Queries that don't count have another's row.
template <int QUERIES>
DEVICE void load_queries(const PairArgs& p, const Place& place, const Row* rows, int head, int step, Fragments<QUERIES>& out) {
    const char* q = place.q + int64_t(head) * p.q_head + step * 64;
    const float* lse = place.lse + int64_t(head) * p.lse_head;
    const bool second = step + 1 < p.steps;
    UNROLL
    for (int n = 0; n < QUERIES / 8; ++n) {
        const Row row = rows[8 * n + lane() / 4];
        out.piece[n][0] = *reinterpret_cast<const Piece*>(q + row.q);
        if (second) out.piece[n][1] = *reinterpret_cast<const Piece*>(q + row.q + 64);
        if (step == 0) out.lse[n] = lse[row.lse];
    }
}

// Two steps of 16 rows of keys of a head, g and g + 8 of them from `first`, to `held` in the order in which products take them.
DEVICE void fetch_keys(const PairArgs& p, const Place& place, int kv_head, int step, int first, Piece* held) {
    const char* k = place.k + int64_t(kv_head) * p.k_head + step * 64;
    Piece rows[2] = {};
    UNROLL
    for (int half = 0; half < 2; ++half) {
        const int j = place.block * KEYS + first + 8 * half + lane() / 4;
        if (j < p.n) rows[half] = *reinterpret_cast<const Piece*>(k + j * p.k_step[2]);
    }
    UNROLL
    for (int s = 0; s < 2; ++s)
        held[s * 32 + lane()] = Piece{{rows[0].word[2 * s], rows[1].word[2 * s], rows[0].word[2 * s + 1], rows[1].word[2 * s + 1]}};
}

// Pieces of all heads' keys: [kv head][step][16 keys][2][lane].
DEVICE Piece* held_keys(const PairArgs& p, const Place& place, int kv_head, int step) {
    return reinterpret_cast<Piece*>(place.memory) + (kv_head * p.steps + step) * 128;
}

DEVICE void hold_keys(const PairArgs& p, const Place& place) {
    const int kv_heads = p.heads / p.group;
    for (int h = 0; h < kv_heads; ++h)
        for (int at = place.warp; at < 2 * p.steps; at += p.tile.warps)
            fetch_keys(p, place, h, at / 2, at % 2 * 16, held_keys(p, place, h, at / 2) + at % 2 * 64);
}

// Where alpha of a head keeps queries 2 pair and 2 pair + 1 with key j: what is stored together lies in different banks.
DEVICE int pair_at(int pair, int j) { return pair * KEYS + (j ^ 4 * (pair % 4)); }

// Adds the products of up to two steps with queries 8 n to 8 (n + AT_ONCE) - 1.
template <class T, int AT_ONCE, int QUERIES>
DEVICE void add_steps(const PairArgs& p, const Place& place, int kv_head, int step, int n, const Fragments<QUERIES>& queries,
                      float (&scores)[2][AT_ONCE][4]) {
    UNROLL
    for (int s = 0; s < 2; ++s) {
        if (s && step + s >= p.steps) break;
        Piece* keys = held_keys(p, place, kv_head, step + s);
        if (!p.tile.held) {
            // the lanes read what others of the warp wrote, before and now
            keys = held_keys(p, place, 0, 0) + place.warp * 128;
            warp_barrier();
            ROLL
            for (int half = 0; half < 2; ++half) fetch_keys(p, place, kv_head, step + s, half * 16, keys + half * 64);
            warp_barrier();
        }
        UNROLL
        for (int m = 0; m < 2; ++m) {
            const Piece left[2] = {keys[m * 64 + lane()], keys[m * 64 + 32 + lane()]};
            UNROLL
            for (int e = 0; e < AT_ONCE; ++e) product<T>(scores[m][e], left, queries.piece[n + e][s]);
        }
    }
}

// Scores of the 32 keys with these queries, which are loaded here but for the first pieces at n = 0.
template <class T, int AT_ONCE, int QUERIES>
DEVICE void score(const PairArgs& p, const Place& place, const Row* rows, int head, int n, Fragments<QUERIES>& queries,
                  float (&scores)[2][AT_ONCE][4]) {
    const int kv_head = head * p.per_group >> 16;
    if (n && p.steps > 2) load_queries(p, place, rows, head, 0, queries);
    add_steps<T>(p, place, kv_head, 0, n, queries, scores);
    ROLL
    for (int step = 2; step < p.steps; step += 2) {
        // tensor cores cut off what they add to: short sums from 0
        float sums[2][AT_ONCE][4] = {};
        load_queries(p, place, rows, head, step, queries);
        add_steps<T>(p, place, kv_head, step, n, queries, sums);
        UNROLL
        for (int m = 0; m < 2; ++m)
            UNROLL
            for (int e = 0; e < 4 * AT_ONCE; ++e) scores[m][e / 4][e % 4] += sums[m][e / 4][e % 4];
    }
}

// exp(scaled score - lse); subtracted before the change of base, whose rounding would otherwise grow with lse.
DEVICE float probability(float score, float scaling, float lse) { return exp2_approx(fmaf(score, scaling, -lse) * 1.44269504f); }

// Probabilities of one head to alpha [QUERIES / 2, KEYS]; the first pieces of head `next` are on their way when it returns.
template <class T, int AT_ONCE, int QUERIES>
DEVICE void head_alpha(const PairArgs& p, const Place& place, const Row* rows, int head, int next, Fragments<QUERIES>& queries,
                       Twin* alpha) {
    float lse[QUERIES / 8];
    UNROLL
    for (int n = 0; n < QUERIES / 8; ++n) lse[n] = queries.lse[n];
    Twin* to[4];
    UNROLL
    for (int row = 0; row < 4; ++row) to[row] = alpha + pair_at(lane() % 4, 8 * row + lane() / 4);
    UNROLL
    for (int n = 0; n < QUERIES / 8; n += AT_ONCE) {
        float scores[2][AT_ONCE][4] = {};
        score<T>(p, place, rows, head, n, queries, scores);
        if (n + AT_ONCE == QUERIES / 8 && next < p.heads) load_queries(p, place, rows, next, 0, queries);
        UNROLL
        for (int e = 0; e < AT_ONCE; ++e) {
            const float even = shuffle(lse[n + e], lane() % 4 * 8), odd = shuffle(lse[n + e], lane() % 4 * 8 + 4);
            UNROLL
            for (int row = 0; row < 4; ++row) {
                const float* s = scores[row / 2][e] + row % 2 * 2;
                to[row][4 * (n + e) * KEYS] = Twin{probability(s[0], p.scaling, even), probability(s[1], p.scaling, odd)};
            }
        }
    }
}

}  // namespace
}  // namespace pyglobenc
