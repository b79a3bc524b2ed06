// add_relevance: R_a = a R / safe(a + b), R_b = b R / safe(a + b), each rescaled to its share of the
// example's relevance (Chefer et al., 2021, eq. 9 and 10; the Add module of the published code).
//
// The first pass over memory writes each block's sums of R_a, R_b and R. The sums are in float64, because
// their terms cancel up to a millionfold. The second pass adds the sums of the blocks in a fixed order, and
// writes both branches. Both passes read r, a and b, and the second writes two results. That is 8 floats an
// element; plain torch moves about 20.
#include "division.h"
#include "launch.h"
#include "relevance.h"

namespace pyglobenc {
namespace {

constexpr int ADD_THREADS = 256;
// The largest number of blocks of an example. They fill a GPU, and one block can still read all their sums at
// once.
constexpr int ADD_MAX_BLOCKS = ADD_THREADS;
constexpr int TILE = 4 * ADD_THREADS;  // elements that a block takes at once

// The elements of an example that one block computes: first to last - 1.
struct BlockRange {
    int64_t first, last;
    double* sums;       // [blocks, 3], of the example
    int block, blocks;  // number of this block, and how many the example has; a block past them is idle
};

BOTH int tiles_of(int64_t size) { return int((size + TILE - 1) / TILE); }
BOTH int blocks_of(int tiles) { return tiles < ADD_MAX_BLOCKS ? tiles : ADD_MAX_BLOCKS; }

DEVICE BlockRange range_of(const AddArgs& args, int most_blocks) {
    const int example = block() / most_blocks, index = block() % most_blocks;
    const int64_t first = (args.cu_seqlens ? args.cu_seqlens[example] : example) * args.width;
    const int64_t end = (args.cu_seqlens ? args.cu_seqlens[example + 1] : example + 1) * args.width;
    const int tiles = tiles_of(end - first), blocks = blocks_of(tiles),
              each = (tiles + blocks - 1) / blocks * TILE;
    const int64_t from = first + int64_t(index) * each, to = from + each;
    // An example has at most one block more than the tiles that begin in it.
    return {from, to < end ? to : end, args.sums + 3 * (first / TILE + example), index, blocks};
}

struct Branches {
    Float4 r, a, b;  // R, R_a and R_b before the rescaling
};

DEVICE Branches branches(const AddArgs& args, int64_t at, int64_t last) {
    Branches out = {load_four(args.r, at, last), load_four(args.a, at, last), load_four(args.b, at, last)};
    UNROLL
    for (int e = 0; e < 4; ++e) {
        const float s = safe_divide(out.r.x[e], out.a.x[e] + out.b.x[e], args.stabilizer);
        out.a.x[e] *= s;
        out.b.x[e] *= s;
    }
    return out;
}

KERNEL(ADD_THREADS) add_relevance_sums_kernel(AddArgs args, int most_blocks) {
    const BlockRange range = range_of(args, most_blocks);
    if (range.block >= range.blocks) return;
    double sums[3] = {0, 0, 0};
    for (int64_t at = range.first + 4 * thread(); at < range.last; at += TILE) {
        const Branches part = branches(args, at, range.last);
        UNROLL
        for (int e = 0; e < 4; ++e) {
            sums[0] += double(part.a.x[e]);
            sums[1] += double(part.b.x[e]);
            sums[2] += double(part.r.x[e]);
        }
    }
    sum_over_block(sums);
    if (thread() == 0)
        for (int k = 0; k < 3; ++k) range.sums[3 * range.block + k] = sums[k];
}

KERNEL(ADD_THREADS) add_relevance_kernel(AddArgs args, int most_blocks) {
    const BlockRange range = range_of(args, most_blocks);
    if (range.block >= range.blocks) return;
    float factor_a = 1, factor_b = 1;
    if (args.rescale) {
        double sums[3] = {0, 0, 0};
        if (thread() < range.blocks)
            for (int k = 0; k < 3; ++k) sums[k] = range.sums[3 * thread() + k];
        sum_over_block(sums);
        const double both = magnitude(sums[0]) + magnitude(sums[1]);
        factor_a = float(safe_divide(safe_divide(magnitude(sums[0]), both) * sums[2], sums[0]));
        factor_b = float(safe_divide(safe_divide(magnitude(sums[1]), both) * sums[2], sums[1]));
    }
    for (int64_t at = range.first + 4 * thread(); at < range.last; at += TILE) {
        Branches part = branches(args, at, range.last);
        UNROLL
        for (int e = 0; e < 4; ++e) {
            part.a.x[e] *= factor_a;
            part.b.x[e] *= factor_b;
        }
        store_four(args.r_a, at, range.last, part.a);
        store_four(args.r_b, at, range.last, part.b);
    }
}

}  // namespace

int64_t add_relevance_parts(int64_t size, int64_t examples) { return size / TILE + examples; }

void add_relevance(const AddArgs& args, void* stream) {
    const int blocks = blocks_of(tiles_of(args.longest * args.width));
    const int bytes = ADD_THREADS / 32 * 3 * sizeof(double);
    if (args.rescale)
        launch(add_relevance_sums_kernel, int64_t(args.examples) * blocks, ADD_THREADS, bytes, stream, args,
               blocks);
    launch(add_relevance_kernel, int64_t(args.examples) * blocks, ADD_THREADS, bytes, stream, args, blocks);
}

}  // namespace pyglobenc
