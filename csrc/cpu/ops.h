// Entries of one instruction set.
#pragma once

#include "kernels.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

void token_norms(const PairArgs& args, const View& out);
void rollout_step(const PairArgs& args, const View& r, const View& out);
void head_gram(const View& v, const View& kernel, const View& projected, const View& gram, const View& cross, int threads);
void exp(const float* x, float* out, int64_t count);

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
