// clone_relevance: computes x * sum_k R_k / safe(x) in one pass over memory.
#include "division.h"
#include "ops.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

void clone_relevance(const float* const* parts, int64_t n_parts, const float* x, float* out, int64_t count,
                     int threads) {
    stretches(count, threads, [=](int64_t, int64_t first, int64_t last) {
        vectors(first, last, [=](int64_t i, int64_t lanes) {
            Floats total = load_some(parts[0] + i, lanes);
            for (int64_t k = 1; k < n_parts; ++k) total += load_some(parts[k] + i, lanes);
            const Floats value = load_some(x + i, lanes);
            store_some(out + i, safe_divide(total, value, 0) * value, lanes);
        });
    });
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
