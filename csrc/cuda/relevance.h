// Arguments of the relevance kernels, all float32 unless said; included by bindings, which no nvcc compiles.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace pyglobenc {

struct CloneParts {
    static constexpr int MOST = 4;
    const float* each[MOST];
    int count;
};

void clone_relevance(const CloneParts& parts, const float* x, float* out, int64_t size, void* stream);

struct AddArgs {
    const float* r;  // [batch, size]
    const float* a;  // [batch, size]
    const float* b;  // [batch, size]
    double* sums;    // [batch, blocks, 3]: of R_a, R_b and R
    float* r_a;      // [batch, size]
    float* r_b;      // [batch, size]
    int64_t batch, size;
    int blocks;  // of an example, from add_relevance_blocks
    float stabilizer;
    bool rescale;
};

int add_relevance_blocks(int64_t size);
void add_relevance(const AddArgs& args, void* stream);

// Outputs whose Z is below `least` of bound + |bias| lost their digits: they get s = 0, are counted and marked in dead.
struct QuotientArgs {
    const float* r;       // [rows, width]
    const float* output;  // [rows, width]: x W^T + bias
    const float* bound;   // [rows, width]: |x| |W|^T
    const float* bias;    // [width] or null
    float* s;             // [rows, width]
    bool* dead;           // [rows, width] or null
    int64_t* counts;      // [blocks]: how many, of QUOTIENT_BLOCK elements each
    int64_t rows, width;
    float least;
};

constexpr int QUOTIENT_BLOCK = 4096;

void linear_quotient(const QuotientArgs& args, void* stream);
void linear_product(const float* x, const float* signed_s, const float* plain_s, float* out, int64_t size, void* stream);

struct RelevanceArgs {
    View q;         // [B, H, n, dh], the last axis contiguous
    View k;         // [B, H, n, dh]
    View v;         // [B, H, n, dh]
    View s;         // [B, H, n, dh]
    View grad;      // [B, H, n, dh] or null
    View lse;       // [B, H, n]
    View key_mask;  // [B, n] bool, or null
    View rows;      // [B, m] int64, or null: the queries of a map
    View w;         // [B, T, n], T <= MOST_ROWS, or null: rows of the rollout
    float* r_q;     // [B, H, n, dh], as are r_k and r_v; null: no relevance
    float* r_k;
    float* r_v;
    float* step;   // [B, H, T, n]: w times each head's A
    float* map;    // [B, m, n]
    double* sums;  // [1, B, H, n]: of the rows of each head's A; if additive [3, B, H, n], also of R_alpha and of R'
    float scaling, stabilizer;
    int left, right;  // the window, n for unlimited
    bool additive;

    static constexpr int MOST_ROWS = 8;
};

// Bytes of shared memory that the smallest block of the hungriest kernel takes.
int relevance_shared(int head_dim);
void relevance_rows(const RelevanceArgs& args, void* stream);
void relevance_columns(const RelevanceArgs& args, void* stream);
void relevance_maps(const RelevanceArgs& args, void* stream);

}  // namespace pyglobenc
