// add_relevance: R_a = a R / safe(a + b), R_b likewise, each rescaled to its share of an example's relevance, in two passes (Chefer et al.,
// 2021, eq. 9 and 10; the published code's Add).
//
// The first pass leaves each block's sums of R_a, R_b and R in float64 (they cancel up to a millionfold), the second adds the blocks up in
// a fixed order and writes both branches: r, a and b read twice, two writes, 8 floats an element against about 20 in plain torch.
#include "division.h"
#include "launch.h"
#include "relevance.h"

namespace pyglobenc {

constexpr int ADD_THREADS = 256;
constexpr int ADD_MOST_BLOCKS = ADD_THREADS;  // an example: fills a card, and a block reads their sums at a glance

struct Branches {
    Four r, a, b;  // R, R_a and R_b before the rescaling
};

DEVICE Branches branches(const AddArgs& args, int64_t example, int64_t at) {
    const int64_t start = example * args.size;
    Branches out = {load_four(args.r + start, at, args.size), load_four(args.a + start, at, args.size),
                    load_four(args.b + start, at, args.size)};
    UNROLL
    for (int e = 0; e < 4; ++e) {
        const float s = safe_divide(out.r.x[e], out.a.x[e] + out.b.x[e], args.stabilizer);
        out.a.x[e] *= s;
        out.b.x[e] *= s;
    }
    return out;
}

// body(at) for this thread's fours of this block's part of an example.
template <class Body>
DEVICE void for_fours(const AddArgs& args, int64_t per_block, const Body& body) {
    const int64_t first = block() % args.blocks * per_block;
    const int64_t last = first + per_block < args.size ? first + per_block : args.size;
    for (int64_t at = first + 4 * thread(); at < last; at += 4 * ADD_THREADS) body(at);
}

KERNEL(ADD_THREADS) add_relevance_sums_kernel(AddArgs args, int64_t per_block) {
    const int64_t example = block() / args.blocks;
    double sums[3] = {0, 0, 0};
    for_fours(args, per_block, [&](int64_t at) {
        const Branches part = branches(args, example, at);
        UNROLL
        for (int e = 0; e < 4; ++e) {
            sums[0] += double(part.a.x[e]);
            sums[1] += double(part.b.x[e]);
            sums[2] += double(part.r.x[e]);
        }
    });
    sum_over_block(sums);
    if (thread() == 0)
        for (int k = 0; k < 3; ++k) args.sums[3 * int64_t(block()) + k] = sums[k];
}

KERNEL(ADD_THREADS) add_relevance_kernel(AddArgs args, int64_t per_block) {
    const int64_t example = block() / args.blocks;
    float factor_a = 1, factor_b = 1;
    if (args.rescale) {
        double sums[3] = {0, 0, 0};
        if (thread() < args.blocks)
            for (int k = 0; k < 3; ++k) sums[k] = args.sums[3 * (example * args.blocks + thread()) + k];
        sum_over_block(sums);
        const double both = magnitude(sums[0]) + magnitude(sums[1]);
        factor_a = float(safe_divide(safe_divide(magnitude(sums[0]), both) * sums[2], sums[0]));
        factor_b = float(safe_divide(safe_divide(magnitude(sums[1]), both) * sums[2], sums[1]));
    }
    for_fours(args, per_block, [&](int64_t at) {
        Branches part = branches(args, example, at);
        UNROLL
        for (int e = 0; e < 4; ++e) {
            part.a.x[e] *= factor_a;
            part.b.x[e] *= factor_b;
        }
        store_four(args.r_a + example * args.size, at, args.size, part.a);
        store_four(args.r_b + example * args.size, at, args.size, part.b);
    });
}

static int64_t per_block(int64_t size, int blocks) {
    constexpr int64_t each = 4 * ADD_THREADS;
    return ((size + each - 1) / each + blocks - 1) / blocks * each;
}

int add_relevance_blocks(int64_t size) {
    const int64_t tiles = per_block(size, 1) / (4 * ADD_THREADS);
    return int(tiles < ADD_MOST_BLOCKS ? tiles : ADD_MOST_BLOCKS);
}

void add_relevance(const AddArgs& args, void* stream) {
    const int64_t blocks = args.batch * args.blocks;
    const int bytes = ADD_THREADS / 32 * 3 * sizeof(double);
    if (args.rescale) launch(add_relevance_sums_kernel, blocks, ADD_THREADS, bytes, stream, args, per_block(args.size, args.blocks));
    launch(add_relevance_kernel, blocks, ADD_THREADS, bytes, stream, args, per_block(args.size, args.blocks));
}

}  // namespace pyglobenc
