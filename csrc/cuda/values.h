// Arguments of head_gram and head_norms, see value_tile.h, and of mapped_square.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace pyglobenc {

constexpr int TOKENS = 64, VALUE_THREADS = 2 * TOKENS;  // of a block

struct ValueArgs {
    View v;  // [B, Hkv, n, dh] f32 or for head_gram f16 or bf16, rows of whole, aligned pieces of 16 bytes
    View matrix;     // head_norms [H, dh, d], head_gram [H, dh, H, dh], f32 as all below, contiguous
    View x;          // [B, n, d], type and rows as those of v, or none
    View cross;      // [H, dh, d] contiguous, or none
    View out;        // head_norms [B, n, H], head_gram [B, n, H, H]
    View out_cross;  // [B, n, H] or none
    int n = 0, heads = 0, group = 0, width = 0;  // tokens, heads, heads that share a value head, d
    int head_dim = 0;                            // of the matrix; that of v may be padded with zeros
};

struct SquareArgs {
    static constexpr int MAX_COUNT = 2;
    View x;                          // [B, n, d] f32, f16 or bf16, rows of whole, aligned pieces of 16 bytes
    const float* gammas[MAX_COUNT];  // [d], as rows of x; zeros past d
    int count;                       // of gammas
    int width;                       // d
    float* out;                      // [B, n]
};

}  // namespace pyglobenc
