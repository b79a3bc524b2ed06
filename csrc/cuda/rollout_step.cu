// rollout_step: rows of the rollout times the norms, which are never stored.
#include "ops.h"
#include "pair_kernel.h"

namespace pyglobenc {

void rollout_step(const PairArgs& args, bool exact, void* stream) { run_pairs<true>(args, exact, stream); }

}  // namespace pyglobenc
