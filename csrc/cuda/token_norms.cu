// token_norms: norms of every (query, key) pair, or of chosen queries, stored.
#include "ops.h"
#include "pair_kernel.h"

namespace pyglobenc {

void token_norms(const PairArgs& args, bool exact, void* stream) { run_pairs<false>(prepared(args, stream), exact, stream); }

}  // namespace pyglobenc
