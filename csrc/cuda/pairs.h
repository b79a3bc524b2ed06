// Declares the host code that rollout_step and pair_norms share; pair_tile.h describes the kernel.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace pyglobenc {

constexpr int KEYS = 32;     // keys of a group of warps, one for each lane
constexpr int MAX_ROWS = 4;  // rows of the rollout that one pass handles; more rows take more passes
constexpr int MAX_HEADS = 64;
constexpr int MAX_SHARES = 16;  // largest number of parts that the queries are divided into
// The largest number of threads in a block. It leaves 255 registers to each thread; coefficients fill half of
// them.
constexpr int THREADS = 256;

// How a block is divided into groups, and the layout of a group's shared memory in bytes.
struct PairTile {
    int groups = 0;   // groups of warps, each with its own keys and barriers; 0 if no tile fits
    int warps = 0;    // warps of a group, a multiple of 4
    int queries = 0;  // queries of a tile, 16 or 32
    // Whether all keys stay in shared memory. Otherwise each warp loads them again for every tile.
    bool held = false;
    int alpha = 0, partial = 0, own = 0, lse = 0, lists = 0, bytes = 0;
};

// The position of a query, -1 for padding, and the factor of its norms in a row of the result.
struct alignas(8) Weighted {
    int position;
    float weight;
};

// The arguments of the kernel. The strides of views are in elements. An absent view has no data.
struct PairArgs {
    View q;            // [B, H, n, dh] bf16, f16 or f32, rows of whole steps of 64 bytes, aligned to 16
    View k;            // [B, Hkv, n, dh] the type of q
    View lse;          // [B, H, n]
    View gram;         // [B, n, H, H]
    View cross;        // [B, n, H] or none
    View residual_sq;  // [B, n] or none
    View rstd;         // [B, n] or none
    View key_mask;     // [B, n] u8 or none
    View rows;         // [B, m] i64, the queries of pair_norms; all of them without it
    View r;            // [B, T, n], or none for pair_norms
    View cu_seqlens;   // [S + 1] i32, the first token of each packed sequence, and n; or none
    View log_scale;    // [B, T], or [S, T] for packed sequences, contiguous; none for pair_norms
    View out;          // rollout_step [B, T, n], pair_norms [B, m, n]
    View out_scale;    // the shape of log_scale
    View room;         // [size], the scratch memory that choose_room describes
    float scaling = 1;
    int left = 0, right = 0;  // at most n
    int shares = 1;           // number of parts that the queries are divided into, up to MAX_SHARES
    PairTile tile;

    // prepared() fills in the following fields.
    float* packed = nullptr;          // [B, blocks of keys, coefficients, KEYS], the quadratic forms
    Weighted* queries = nullptr;      // [B, lines, m or n]
    int* spans = nullptr;             // [2, n], first and last + 1 token of each key's sequence, or null
    float* parts = nullptr;           // [shares, B, T, n]
    int lines = 1;                    // rows of weights of the queries: T, or 1 for pair_norms
    int n = 0, heads = 0, group = 0;  // tokens, heads, heads that share a key-value head
    int n_queries = 0, n_rows = 0;    // m or n; T, or 0 for pair_norms
    int steps = 0;                    // in a row of q or k; each is 64 bytes, 16 for each of four lanes
    int64_t q_step[3] = {}, k_step[3] = {};    // strides in bytes
    int q_head = 0, k_head = 0, lse_head = 0;  // strides of heads
    uint32_t q_row = 0;                        // stride of rows of q, in pieces of 16 bytes
    float to_base_2 = 1;                       // scaling log2(e)
    int per_group = 0;                         // 65536 / group, rounded up
    int key_blocks = 0, row_blocks = 0, form_size = 0;
};

// Return the number of heads that the kernel's forms are compiled for (WIDE for more than 16), and the
// coefficients of one form.
int form_heads(int heads);
int form_size(int heads);

// Chooses the first of four layouts that fits into `limit` bytes of shared memory. `size` is the bytes of a
// number of q.
PairTile choose_tile(int heads, int kv_heads, int head_dim, int size, int limit);

// The layout of the scratch memory of a call, in floats.
struct PairRoom {
    int64_t queries = 0, spans = 0, parts = 0, size = 0;
};

// Returns the layout. rows is T, or 0 for pair_norms. n_queries is m or n.
PairRoom choose_room(int64_t batch, int heads, int64_t n, int64_t n_queries, int64_t rows, int shares,
                     bool packed_sequences);

// Returns the arguments with their derived fields, and starts the kernel that fills packed, queries and
// spans.
PairArgs prepared(PairArgs args, void* stream);

}  // namespace pyglobenc
