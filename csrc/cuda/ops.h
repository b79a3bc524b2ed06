// What Python calls. Included by bindings.cpp, which no nvcc compiles.
#pragma once

#include <cstdint>
#include <string>

#include "pairs.h"
#include "values.h"

namespace pyglobenc {

// Why nothing runs here, such as a missing driver; empty if kernels run.
std::string problem();

// The current device's dynamic shared memory for a block, in bytes, and its multiprocessors.
int shared_limit();
int processors();

// See pyglobenc/ops; exact: products of float32 keep float32's digits.
void rollout_step(const PairArgs& args, bool exact, void* stream);
void token_norms(const PairArgs& args, bool exact, void* stream);
void head_gram(const ValueArgs& args, bool exact, void* stream);
void head_norms(const ValueArgs& args, bool exact, void* stream);
void mapped_square(const SquareArgs& args, void* stream);

}  // namespace pyglobenc
