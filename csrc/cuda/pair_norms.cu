// pair_norms: computes and stores the norms of (query, key) pairs, for all queries or some.
#include "ops.h"
#include "pair_kernel.h"

namespace pyglobenc {

void pair_norms(const PairArgs& args, bool exact, void* stream) {
    run_pairs<false>(prepared(args, stream), exact, stream);
}

}  // namespace pyglobenc
