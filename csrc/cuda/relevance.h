// Arguments of the relevance kernels, float32 unless noted. The bindings include this and are not compiled by
// nvcc.
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
    const int* cu_seqlens;  // [examples + 1], where each one's tokens begin, and their number; null: an
                            // example is one token
    double* sums;           // [add_relevance_parts, 3]: of R_a, R_b and R
    float* r_a;             // [tokens, width]
    float* r_b;             // [tokens, width]
    int64_t width;
    int examples, longest;  // tokens of the longest
    float stabilizer;
    bool rescale;
};

// Returns the largest number of parts of the examples' sums, from the total number of elements.
int64_t add_relevance_parts(int64_t size, int64_t examples);
void add_relevance(const AddArgs& args, void* stream);

// Arguments of both passes of the Linear rule. The flag of a strip is set if it holds nearly dead outputs;
// bound then becomes R / safe(Z) of these, and 0 elsewhere in the strip.
struct LinearArgs {
    const float* x;       // [rows, d_in]
    const float* weight;  // [d_out, d_in], of any strides
    float* bound;         // [rows, d_out]: |x| |W|^T
    int32_t* flags;       // [rows, strips]
    int64_t rows, output_step, input_step;
    int d_in, d_out, strips;
};

// Outputs whose Z is below `least` of bound + |bias| are nearly dead.
struct QuotientArgs : LinearArgs {
    const float* r;       // [rows, d_out]
    const float* output;  // [rows, d_out]: x W^T + bias
    const float* bias;    // [d_out] or null
    float* s;             // [rows, d_out]
    float least;
};

struct ProductArgs : LinearArgs {
    float* out;            // [rows, d_in]: S W, then the result
    const float* plain_s;  // [rows, d_in]: S |W|
};

constexpr int LINEAR_STRIP = 128;  // a warp's columns

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
    View rows;        // [B, m] int64, or null: the queries of a map
    View w;           // [B, T, n], T <= MAX_STEP_ROWS, or null: rows of the rollout
    View cu_seqlens;  // [S + 1] int32, where each of the sequences packed into one begins, and n, or null
    float* r_q;       // [B, H, n, dh], as are r_k and r_v; null: no relevance
    float* r_k;
    float* r_v;
    float* step;   // [B, H, T, n]: w times each head's A
    float* map;    // [B, m, n]
    double* sums;  // [1, B, H, n]: of the rows of each head's A; if additive [3, B, H, n], also of R_alpha
                   // and of R'
    float scaling, stabilizer;
    int left, right;  // the window, n for unlimited
    bool additive;
    int examples, longest;  // B and n, or S and the tokens of the longest of these

    static constexpr int MAX_STEP_ROWS = 8;
};

// Returns the bytes of shared memory that every kernel needs at least.
int relevance_shared(int head_dim);
void relevance_rows(const RelevanceArgs& args, void* stream);
void relevance_columns(const RelevanceArgs& args, void* stream);
void relevance_maps(const RelevanceArgs& args, void* stream);

}  // namespace pyglobenc
