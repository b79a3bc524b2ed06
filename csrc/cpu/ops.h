// Declares the functions of one instruction set; kernels.h describes their arguments.
#pragma once

#include "kernels.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

void pair_norms(const PairArgs& args, const View& out);
void rollout_step(const PairArgs& args, const View& r, const View& out, const View& log_scale);
void head_gram(const View& v, const View& kernel, const View& x, const View& cross_kernel, const View& gram,
               const View& cross, int threads);
void norm_terms(const View& v, const View& weight, const View& x, const View& gammas, const View& gram,
                const View& cross, const View& residual, int threads);
void clone_relevance(const float* const* parts, int64_t n_parts, const float* x, float* out, int64_t count,
                     int threads);
void add_relevance(const float* r, const float* a, const float* b, float* out_a, float* out_b, int64_t batch,
                   int64_t count, float stabilizer, bool rescale, int threads);
int64_t linear_quotient(const float* r, const float* output, const float* bias, const float* bound,
                        float least, int64_t rows, int64_t width, float* s, uint8_t* dead, int threads);
void linear_product(const float* x, const float* signed_sums, const float* abs_sums, float* out,
                    int64_t count, int threads);
bool matmul(const View& a, bool absolute_a, const View& b, bool absolute_b, const View& out, int threads);
void project(const View& t, const View& u, const View& out, int threads);
void proximity(const View& alpha, const View& f, const View& y, const View& out, int threads);
void relevance_attention(const RelevanceArgs& args, double* sums);
void relevance_tile(const RelevanceTile& tile, int threads);
void exp(const float* x, float* out, int64_t count, int threads);

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
