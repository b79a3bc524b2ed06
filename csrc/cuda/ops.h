// What Python calls. Included by bindings.cpp, which no nvcc compiles.
#pragma once

#include <cstdint>
#include <string>

#include "../common/view.h"

namespace pyglobenc {

// Why nothing runs here, such as a missing driver; empty if kernels run.
std::string problem();

// The current device's dynamic shared memory for a block, in bytes, and its multiprocessors.
int shared_limit();
int processors();

}  // namespace pyglobenc
