// linear_relevance: what surrounds the GEMMs of the Linear rule, one pass over memory each (Chefer et al., 2021, eq. 5).
//
//   S = R / safe(Z), Z = (y - bias + |x| |W|^T) / 2     three reads, one write, where torch makes seven passes
//   R_in = (x (S W) + |x| (S |W|)) / 2                  three reads, one write
#include "division.h"
#include "launch.h"
#include "relevance.h"

namespace pyglobenc {

constexpr int LINEAR_THREADS = 256;

KERNEL(LINEAR_THREADS) linear_quotient_kernel(QuotientArgs args) {
    const int64_t size = args.rows * args.width, first = int64_t(block()) * QUOTIENT_BLOCK;
    // one division of 64 bits a block, of 32 bits four elements
    const uint32_t width = uint32_t(args.width), start = uint32_t(first % args.width);
    int dead[1] = {0};
    for (int inner = 4 * thread(); inner < QUOTIENT_BLOCK; inner += 4 * LINEAR_THREADS) {
        const int64_t at = first + inner;
        if (at >= size) break;
        uint32_t column = (start + inner) % width;
        const Four r = load_four(args.r, at, size), output = load_four(args.output, at, size), bound = load_four(args.bound, at, size);
        Four s;
        UNROLL
        for (int e = 0; e < 4; ++e) {
            const float bias = args.bias ? args.bias[column] : 0.0f;
            column = column + 1 == width ? 0 : column + 1;
            const float z = (output.x[e] + bound.x[e] - bias) * 0.5f;
            const bool lost = z < args.least * (bound.x[e] + magnitude(bias)) && r.x[e] != 0;
            s.x[e] = lost ? 0.0f : safe_divide(r.x[e], z);
            dead[0] += lost;
            if (args.dead && at + e < size) args.dead[at + e] = lost;
        }
        store_four(args.s, at, size, s);
    }
    sum_over_block(dead);
    if (thread() == 0) args.counts[block()] = dead[0];
}

void linear_quotient(const QuotientArgs& args, void* stream) {
    const int64_t blocks = (args.rows * args.width + QUOTIENT_BLOCK - 1) / QUOTIENT_BLOCK;
    launch(linear_quotient_kernel, blocks, LINEAR_THREADS, LINEAR_THREADS / 32 * sizeof(int), stream, args);
}

KERNEL(LINEAR_THREADS) linear_product_kernel(const float* x,         // [size]
                                             const float* signed_s,  // [size]: S W
                                             const float* plain_s,   // [size]: S |W|
                                             float* out,             // [size]
                                             int64_t size) {
    const int64_t at = 4 * (int64_t(block()) * LINEAR_THREADS + thread());
    if (at >= size) return;
    const Four value = load_four(x, at, size), left = load_four(signed_s, at, size), right = load_four(plain_s, at, size);
    Four product;
    UNROLL
    for (int e = 0; e < 4; ++e) product.x[e] = (value.x[e] * left.x[e] + magnitude(value.x[e]) * right.x[e]) * 0.5f;
    store_four(out, at, size, product);
}

void linear_product(const float* x, const float* signed_s, const float* plain_s, float* out, int64_t size, void* stream) {
    const int each = 4 * LINEAR_THREADS;
    launch(linear_product_kernel, (size + each - 1) / each, LINEAR_THREADS, 0, stream, x, signed_s, plain_s, out, size);
}

}  // namespace pyglobenc
