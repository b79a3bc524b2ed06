// Declares the arguments of head_gram and head_norms, which value_tile.h describes, of mapped_square
// and of proximity.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace pyglobenc {

constexpr int TOKENS = 64, VALUE_THREADS = 2 * TOKENS;  // number of tokens and of threads of a block

struct ValueArgs {
    // v is [B, Hkv, n, dh] f32; head_gram also takes f16 and bf16. Its rows consist of whole, aligned pieces
    // of 16 bytes. The other tensors are f32, except x.
    View v;
    View matrix;     // head_norms [H, dh, d], head_gram [H, dh, H, dh], contiguous
    View x;          // [B, n, d], with the type of v and rows as those of v, or none
    View cross;      // [H, dh, d] contiguous, or none
    View out;        // head_norms [B, n, H], head_gram [B, n, H, H]
    View out_cross;  // [B, n, H] or none
    int n = 0, heads = 0, group = 0, width = 0;  // tokens, heads, heads that share a value head, d
    int head_dim = 0;                            // dh of the matrix; rows of v may have zeros after it
};

struct SquareArgs {
    static constexpr int MAX_COUNT = 2;
    View x;                          // [B, n, d] f32, f16 or bf16; rows are whole, aligned pieces of 16 bytes
    const float* gammas[MAX_COUNT];  // [d] each, padded like the rows of x, with zeros past d
    int count;                       // number of gammas
    int width;                       // d
    float* out;                      // [B, n]
};

// All tensors are f32, and the features of f and y are contiguous.
struct ProximityArgs {
    View alpha;  // [B, H, T, n]
    View f;      // [B, H, n, d]
    View y;      // [B, T, d]
    View out;    // [B, T, n]
};

}  // namespace pyglobenc
