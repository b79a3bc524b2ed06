// Declares the arguments of the relevance kernels, which are float32 unless noted. The bindings include this
// file and are not compiled by nvcc.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace pyglobenc {

struct CloneParts {
    static constexpr int MAX_COUNT = 4;
    const float* each[MAX_COUNT];
    int count;
};

void clone_relevance(const CloneParts& parts, const float* x, float* out, int64_t size, void* stream);

struct AddArgs {
    const float* r;         // [tokens, width]
    const float* a;         // [tokens, width]
    const float* b;         // [tokens, width]
    const int* cu_seqlens;  // [examples + 1], the first token of each example, and the number of tokens; null
                            // if each example is one token
    double* sums;           // [add_relevance_parts, 3], partial sums of R_a, R_b and R
    float* r_a;             // [tokens, width]
    float* r_b;             // [tokens, width]
    int64_t width;
    int examples, longest;  // number of examples, and of tokens of the longest one
    float stabilizer;
    bool rescale;
};

// Returns the largest number of partial sums that all examples need, from the total number of elements.
int64_t add_relevance_parts(int64_t size, int64_t examples);
void add_relevance(const AddArgs& args, void* stream);

// The arguments of both passes of the Linear rule. The flag of a strip is set if the strip has nearly dead
// outputs. Then bound becomes R / safe(Z) for these outputs, and 0 elsewhere in the strip.
struct LinearArgs {
    const float* x;       // [rows, d_in]
    const float* weight;  // [d_out, d_in], with any strides
    float* bound;         // [rows, d_out]: |x| |W|^T
    int32_t* flags;       // [rows, strips]
    int64_t rows, output_step, input_step;
    int d_in, d_out, strips;
};

// An output is nearly dead if its Z is below the fraction `least` of bound + |bias|.
struct QuotientArgs : LinearArgs {
    const float* r;       // [rows, d_out]
    const float* output;  // [rows, d_out]: x W^T + bias
    const float* bias;    // [d_out] or null
    float* s;             // [rows, d_out]
    float least;
};

struct ProductArgs : LinearArgs {
    float* out;            // [rows, d_in]: S W, which the result overwrites
    const float* plain_s;  // [rows, d_in]: S |W|
};

constexpr int LINEAR_STRIP = 128;  // columns that a warp takes at a time

void linear_quotient(const QuotientArgs& args, void* stream);
void linear_product(const ProductArgs& args, void* stream);

struct RelevanceArgs {
    View q;           // [B, H, n, dh], the last axis contiguous
    View k;           // [B, H, n, dh]
    View v;           // [B, H, n, dh]
    View s;           // [B, H, n, dh]
    View grad;        // [B, H, n, dh] or null
    View lse;         // [B, H, n]
    View key_mask;    // [B, n] bool, or null
    View rows;        // [B, m] int64, the queries of a map, or null
    View w;           // [B, T, n], rows of the rollout, T <= MAX_STEP_ROWS, or null
    View cu_seqlens;  // [S + 1] int32, the first token of each packed sequence, and n; or null
    float* r_q;       // [B, H, n, dh], or null if no relevance is wanted; r_k and r_v likewise
    float* r_k;
    float* r_v;
    float* step;   // [B, H, T, n], w times each head's A
    float* map;    // [B, m, n]
    double* sums;  // [1, B, H, n], the row sums of each head's A. If additive, [3, B, H, n]: also those of
                   // R_alpha and of R'
    float scaling, stabilizer;
    int left, right;        // the window; n for an unlimited one
    bool additive;          // whether the mask is added to the scores
    int examples, longest;  // B and n, or S and the number of tokens of the longest sequence

    static constexpr int MAX_STEP_ROWS = 8;
};

// Returns the bytes of shared memory that every kernel needs at least.
int relevance_shared(int head_dim);
void relevance_rows(const RelevanceArgs& args, void* stream);
void relevance_columns(const RelevanceArgs& args, void* stream);
void relevance_maps(const RelevanceArgs& args, void* stream);

}  // namespace pyglobenc
