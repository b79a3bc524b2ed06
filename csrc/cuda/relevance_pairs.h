// Tiles of relevance through attention, one head at a time: what the kernels over pairs share.
//
//   alpha[i,j] = exp(scaling q[i].k[j] - lse[i]),   R_alpha[i,j] = alpha[i,j] <s[i], v[j]> / 2,   A_h = max(<grad_o[i], v[j]> R_alpha, 0)
//
// (Chefer et al., 2021, eq. 13; the published code's matmul rule.) The scores are what a later division sees, and it amplifies their
// rounding up to 1e7 times, so products keep a float's digits: three bfloat16 parts hold a float exactly, six of their nine products all
// but 2^-25 of it, at the price of three tf32 products. Tensor cores cut sums off instead of rounding (Fasi et al., 2021), so every 16
// products are added up in float32 outside: on normal numbers that loses 0.4 to 0.7 of what a chain of float32 multiply-adds loses.
//
// A warp holds 16 rows of one side, queries or keys, and streams TILES * 8 rows of the other. "Left" and "right" are the factors of an mma,
// "tile" is its sum, 16 by 8.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "../common/simt.h"
#include "division.h"
#include "ops.h"
#include "relevance.h"

#if defined(__CUDACC__)
// a large argument that functions may take by reference without a copy of it in every thread
#define CONSTANT const __grid_constant__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CONSTANT const
#define HOST_DEVICE inline
#endif

namespace pyglobenc {

constexpr int WARP_ROWS = 16;
constexpr int MOST_WARPS = 4;

struct Left {
    uint32_t part[3][4];
};

struct Right {
    uint32_t part[3][2];
};

template <class Factor>
DEVICE void put(Factor& to, int at, float low, float high) {
    UNROLL
    for (int p = 0; p < 3; ++p) {
        const uint32_t both = pack<bf16>(low, high);
        to.part[p][at] = both;
        low -= from_bits(both << 16);
        high -= from_bits(both & 0xffff0000u);
    }
}

// Left factor: 16 rows from shared memory, 16 columns. Columns t and t + 4 stand where an mma expects 2t and 2t + 1, as in right_of().
DEVICE Left left_of(const float* x, int stride) {
    Left out;
    x += lane() / 4 * stride + lane() % 4;
    UNROLL
    for (int e = 0; e < 4; ++e) put(out, e, x[e % 2 * 8 * stride + e / 2 * 8], x[e % 2 * 8 * stride + e / 2 * 8 + 4]);
    return out;
}

// Right factor: the transpose of 8 rows, 16 columns.
DEVICE Right right_of(const float* x, int stride) {
    Right out;
    x += lane() / 4 * stride + lane() % 4;
    UNROLL
    for (int e = 0; e < 2; ++e) put(out, e, x[e * 8], x[e * 8 + 4]);
    return out;
}

// Left factor: two tiles side by side.
DEVICE Left left_of(const float (&tiles)[2][4]) {
    Left out;
    UNROLL
    for (int e = 0; e < 4; ++e) put(out, e, tiles[e / 2][e % 2 * 2], tiles[e / 2][e % 2 * 2 + 1]);
    return out;
}

// Right factor: entry (k, column) is x[k * down + column * across], 16 by 8.
DEVICE Right right_below(const float* x, int down, int across) {
    Right out;
    x += lane() % 4 * 2 * down + lane() / 4 * across;
    UNROLL
    for (int e = 0; e < 2; ++e) put(out, e, x[e * 8 * down], x[(e * 8 + 1) * down]);
    return out;
}

// tile += a b with float32's digits.
DEVICE void product(float (&tile)[4], const Left& a, const Right& b) {
    float sum[4] = {0, 0, 0, 0};
    mma<bf16>(sum, a.part[0], b.part[2]);
    mma<bf16>(sum, a.part[2], b.part[0]);
    mma<bf16>(sum, a.part[1], b.part[1]);
    mma<bf16>(sum, a.part[0], b.part[1]);
    mma<bf16>(sum, a.part[1], b.part[0]);
    mma<bf16>(sum, a.part[0], b.part[0]);
    UNROLL
    for (int e = 0; e < 4; ++e) tile[e] += sum[e];
}

// Rows of heads in shared memory, padded so that neither the reads of left_of, right_of nor of right_below meet in a bank.
HOST_DEVICE int padded(int head_dim) { return (head_dim + 15) / 16 * 16; }
HOST_DEVICE int row_stride(int head_dim) { return padded(head_dim) + 4; }

// What stands beside each row in shared memory: which query or key it is, and a query's lse, 0 for a key; infinity where there is none.
struct Place {
    int at;
    float beside;
};

DEVICE bool missing(const Place& place) { return place.beside == INFINITY; }

struct Head {
    const RelevanceArgs& args;
    int64_t b, h;

    DEVICE int n() const { return int(args.k.shape[2]); }
    DEVICE int head_dim() const { return int(args.k.shape[3]); }
    DEVICE const float* row(const View& x, int at) const {
        return static_cast<const float*>(x.data) + b * x.stride[0] + h * x.stride[1] + at * x.stride[2];
    }
    DEVICE Place query(int i) const { return {i, i < n() ? *row(args.lse, i) : INFINITY}; }
    DEVICE Place key(int j) const {
        const View& mask = args.key_mask;
        const bool real = j < n() && (!mask.data || static_cast<const bool*>(mask.data)[b * mask.stride[0] + j * mask.stride[1]]);
        return {j, real ? 0.0f : INFINITY};
    }
};

// Rows of queries (q, s, grad_o) or of keys (k, v) in shared memory, each tensor's `step` floats after the one before, and their places.
struct Side {
    float* rows;
    int step;
    Place* places;
};

// Starts copying `count` rows of x; zeros for those that aren't there: padding may hold anything, and is never read.
template <class Index>
DEVICE void copy_rows(float* to, const View& x, const Head& head, int count, bool queries, const Index& index) {
    const int head_dim = head.head_dim(), stride = row_stride(head_dim), width = padded(head_dim);
    for (int at = thread() / 8; at < count; at += threads() / 8) {
        const int row = index(at);
        const bool there = queries ? row < head.n() : !missing(head.key(row));
        const float* from = head.row(x, there ? row : 0);
        float* const start = to + at * stride;
        if (head_dim % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0)
            for (int d = thread() % 8 * 4; d < width; d += 32) copy_async<16>(start + d, from + d, there && d < head_dim);
        else
            for (int d = thread() % 8; d < width; d += 8) copy_async<4>(start + d, from + d, there && d < head_dim);
    }
}

template <bool QUERIES, class Index>
DEVICE void fill(const Side& side, const Head& head, int count, const Index& index) {
    copy_rows(side.rows, QUERIES ? head.args.q : head.args.k, head, count, QUERIES, index);
    copy_rows(side.rows + side.step, QUERIES ? head.args.s : head.args.v, head, count, QUERIES, index);
    if (QUERIES && head.args.grad.data) copy_rows(side.rows + 2 * side.step, head.args.grad, head, count, QUERIES, index);
    for (int at = thread(); at < count; at += threads()) side.places[at] = QUERIES ? head.query(index(at)) : head.key(index(at));
}

template <int TILES>
struct Pairs {
    float dots[TILES][4];       // q . k, unscaled
    float relevance[TILES][4];  // R_alpha
    float weighted[TILES][4];   // A_h
    float alpha[TILES][4];
};

// The three products of a warp's rows with the other side's; ROWS: the warp holds queries.
template <bool ROWS, int TILES>
DEVICE void multiply(Pairs<TILES>& pairs, const Side& held, const Side& stream, int head_dim, bool has_grad) {
    const int stride = row_stride(head_dim);
    UNROLL
    for (int tile = 0; tile < TILES; ++tile)
        for (int e = 0; e < 4; ++e) pairs.dots[tile][e] = pairs.relevance[tile][e] = pairs.weighted[tile][e] = 0;
    for (int d = 0; d < head_dim; d += 16) {
        const Left first = left_of(held.rows + d, stride), second = left_of(held.rows + held.step + d, stride);
        const Left third = ROWS && has_grad ? left_of(held.rows + 2 * held.step + d, stride) : second;
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
            const float* const other = stream.rows + 8 * tile * stride + d;
            const Right value = right_of(other + stream.step, stride);
            product(pairs.dots[tile], first, right_of(other, stride));
            product(pairs.relevance[tile], second, value);
            if (has_grad) product(pairs.weighted[tile], third, ROWS ? value : right_of(other + 2 * stream.step, stride));
        }
    }
}

// From the products to alpha, R_alpha and A_h.
template <bool ROWS, int TILES>
DEVICE void weigh(Pairs<TILES>& pairs, const Place* held, const Place* stream, const RelevanceArgs& args) {
    constexpr float LOG2E = 1.44269504f;
    UNROLL
    for (int tile = 0; tile < TILES; ++tile)
        for (int e = 0; e < 4; ++e) {
            const Place mine = held[lane() / 4 + e / 2 * 8], other = stream[8 * tile + lane() % 4 * 2 + e % 2];
            const Place query = ROWS ? mine : other, key = ROWS ? other : mine;
            const int ahead = key.at - query.at;
            const bool seen = !missing(key) && ahead <= args.right && -ahead <= args.left;
            // scores of hidden keys are not in lse: their exponential may be infinite
            const float alpha = seen ? exp2_approx((pairs.dots[tile][e] * args.scaling - query.beside) * LOG2E) : 0.0f;
            const float relevance = pairs.relevance[tile][e] * alpha * 0.5f;
            const float weighted = args.grad.data ? pairs.weighted[tile][e] * relevance : relevance;
            pairs.alpha[tile][e] = alpha;
            pairs.relevance[tile][e] = relevance;
            pairs.weighted[tile][e] = weighted < 0 ? 0.0f : weighted;
        }
}

// Whether the warp has a pair in these rows at all.
template <int TILES>
DEVICE bool any_pair(const Place* held, const Place* stream) {
    return any(lane() < WARP_ROWS && !missing(held[lane() % WARP_ROWS])) && any(!missing(stream[lane() % (8 * TILES)]));
}

// The most warps whose rows fit into a block's shared memory, bytes(head_dim, warps).
inline int warps_that_fit(int (*bytes)(int, int), int head_dim) {
    for (int warps = MOST_WARPS; warps; warps /= 2)
        if (bytes(head_dim, warps) <= shared_limit()) return warps;
    throw std::runtime_error("CUDA: heads of " + std::to_string(head_dim) + " don't fit into shared memory");
}

}  // namespace pyglobenc
