// head_norms: computes the norms of the transformed vectors f[h, j] = v[h, j] W_O[h] (Kobayashi et al., 2020,
// eq. 5).
#include "ops.h"
#include "value_tile.h"

namespace pyglobenc {
namespace {

template <class T>
KERNEL(VALUE_THREADS)
head_norms_kernel(ValueArgs p) {
    const WarpTokens<float> tokens(p);
    const float* weight =
        static_cast<const float*>(p.matrix.data) + int64_t(tokens.head) * p.head_dim * p.width;
    // The squares of floats can lie outside the range of float.
    double sums[2] = {};
    add_products<T, float>(p, tokens, weight, p.width, p.width, nullptr, 0, sums);
    add_lanes(sums);
    float* out = static_cast<float*>(p.out.data) + tokens.b * int64_t(p.n) * p.heads + tokens.head;
    for (int half = 0; half < 2; ++half)
        if (lane() % 4 == 0 && tokens.row(half) < p.n)
            out[int64_t(tokens.row(half)) * p.heads] = float(sqrt(sums[half]));
}

}  // namespace

void head_norms(const ValueArgs& p, bool exact, void* stream) {
    if (exact)
        launch(head_norms_kernel<float>, value_blocks(p), VALUE_THREADS, VALUE_BYTES<float>, stream, p);
    else
        launch(head_norms_kernel<tf32>, value_blocks(p), VALUE_THREADS, VALUE_BYTES<tf32>, stream, p);
}

}  // namespace pyglobenc
