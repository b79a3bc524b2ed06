// Declares the arguments of the kernels, and the table of one instruction set's functions. This file has no
// intrinsics and no templates, because code for every machine includes it.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace pyglobenc {

// The arguments that pair_norms and rollout_step share. PairInputs in pyglobenc/backends/inputs.py describes
// them.
struct PairArgs {
    View q;            // [B, H, n, dh] f32, f16 or bf16
    View k;            // [B, Hkv, n, dh] the type of q
    View lse;          // [B, H, n]
    View gram;         // [B, n, H, H]
    View cross;        // [B, n, H] or none
    View residual_sq;  // [B, n] or none
    View rstd;         // [B, n] or none
    View key_mask;     // [B, n] u8 or none
    View rows;         // [B, T] i64 or none
    View cu_seqlens;   // [S + 1] i64 or none; S sequences are packed into the one example of the batch
    float scaling = 1;
    int64_t left = -1, right = -1;
    int threads = 1;
};

// The arguments of relevance_attention, and of relevance_rollout_step, which leaves out r_q, r_k and r_v.
// RelevanceInputs in pyglobenc/backends/inputs.py describes them.
struct RelevanceArgs {
    View q, k, v;        // [B, H, n, dh]
    View lse;            // [B, H, n]
    View grad_o;         // [B, H, n, dh] or none
    View s;              // [B, H, n, dh]
    View key_mask;       // [B, n] u8 or none
    View r;              // [B, T, n] or none
    View r_q, r_k, r_v;  // [B, H, n, dh], 0 at masked keys, or none
    View row_sums;       // [B, n]
    View r_out;          // [B, T, n] or none
    float scaling = 1, stabilizer = 0;
    int64_t left = -1, right = -1;
    bool additive_mask = false, normalize = false;
    int threads = 1;
};

// A block of queries of relevance_maps against all keys.
struct RelevanceTile {
    View dots;       // [B, H, I, n] contiguous, q . k
    View relevance;  // [B, H, I, n] contiguous, s . v
    View gradient;   // [B, H, I, n] contiguous, grad_o . v, or none
    View lse;        // [B, H, I]
    View map;        // [B, I, n], A
    View key_mask;   // [B, n] u8 or none
    View rows;       // [B, I] i64, the queries; without it they are first, first + 1, ...
    int64_t first = 0;
    float scaling = 1;
    int64_t left = -1, right = -1;
};

struct Kernels {
    const char* name;
    bool (*supported)();
    void (*pair_norms)(const PairArgs& args, const View& out);  // out [B, T or n, n]
    // r, out [B, T, n]; log_scale [B or S, T], to which the scale of each row of out is added
    void (*rollout_step)(const PairArgs& args, const View& r, const View& out, const View& log_scale);
    void (*head_gram)(const View& v, const View& kernel, const View& x, const View& cross_kernel,
                      const View& gram, const View& cross, int threads);
    void (*norm_terms)(const View& v, const View& weight, const View& x, const View& gammas, const View& gram,
                       const View& cross, const View& residual, int threads);
    void (*clone_relevance)(const float* const* parts, int64_t n_parts, const float* x, float* out,
                            int64_t count, int threads);
    void (*add_relevance)(const float* r, const float* a, const float* b, float* out_a, float* out_b,
                          int64_t batch, int64_t count, float stabilizer, bool rescale, int threads);
    int64_t (*linear_quotient)(const float* r, const float* output, const float* bias, const float* bound,
                               float least, int64_t rows, int64_t width, float* s, uint8_t* dead,
                               int threads);
    void (*linear_product)(const float* x, const float* signed_sums, const float* abs_sums, float* out,
                           int64_t count, int threads);
    // Writes a b to out [1 or 2, rows, columns], or returns false. Element 1 of out is a |b|. a [rows, sum]
    // and b [sum, columns] are float32 or half precision, and may be taken by their absolute values.
    bool (*matmul)(const View& a, bool absolute_a, const View& b, bool absolute_b, const View& out,
                   int threads);
    // sums [B, 2], to which the sums of R_alpha and of t R_alpha / safe(t) are added
    void (*relevance_attention)(const RelevanceArgs& args, double* sums);
    void (*relevance_tile)(const RelevanceTile& tile, int threads);
    void (*proximity)(const View& alpha, const View& f, const View& y, const View& out, int threads);
    // Writes the products of t [B, n, H, dh] with u [H * dh] to element 0 of out [1 or 2, B, n], and the L2
    // norms to element 1.
    void (*project)(const View& t, const View& u, const View& out, int threads);
    void (*exp)(const float* x, float* out, int64_t count, int threads);
};

// A build defines only the tables of the instruction sets that it was made for.
extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512bf16, kernels_amx;

// Allocates memory aligned to cache lines, and throws std::bad_alloc if there is none. It is not inline,
// because it must be compiled for the oldest machine.
void* allocate(int64_t bytes);
void release(void* memory);

}  // namespace pyglobenc
