// clone_relevance: computes R = x * sum_k R_k / safe(x) in one pass over memory. This is the Clone module of
// the published code.
#include "division.h"
#include "launch.h"
#include "relevance.h"

namespace pyglobenc {

constexpr int CLONE_THREADS = 256;

KERNEL(CLONE_THREADS)
clone_relevance_kernel(CloneParts parts,  // each [size]
                       const float* x,    // [size]
                       float* out,        // [size]
                       int64_t size) {
    const int64_t at = 4 * (int64_t(block()) * CLONE_THREADS + thread());
    if (at >= size) return;
    Float4 total = load_four(parts.each[0], at, size);
    UNROLL
    for (int k = 1; k < CloneParts::MAX_COUNT; ++k) {
        if (k >= parts.count) break;
        const Float4 part = load_four(parts.each[k], at, size);
        UNROLL
        for (int e = 0; e < 4; ++e) total.x[e] += part.x[e];
    }
    const Float4 seen = load_four(x, at, size);
    UNROLL
    for (int e = 0; e < 4; ++e) total.x[e] = safe_divide(total.x[e], seen.x[e]) * seen.x[e];
    store_four(out, at, size, total);
}

void clone_relevance(const CloneParts& parts, const float* x, float* out, int64_t size, void* stream) {
    const int each = 4 * CLONE_THREADS;
    launch(clone_relevance_kernel, (size + each - 1) / each, CLONE_THREADS, 0, stream, parts, x, out, size);
}

}  // namespace pyglobenc
