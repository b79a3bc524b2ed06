// mapped_square: computes |x[i] M|^2, where M = (C diag(gamma_1)) (C diag(gamma_2)) and C is the centering
// matrix (Modarressi et al., 2022, eq. 6 to 10, applied to the residual).
//
// A warp takes a row. It computes each mean after it has applied the maps before it. The n * d numbers are
// read once.
#include "division.h"
#include "launch.h"
#include "ops.h"
#include "widen.h"

namespace pyglobenc {
namespace {

constexpr int SQUARE_THREADS = 128;

// The groups of four numbers of a row that a lane takes. It keeps those of the first 1,024 numbers and reads
// later ones again.
template <class V>
struct Row {
    static constexpr int HELD = 8, STEP = 4 * 32;
    Bytes16 held[HELD];
    const V* from;
    int width;

    DEVICE Row(const V* from, int width) : from(from), width(width) {
        UNROLL
        for (int k = 0; k < HELD; ++k) {
            const int at = k * STEP + 4 * lane();
            held[k] = at < width ? load_four(from + at) : Bytes16{};
        }
    }

    // Returns the sum over the warp of body(four numbers, their first column).
    template <class Body>
    DEVICE float sum(const Body& body) const {
        float out = 0;
        UNROLL
        for (int k = 0; k < HELD; ++k) {
            const int at = k * STEP + 4 * lane();
            if (at < width) out += body(held[k], at);
        }
        for (int at = HELD * STEP + 4 * lane(); at < width; at += STEP) out += body(load_four(from + at), at);
        return sum_over_warp(out);
    }
};

// Returns four numbers of a row, from column `at`, after the first `passed` maps. Past the end of the row
// they are 0, since the gammas are.
DEVICE Float4 mapped(const SquareArgs& p, const Bytes16& four, int at,
                     const float (&means)[SquareArgs::MAX_COUNT], int passed) {
    Float4 out;
    for (int e = 0; e < 4; ++e) out.x[e] = from_bits(four.word[e]);
    UNROLL
    for (int k = 0; k < SquareArgs::MAX_COUNT; ++k) {
        if (k >= passed) break;
        const Bytes16 gamma = load_four(p.gammas[k] + at);
        for (int e = 0; e < 4; ++e) out.x[e] = (out.x[e] - means[k]) * from_bits(gamma.word[e]);
    }
    return out;
}

template <class V>
KERNEL(SQUARE_THREADS)
mapped_square_kernel(SquareArgs p) {
    const int64_t n = p.x.shape[1], i = int64_t(block()) * (SQUARE_THREADS / 32) + warp();
    if (i >= p.x.shape[0] * n) return;
    const Row<V> row(static_cast<const V*>(p.x.data) + i / n * p.x.stride[0] + i % n * p.x.stride[1],
                     p.width);
    float means[SquareArgs::MAX_COUNT] = {};
    UNROLL
    for (int k = 0; k < SquareArgs::MAX_COUNT; ++k) {
        if (k == p.count) break;
        means[k] = row.sum([&](const Bytes16& four, int at) {
            const Float4 m = mapped(p, four, at, means, k);
            return (m.x[0] + m.x[1]) + (m.x[2] + m.x[3]);
        }) / float(p.width);
    }
    const float square = row.sum([&](const Bytes16& four, int at) {
        const Float4 m = mapped(p, four, at, means, p.count);
        return fmaf(m.x[0], m.x[0], m.x[1] * m.x[1]) + fmaf(m.x[2], m.x[2], m.x[3] * m.x[3]);
    });
    if (lane() == 0) p.out[i] = square;
}

}  // namespace

void mapped_square(const SquareArgs& p, void* stream) {
    const auto kernel = p.x.type == Type::f32   ? mapped_square_kernel<float>
                        : p.x.type == Type::f16 ? mapped_square_kernel<f16>
                                                : mapped_square_kernel<bf16>;
    constexpr int rows = SQUARE_THREADS / 32;
    launch(kernel, (p.x.shape[0] * p.x.shape[1] + rows - 1) / rows, SQUARE_THREADS, 0, stream, p);
}

}  // namespace pyglobenc
