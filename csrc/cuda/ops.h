// Declares the functions that Python calls. bindings.cpp includes this file and is not compiled by nvcc.
#pragma once

#include <cstdint>
#include <string>

#include "pairs.h"
#include "values.h"

namespace pyglobenc {

// Returns why no kernel can run here, such as a missing driver; empty if kernels run.
std::string problem();

// Return the current device's dynamic shared memory for a block, in bytes, and its number of multiprocessors.
int shared_limit();
int processors();

// pyglobenc/ops says what these compute. With `exact`, products of float32 keep float32's digits.
void rollout_step(const PairArgs& args, bool exact, void* stream);
void pair_norms(const PairArgs& args, bool exact, void* stream);
void head_gram(const ValueArgs& args, bool exact, void* stream);
void head_norms(const ValueArgs& args, bool exact, void* stream);
void mapped_square(const SquareArgs& args, void* stream);
void proximity(const ProximityArgs& args, void* stream);

}  // namespace pyglobenc
