// Computes the norms of (query, key) pairs, tile by tile, for all heads:
//
//   norm[i, j]^2 = a^T G[j] a + (i == j) (2 a . c[i] + residual_sq[i])
//   a            = alpha[:, i, j]
//
// (Modarressi et al., 2022, eq. 6 to 10, expanded over heads).
//
// A group of warps takes 32 keys and reads the queries tile by tile. First the warps divide the heads among
// themselves and compute scores by mma. The fragments of the queries come directly from global memory, in
// pieces of 16 bytes; this permutes the order of d, in the same way for q and k. The keys are held in shared
// memory in the order of fragments. alpha is written to shared memory as float32.
//
// Then the warps divide the queries among themselves, and each lane takes one key. The lane keeps the
// H (H + 1) / 2 coefficients of the key's form in registers, and reads alpha without bank conflicts. It adds
// over the queries in a register, without any shuffle.
#pragma once

#include "pairs.h"
#include "product.h"

namespace pyglobenc {
namespace {

constexpr int WIDE = 0;  // stands for more than 16 heads, whose forms are stored in blocks of 8 x 8
constexpr int SIDE = 8;  // number of rows, and of columns, of such a block
constexpr float LOG2_E = 1.44269504f;

template <class T>
DEVICE T& element(const View& view, int64_t i0) {
    return static_cast<T*>(view.data)[i0 * view.stride[0]];
}

template <class T>
DEVICE T& element(const View& view, int64_t i0, int64_t i1) {
    return static_cast<T*>(view.data)[i0 * view.stride[0] + i1 * view.stride[1]];
}

template <class T>
DEVICE T& element(const View& view, int64_t i0, int64_t i1, int64_t i2) {
    return static_cast<T*>(view.data)[i0 * view.stride[0] + i1 * view.stride[1] + i2 * view.stride[2]];
}

// The part of the work that a group of warps, and this thread in it, take.
struct Place {
    int b, share, first_row;  // the example, the part of its queries, and the first row of the rollout
    int block;                // number of the block of KEYS keys
    int group, warp, thread;  // number of the group in the block, and of the warp and thread in the group
    int key;                  // this lane's key
    char* memory;             // the group's shared memory
    const char *q, *k, *lse;  // tensors of the example; q and k start at this lane's pieces
    const Weighted* queries;  // those of the example, with weights of first_row

    template <class E>
    DEVICE E* at(int offset) const {
        return reinterpret_cast<E*>(memory + offset);
    }
};

// A lane's queries of a tile: the rows of q of the queries 8 n + g, in pieces counted from the first one of
// the head, and the lse of query lane().
template <int QUERIES>
struct Rows {
    uint32_t q[QUERIES / 8];
    const char* lse;
};

// The fragments of a lane: two pieces of row g for every 8 queries, and the lse of query lane().
template <int QUERIES>
struct Fragments {
    Bytes16 piece[QUERIES / 8][2];
    float lse;
};

template <int QUERIES>
DEVICE void load_queries(const PairArgs& p, const Place& place, const Rows<QUERIES>& rows, int head, int step,
                         Fragments<QUERIES>& out) {
    const char* q = settled(place.q + int64_t(head) * p.q_head + step * 64);
    const bool second = step + 1 < p.steps;
    UNROLL
    for (int n = 0; n < QUERIES / 8; ++n) {
        const char* from = q + uint64_t(rows.q[n]) * sizeof(Bytes16);
        out.piece[n][0] = load<Bytes16>(from);
        if (second) out.piece[n][1] = load<Bytes16>(from + 64);
    }
    if (step == 0) out.lse = load<float>(rows.lse + int64_t(head) * p.lse_head);
}

// Copies two steps of 16 keys of a head to `held`, in the order in which products take them. This lane copies
// keys g and g + 8, counted from `first`.
DEVICE void fetch_keys(const PairArgs& p, const Place& place, int kv_head, int step, int first,
                       Bytes16* held) {
    const char* k = place.k + int64_t(kv_head) * p.k_head + step * 64;
    Bytes16 rows[2] = {};
    UNROLL
    for (int half = 0; half < 2; ++half) {
        const int j = place.block * KEYS + first + 8 * half + lane() / 4;
        if (j < p.n) rows[half] = *reinterpret_cast<const Bytes16*>(k + j * p.k_step[2]);
    }
    UNROLL
    for (int s = 0; s < 2; ++s)
        held[s * 32 + lane()] = Bytes16{
            {rows[0].word[2 * s], rows[1].word[2 * s], rows[0].word[2 * s + 1], rows[1].word[2 * s + 1]}};
}

// Returns where the pieces of a step of a head's keys lie: [kv head][step][16 keys][2][lane].
DEVICE Bytes16* held_keys(const PairArgs& p, const Place& place, int kv_head, int step) {
    return reinterpret_cast<Bytes16*>(place.memory) + (kv_head * p.steps + step) * 128;
}

DEVICE void hold_keys(const PairArgs& p, const Place& place) {
    const int kv_heads = p.heads / p.group;
    for (int h = 0; h < kv_heads; ++h)
        for (int at = place.warp; at < 2 * p.steps; at += p.tile.warps)
            fetch_keys(p, place, h, at / 2, at % 2 * 16, held_keys(p, place, h, at / 2) + at % 2 * 64);
}

// Returns where a head's alpha holds the queries 2 pair and 2 pair + 1 with key j. Values that lanes store at
// the same time lie in different banks. The distance to 4 pairs or 16 keys further is the same everywhere.
DEVICE int pair_at(int pair, int j) { return pair * KEYS + (j ^ 4 * (pair & 3)); }

// Adds the products of one step's keys with queries 8 n to 8 (n + AT_ONCE) - 1.
template <class T, int AT_ONCE, int QUERIES>
DEVICE void add_step(const Bytes16* keys, int n, int s, const Fragments<QUERIES>& queries,
                     float (&scores)[2][AT_ONCE][4]) {
    UNROLL
    for (int m = 0; m < 2; ++m) {
        const Bytes16 left[2] = {keys[m * 64 + lane()], keys[m * 64 + 32 + lane()]};
        UNROLL
        for (int e = 0; e < AT_ONCE; ++e) product<T>(scores[m][e], left, queries.piece[n + e][s]);
    }
}

// Adds the products of the keys with these queries, over one step or two.
template <class T, int AT_ONCE, int QUERIES>
DEVICE void add_steps(const PairArgs& p, const Place& place, int kv_head, int step, int n,
                      const Fragments<QUERIES>& queries, float (&scores)[2][AT_ONCE][4]) {
    const bool second = step + 1 < p.steps;
    if (p.tile.held) {
        const Bytes16* keys = held_keys(p, place, kv_head, step);
        add_step<T>(keys, n, 0, queries, scores);
        if (second) add_step<T>(keys + 128, n, 1, queries, scores);
        return;
    }
    Bytes16* keys = held_keys(p, place, 0, 0) + place.warp * 128;
    UNROLL
    for (int s = 0; s < 2; ++s) {
        if (s && !second) break;
        // The lanes read what other lanes of the warp have written, here and in the previous step.
        warp_barrier();
        ROLL for (int half = 0; half < 2; ++half)
            fetch_keys(p, place, kv_head, step + s, half * 16, keys + half * 64);
        warp_barrier();
        add_step<T>(keys, n, s, queries, scores);
    }
}

// Computes the scores of the 32 keys with these queries. The queries are loaded here, except the first pieces
// at n = 0.
template <class T, int AT_ONCE, int QUERIES>
DEVICE void score(const PairArgs& p, const Place& place, const Rows<QUERIES>& rows, int head, int n,
                  Fragments<QUERIES>& queries, float (&scores)[2][AT_ONCE][4]) {
    const int kv_head = head * p.per_group >> 16;
    if (n && p.steps > 2) load_queries(p, place, rows, head, 0, queries);
    add_steps<T>(p, place, kv_head, 0, n, queries, scores);
    ROLL for (int step = 2; step < p.steps; step += 2) {
        // Tensor cores truncate the sum that they add to. So each step starts from 0 and is added in float32.
        float sums[2][AT_ONCE][4] = {};
        load_queries(p, place, rows, head, step, queries);
        add_steps<T>(p, place, kv_head, step, n, queries, sums);
        UNROLL
        for (int m = 0; m < 2; ++m) UNROLL
        for (int e = 0; e < 4 * AT_ONCE; ++e) scores[m][e / 4][e % 4] += sums[m][e / 4][e % 4];
    }
}

// Writes the probabilities of one head to alpha [QUERIES / 2, KEYS]. When it returns, the loads of head
// `next` have started. lse is a buffer of the warp; the next call takes another one.
template <class T, int AT_ONCE, int QUERIES>
DEVICE void head_alpha(const PairArgs& p, const Place& place, const Rows<QUERIES>& rows, int head, int next,
                       Fragments<QUERIES>& queries, float* lse, Float2* alpha) {
    if (lane() < QUERIES) lse[lane()] = queries.lse * LOG2_E;
    warp_barrier();
    Float2* const to[2] = {alpha + pair_at(lane() % 4, lane() / 4),
                           alpha + pair_at(lane() % 4, 8 + lane() / 4)};
    UNROLL
    for (int n = 0; n < QUERIES / 8; n += AT_ONCE) {
        float scores[2][AT_ONCE][4] = {};
        score<T>(p, place, rows, head, n, queries, scores);
        if (n + AT_ONCE == QUERIES / 8 && next < p.heads) load_queries(p, place, rows, next, 0, queries);
        UNROLL
        for (int e = 0; e < AT_ONCE; ++e) {
            const Float2 shift = reinterpret_cast<const Float2*>(lse)[4 * (n + e) + lane() % 4];
            UNROLL
            for (int row = 0; row < 4; ++row) {
                const float* s = scores[row / 2][e] + row % 2 * 2;
                to[row % 2][row / 2 * 16 + 4 * (n + e) * KEYS] =
                    Float2{exp2_approx(fmaf(s[0], p.to_base_2, -shift.x)),
                           exp2_approx(fmaf(s[1], p.to_base_2, -shift.y))};
            }
        }
    }
}

}  // namespace
}  // namespace pyglobenc
