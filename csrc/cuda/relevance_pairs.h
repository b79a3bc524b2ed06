// Computes tiles of the relevance through attention for one head. The kernels over pairs share this code.
//
//   alpha[i,j]   = exp(scaling q[i].k[j] - lse[i])
//   R_alpha[i,j] = alpha[i,j] <s[i], v[j]> / 2
//   A_h[i,j]     = max(<grad_o[i], v[j]> R_alpha[i,j], 0)
//
// The source is Chefer et al., 2021, eq. 13, and the matmul rule of the published code.
//
// A later division by the scores amplifies their rounding errors up to 1e7 times. So the products must keep
// float32's digits. Three bfloat16 parts hold a float exactly. Six of their nine products hold all but 2^-25
// of the result, and cost as much as three tf32 products. Tensor cores truncate sums instead of rounding them
// (Fasi et al., 2021). So every 16 products are added up outside, in float32. On normal numbers the error is
// 0.4 to 0.7 times that of a chain of float32 multiply-adds.
//
// A warp holds 16 rows of one side, queries or keys. It reads the other side in steps of TILES * 8 rows,
// which the block splits into parts once for all its warps. "Left" and "right" are the factors of an mma, and
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
// Lets functions take a large argument by reference without a copy in every thread.
#define CONSTANT const __grid_constant__
#else
#define CONSTANT const
#endif

namespace pyglobenc {
namespace {

constexpr int WARP_ROWS = 16;
constexpr int MAX_WARPS = 4;
// The number of blocks of a multiprocessor. Without this number, ptxas spills a few registers to fit a third
// block.
constexpr int BLOCKS_AT_ONCE = 2;

struct Left {
    uint32_t part[3][4];
};

struct Right {
    uint32_t part[3][2];
};

struct alignas(8) Words {
    uint32_t x[2];
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

// Returns 16 rows of 16 columns in shared memory as a left factor.
DEVICE Left left_of(const float* x, int stride) {
    Left out;
    x += lane() / 4 * stride + lane() % 4 * 2;
    UNROLL
    for (int e = 0; e < 4; ++e) {
        const Float2 two = *reinterpret_cast<const Float2*>(x + e % 2 * 8 * stride + e / 2 * 8);
        put(out, e, two.x, two.y);
    }
    return out;
}

// Returns two tiles side by side as a left factor.
DEVICE Left left_of(const float (*tiles)[4]) {
    Left out;
    UNROLL
    for (int e = 0; e < 4; ++e) put(out, e, tiles[e / 2][e % 2 * 2], tiles[e / 2][e % 2 * 2 + 1]);
    return out;
}

// Returns the transpose of 8 rows of 16 floats as a right factor.
DEVICE Right right_of(const float* x, int stride) {
    Right out;
    x += lane() / 4 * stride + lane() % 4 * 2;
    UNROLL
    for (int e = 0; e < 2; ++e) {
        const Float2 two = *reinterpret_cast<const Float2*>(x + e * 8);
        put(out, e, two.x, two.y);
    }
    return out;
}

// The rows of a tensor in three parts. Each part begins `part` entries after the previous one.
struct Parts {
    bf16* rows;
    int part, stride;

    DEVICE Parts at(int row, int column) const { return {rows + row * stride + column, part, stride}; }
};

// Writes the right factors of two tiles: the transposes of 8 rows and of the next 8 rows, with 16 columns.
DEVICE void right_of(Right (&out)[2], const Parts& x) {
    const bf16* const row = x.rows + (lane() / 16 * 8 + lane() % 8) * x.stride + lane() / 8 % 2 * 8;
    UNROLL
    for (int p = 0; p < 3; ++p) {
        uint32_t r[4];
        load_matrices(r, row + p * x.part);
        UNROLL
        for (int e = 0; e < 4; ++e) out[e / 2].part[p][e % 2] = r[e];
    }
}

// Writes the right factors of two tiles: 16 rows, with 8 columns and with the next 8 columns.
DEVICE void right_below(Right (&out)[2], const Parts& x) {
    const bf16* const row = x.rows + lane() % 16 * x.stride + lane() / 16 * 8;
    UNROLL
    for (int p = 0; p < 3; ++p) {
        uint32_t r[4];
        load_matrices_transposed(r, row + p * x.part);
        UNROLL
        for (int e = 0; e < 4; ++e) out[e / 2].part[p][e % 2] = r[e];
    }
}

// Adds a b to tile with float32's digits.
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

// Returns the stride of a head's rows in shared memory. Its padding avoids bank conflicts, both for pairs of
// floats and for matrices.
BOTH int padded(int head_dim) { return (head_dim + 15) / 16 * 16; }
BOTH int row_stride(int head_dim) { return padded(head_dim) + 8; }

// The token of a row in shared memory.
struct RowToken {
    int position;  // -1 past the last token
    float lse;     // of a query; 0 for a key; infinity for a padded key or past the last token
};

DEVICE bool missing(const RowToken& token) { return token.lse == INFINITY; }

// A head of an example, or of a packed sequence, with the tokens `first` to `last` - 1.
struct Head {
    const RelevanceArgs& args;
    int b, h, first, last;

    DEVICE int head_dim() const { return int(args.k.shape[3]); }
    DEVICE const float* row(const View& x, int at) const {
        return static_cast<const float*>(x.data) + b * x.stride[0] + h * x.stride[1] + at * x.stride[2];
    }
    DEVICE RowToken query(int i) const {
        return i < last ? RowToken{i, *row(args.lse, i)} : RowToken{-1, INFINITY};
    }
    DEVICE RowToken key(int j) const {
        const View& mask = args.key_mask;
        const bool real =
            j < last &&
            (!mask.data || static_cast<const bool*>(mask.data)[b * mask.stride[0] + j * mask.stride[1]]);
        return {j < last ? j : -1, real ? 0.0f : INFINITY};
    }
};

// Rows of queries (q, s, grad_o) or of keys (k, v) in shared memory. Each tensor begins `step` floats after
// the previous one.
struct Side {
    float* rows;
    int step;
    RowToken* tokens;
};

// Starts copying `count` rows of x. Rows that are padding, or that do not exist, become zeros and are never
// read.
template <class Index>
DEVICE void copy_rows(float* to, const View& x, const Head& head, int count, bool queries,
                      const Index& index) {
    const int head_dim = head.head_dim(), stride = row_stride(head_dim), width = padded(head_dim);
    for (int at = thread() / 8; at < count; at += threads() / 8) {
        const int row = index(at);
        const bool there = queries ? row < head.last : !missing(head.key(row));
        const float* from = head.row(x, there ? row : 0);
        float* const start = to + at * stride;
        if (head_dim % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0)
            for (int d = thread() % 8 * 4; d < width; d += 32)
                copy_async<16>(start + d, from + d, there && d < head_dim);
        else
            for (int d = thread() % 8; d < width; d += 8)
                copy_async<4>(start + d, from + d, there && d < head_dim);
    }
}

// Starts copying the rows index(0) to index(count - 1) of a side, and writes their tokens.
template <bool QUERIES, class Index>
DEVICE void fill(const Side& side, const Head& head, int count, const Index& index) {
    copy_rows(side.rows, QUERIES ? head.args.q : head.args.k, head, count, QUERIES, index);
    copy_rows(side.rows + side.step, QUERIES ? head.args.s : head.args.v, head, count, QUERIES, index);
    // Without a gradient, s takes its place and the product is not used. This avoids a branch between the
    // products.
    const View& third = head.args.grad.data ? head.args.grad : head.args.s;
    if (QUERIES) copy_rows(side.rows + 2 * side.step, third, head, count, QUERIES, index);
    for (int at = thread(); at < count; at += threads())
        side.tokens[at] = QUERIES ? head.query(index(at)) : head.key(index(at));
}

// Splits `count` rows into parts; count is a multiple of 8. The threads of the block divide the work. The
// rows of the parts keep the stride of the floats.
DEVICE void split(const Parts& parts, const float* rows, int count, int head_dim) {
    const int stride = row_stride(head_dim), width = padded(head_dim);
    for (int at = thread() / 8; at < count; at += threads() / 8) {
        // Half a warp stores to rows 4 apart, because these lie in different banks.
        const int row = at / 8 * 8 + at % 2 * 4 + at % 8 / 2;
        for (int d = thread() % 8 * 4; d < width; d += 32) {
            const Float4 four = *reinterpret_cast<const Float4*>(rows + row * stride + d);
            Right pairs;
            put(pairs, 0, four.x[0], four.x[1]);
            put(pairs, 1, four.x[2], four.x[3]);
            bf16* const to = parts.at(row, d).rows;
            UNROLL
            for (int p = 0; p < 3; ++p)
                *reinterpret_cast<Words*>(to + p * parts.part) = {{pairs.part[p][0], pairs.part[p][1]}};
        }
    }
}

template <int TILES>
struct Pairs {
    float dots[TILES][4];       // q . k, unscaled
    float relevance[TILES][4];  // R_alpha
    float weighted[TILES][4];   // A_h
    float alpha[TILES][4];
};

// Computes the three products of a warp's rows with the rows of the other side, whose tensors follow one
// another. With ROWS, the warp holds queries.
template <bool ROWS, int TILES>
DEVICE void multiply(Pairs<TILES>& pairs, const Side& held, const Parts& stream, int head_dim) {
    const int stride = row_stride(head_dim);
    UNROLL
    for (int tile = 0; tile < TILES; ++tile)
        for (int e = 0; e < 4; ++e)
            pairs.dots[tile][e] = pairs.relevance[tile][e] = pairs.weighted[tile][e] = 0;
    for (int d = 0; d < head_dim; d += 16) {
        const Left first = left_of(held.rows + d, stride),
                   second = left_of(held.rows + held.step + d, stride);
        const Left third = ROWS ? left_of(held.rows + 2 * held.step + d, stride) : second;
        UNROLL
        for (int tile = 0; tile < TILES; tile += 2) {
            Right one[2], two[2], three[2];
            right_of(one, stream.at(8 * tile, d));
            right_of(two, stream.at(8 * (TILES + tile), d));
            if constexpr (!ROWS) right_of(three, stream.at(8 * (2 * TILES + tile), d));
            UNROLL
            for (int next = 0; next < 2; ++next) {
                product(pairs.dots[tile + next], first, one[next]);
                product(pairs.relevance[tile + next], second, two[next]);
                product(pairs.weighted[tile + next], third, ROWS ? two[next] : three[next]);
            }
        }
    }
}

// Computes alpha, R_alpha and A_h from the products. Pairs with a padded key or outside the window get 0.
template <bool ROWS, int TILES>
DEVICE void weigh(Pairs<TILES>& pairs, const RowToken* held, const RowToken* stream,
                  const RelevanceArgs& args) {
    constexpr float LOG2E = 1.44269504f;
    UNROLL
    for (int tile = 0; tile < TILES; ++tile)
        for (int e = 0; e < 4; ++e) {
            const RowToken mine = held[lane() / 4 + e / 2 * 8],
                           other = stream[8 * tile + lane() % 4 * 2 + e % 2];
            const RowToken query = ROWS ? mine : other, key = ROWS ? other : mine;
            const int ahead = key.position - query.position;
            const bool seen = !missing(key) && ahead <= args.right && -ahead <= args.left;
            // lse does not include the scores of hidden keys, so their exponential may be infinite.
            const float alpha =
                seen ? exp2_approx((pairs.dots[tile][e] * args.scaling - query.lse) * LOG2E) : 0.0f;
            const float relevance = pairs.relevance[tile][e] * alpha * 0.5f;
            const float weighted = args.grad.data ? pairs.weighted[tile][e] * relevance : relevance;
            pairs.alpha[tile][e] = alpha;
            pairs.relevance[tile][e] = relevance;
            pairs.weighted[tile][e] = positive_part(weighted);
        }
}

// Returns whether the warp has a pair of real tokens in these rows.
template <int TILES>
DEVICE bool any_pair(const RowToken* held, const RowToken* stream) {
    return any(lane() < WARP_ROWS && !missing(held[lane() % WARP_ROWS])) &&
           any(!missing(stream[lane() % (8 * TILES)]));
}

// Returns the largest number of warps whose rows fit into the shared memory of a block. bytes(head_dim,
// warps) returns the size of the rows.
inline int warps_that_fit(int (*bytes)(int, int), int head_dim) {
    for (int warps = MAX_WARPS; warps; warps /= 2)
        if (bytes(head_dim, warps) <= shared_limit()) return warps;
    throw std::runtime_error("CUDA: heads of " + std::to_string(head_dim) + " don't fit into shared memory");
}

}  // namespace
}  // namespace pyglobenc
