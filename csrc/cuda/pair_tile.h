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

// Where a group of warps works.
struct Place {
    int b, share, first_row;     // example; part of the queries; row of the rollout
    int block;                   // of KEYS keys
    int group, warp, thread;     // in the block; in the group
    int key;                     // of this lane
    char* memory;                // the group's

    DEVICE float* floats(int offset) const { return reinterpret_cast<float*>(memory + offset); }
};

// Fragments of queries: rows g and g + 8 of each 16, two pieces of each, and their lse.
template <int TILES>
struct Queries {
    Piece piece[TILES][2][2];
    float lse[TILES][2];
};

// This lane's piece of a row of q or k.
DEVICE Piece piece_at(const PairArgs& p, const char* row, int step, bool ok) {
    const int at = step * 64 + lane() % 4 * 16;
    Piece out = {{0, 0, 0, 0}};
    if (ok && at < p.row_bytes) out = *reinterpret_cast<const Piece*>(row + at);
    return out;
}

// exp(scaled score - lse); subtracted before the change of base, whose rounding would otherwise grow with lse.
DEVICE float probability(float score, float scaling, float lse) { return exp2_approx(fmaf(score, scaling, -lse) * 1.44269504f); }

template <int TILES>
DEVICE void load_queries(const PairArgs& p, const Place& place, const int* positions, int head, int step, Queries<TILES>& out) {
    const char* base = static_cast<const char*>(p.q.data) + place.b * p.q_step[0] + head * p.q_step[1];
    const float* lse = static_cast<const float*>(p.lse.data) + place.b * p.lse.stride[0] + head * p.lse.stride[1];
    UNROLL
    for (int m = 0; m < TILES; ++m) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const int i = positions[16 * m + 8 * half + lane() / 4];
            UNROLL
            for (int s = 0; s < 2; ++s) out.piece[m][half][s] = piece_at(p, base + i * p.q_step[2], step + s, i >= 0);
            if (step == 0) out.lse[m][half] = i < 0 ? 0.0f : lse[i * p.lse.stride[2]];
        }
    }
}

// Piece of keys 8 n to 8 n + 7 of the group that this lane's fragment takes.
DEVICE Piece key_piece(const PairArgs& p, const Place& place, bool held, int kv_head, int step, int n) {
    if (held) return reinterpret_cast<const Piece*>(place.memory)[((kv_head * p.steps + step) * 4 + n) * 32 + lane()];
    const int j = place.block * KEYS + 8 * n + lane() / 4;
    return piece_at(p, static_cast<const char*>(p.k.data) + place.b * p.k_step[0] + kv_head * p.k_step[1] + j * p.k_step[2], step, j < p.n);
}

// The group's keys to shared memory, in the order in which fragments take them.
DEVICE void hold_keys(const PairArgs& p, const Place& place) {
    const int kv_heads = p.heads / p.group;
    for (int h = 0; h < kv_heads; ++h)
        for (int at = place.warp; at < 4 * p.steps; at += p.tile.warps)
            reinterpret_cast<Piece*>(place.memory)[(4 * p.steps * h + at) * 32 + lane()] = key_piece(p, place, false, h, at / 4, at % 4);
}

// Column of a key in row i of alpha: rows that are stored together lie in different banks.
DEVICE int column(int i, int j) { return j ^ 8 * (i & 3); }

// Scores of keys 8 n to 8 (n + AT_ONCE) - 1 with the queries, which are loaded here but for the first pieces of the first keys.
template <class T, int AT_ONCE, int TILES>
DEVICE void score(const PairArgs& p, const Place& place, const int* positions, int head, int n, Queries<TILES>& queries,
                  float (&scores)[TILES][AT_ONCE][4]) {
    const int kv_head = head / p.group;
    for (int step = 0; step < p.steps; step += 2) {
        if (step || (n && p.steps > 2)) load_queries(p, place, positions, head, step, queries);
        // short sums from 0, for the same reason as above
        float sums[TILES][AT_ONCE][4] = {};
        UNROLL
        for (int s = 0; s < 2; ++s) {
            if (step + s >= p.steps) break;
            UNROLL
            for (int e = 0; e < AT_ONCE; ++e) {
                const Piece key = key_piece(p, place, p.tile.held, kv_head, step + s, n + e);
                UNROLL
                for (int m = 0; m < TILES; ++m) product<T>(sums[m][e], queries.piece[m][0][s], queries.piece[m][1][s], key);
            }
        }
        UNROLL
        for (int m = 0; m < TILES; ++m)
            UNROLL
            for (int e = 0; e < 4 * AT_ONCE; ++e) scores[m][e / 4][e % 4] += sums[m][e / 4][e % 4];
    }
}

// Probabilities of one head to alpha [queries, KEYS]; the first pieces of the queries of head `next` are on their way when it returns.
template <class T, int AT_ONCE, int TILES>
DEVICE void head_alpha(const PairArgs& p, const Place& place, const int* positions, int head, int next, Queries<TILES>& queries,
                       float* alpha) {
    UNROLL
    for (int n = 0; n < 4; n += AT_ONCE) {
        float scores[TILES][AT_ONCE][4] = {}, lse[TILES][2];
        score<T>(p, place, positions, head, n, queries, scores);
        UNROLL
        for (int m = 0; m < TILES; ++m) lse[m][0] = queries.lse[m][0], lse[m][1] = queries.lse[m][1];
        if (n + AT_ONCE == 4 && next < p.heads) load_queries(p, place, positions, next, 0, queries);
        UNROLL
        for (int m = 0; m < TILES; ++m) {
            UNROLL
            for (int half = 0; half < 2; ++half) {
                const int i = 16 * m + 8 * half + lane() / 4;
                UNROLL
                for (int e = 0; e < AT_ONCE; ++e) {
                    const float* s = scores[m][e] + 2 * half;
                    *reinterpret_cast<Twin*>(alpha + i * KEYS + column(i, 8 * (n + e) + lane() % 4 * 2)) =
                        Twin{probability(s[0], p.scaling, lse[m][half]), probability(s[1], p.scaling, lse[m][half])};
                }
            }
        }
    }
}

}  // namespace
}  // namespace pyglobenc
