// relevance_maps and relevance_product: computes the map A of a block of queries from D = q k^T, P = s v^T
// and G = grad_o v^T of all heads, with the formulas of pyglobenc/ops/relevance_attention.py.
#include "division.h"
#include "ops.h"
#include "pack.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// Tells which keys query i sees: those inside its window that are not padding.
struct Visible {
    const RelevanceTile& tile;
    int64_t b, i;

    bool all() const { return tile.left < 0 && tile.right < 0 && !tile.key_mask; }

    // Returns a mask of lanes for the keys j, j + 1, ...
    Ints lanes(int64_t j, int64_t count) const {
        Ints out = {};
        for (int64_t l = 0; l < count; ++l) {
            const int64_t ahead = j + l - i;
            const bool window =
                (tile.right < 0 || ahead <= tile.right) && (tile.left < 0 || ahead >= -tile.left);
            const bool real = !tile.key_mask ||
                              static_cast<const uint8_t*>(tile.key_mask.data)[at(tile.key_mask, b, j + l)];
            out[l] = window && real ? -1 : 0;
        }
        return out;
    }
};

// Computes one row of the map.
static void tile_row(const RelevanceTile& tile, int64_t b, int64_t row) {
    const int64_t H = tile.dots.shape[1], I_ = tile.dots.shape[2], n = tile.dots.shape[3], plane = I_ * n;
    const int64_t i =
        tile.rows ? static_cast<const int64_t*>(tile.rows.data)[at(tile.rows, b, row)] : tile.first + row;
    const int64_t start = (b * H * I_ + row) * n;
    const float* const dots = static_cast<const float*>(tile.dots.data) + start;
    const float* const relevances = static_cast<const float*>(tile.relevance.data) + start;
    const float* const gradients =
        tile.gradient ? static_cast<const float*>(tile.gradient.data) + start : nullptr;
    float* const map = static_cast<float*>(tile.map.data) + at(tile.map, b, row);
    const Visible visible{tile, b, i};
    const bool all = visible.all();
    vectors(0, n, [&](int64_t j, int64_t count) {
        // Lanes past the last key hold no score, and their exponential may be infinite.
        const Ints seen = all && count == W ? Ints{} - 1 : visible.lanes(j, count);
        Floats total = {};
        for (int64_t h = 0; h < H; ++h) {
            const int64_t here = h * plane + j;
            const Floats dot = load_some(dots + here, count);
            Floats alpha = exp(dot * tile.scaling - number(tile.lse, b, h, row));
            alpha = seen ? alpha : Floats{};
            const Floats relevance = load_some(relevances + here, count) * alpha * 0.5f;
            const Floats weighted = gradients ? load_some(gradients + here, count) * relevance : relevance;
            total += positive_part(weighted);
        }
        store_some(map + j, total / float(H), count);
    });
}

void relevance_tile(const RelevanceTile& tile, int threads) {
    const int64_t rows = tile.dots.shape[0] * tile.dots.shape[2], each = tile.dots.shape[2];
    threads = rows * tile.dots.shape[1] * tile.dots.shape[3] < STRETCH ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) tile_row(tile, row / each, row % each);
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
