// rollout_step: multiplies rows of the rollout by the norms, without storing the norms, and scales each row
// to maximum 1.
#include "ops.h"
#include "pair_kernel.h"

namespace pyglobenc {
namespace {

constexpr int FINISH_THREADS = 1024;  // largest number of threads in a block

// Returns the larger of two values, and NaN if one is NaN.
DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

DEVICE float largest_of_warp(float x) {
    UNROLL
    for (int mask = 16; mask; mask /= 2) x = larger(x, shuffle_xor(x, mask));
    return x;
}

// Returns the sum over the shares, which lie `step` apart. The order of the sum is fixed. All loads start
// before the first addition.
DEVICE float total(const float* parts, int shares, int64_t step) {
    float each[MAX_SHARES], sum = *parts;
    UNROLL
    for (int share = 1; share < MAX_SHARES; ++share)
        each[share] = share < shares ? parts[share * step] : 0.0f;
    UNROLL
    for (int share = 1; share < MAX_SHARES; ++share) sum += each[share];
    return sum;
}

// A block scales one row of an example or packed sequence, like rescale_rows of
// pyglobenc/backends/shared/rows.py.
KERNEL(FINISH_THREADS) finish_kernel(PairArgs p) {
    const int of = block() / p.n_rows, t = block() % p.n_rows;
    const int first = p.cu_seqlens.data ? element<int>(p.cu_seqlens, of) : 0,
              last = p.cu_seqlens.data ? element<int>(p.cu_seqlens, of + 1) : p.n;
    const int64_t row = (int64_t(p.cu_seqlens.data ? 0 : of) * p.n_rows + t) * p.n,
                  whole = p.q.shape[0] * p.n_rows * p.n;
    float* const out = static_cast<float*>(p.out.data) + row;
    float* const tops = reinterpret_cast<float*>(shared());
    float top = 0;
    for (int key = first + thread(); key < last; key += threads()) {
        const float sum = total(p.parts + row + key, p.shares, whole);
        out[key] = sum;
        top = larger(top, sum);
    }
    top = largest_of_warp(top);
    if (lane() == 0) tops[warp()] = top;
    barrier();
    top = largest_of_warp(lane() < threads() / 32 ? tops[lane()] : 0.0f);
    // Rows of zeros, and rows with a NaN, stay as they are.
    if (!(top > 0)) top = 1;
    for (int key = first + thread(); key < last; key += threads()) out[key] /= top;
    if (thread() == 0)
        static_cast<float*>(p.out_scale.data)[block()] =
            static_cast<const float*>(p.log_scale.data)[block()] + logf(top);
}

}  // namespace

void rollout_step(const PairArgs& args, bool exact, void* stream) {
    const PairArgs p = prepared(args, stream);
    run_pairs<true>(p, exact, stream);
    const int64_t rows = p.n_rows * (p.cu_seqlens ? p.cu_seqlens.shape[0] - 1 : p.q.shape[0]);
    // Most packed sequences are shorter than a block of 256.
    const int threads = (p.cu_seqlens && p.n > 256 ? 256
                         : p.n < FINISH_THREADS    ? p.n + 31
                                                   : FINISH_THREADS) /
                        32 * 32;
    launch(finish_kernel, rows, threads, FINISH_THREADS / 32 * 4, stream, p);
}

}  // namespace pyglobenc
