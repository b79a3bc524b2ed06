// relevance_maps: computes and stores A = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0) (Chefer et al., 2021,
// eq. 13).
//
// A block computes one tile of the map and loops over the heads. The map takes 3 n^2 d multiply-adds, and one
// float is written for each pair.
#include "launch.h"
#include "relevance_pairs.h"

namespace pyglobenc {

template <int TILES>
static int map_bytes(int head_dim, int warps) {
    const int queries = WARP_ROWS * warps, keys = 8 * TILES;
    const int floats = (3 * queries + 2 * keys) * row_stride(head_dim) + 2 * (queries + keys);
    return 4 * floats + 2 * 3 * 2 * keys * row_stride(head_dim);
}

template <int TILES>
KERNEL(32 * MAX_WARPS, BLOCKS_AT_ONCE)
relevance_maps_kernel(CONSTANT RelevanceArgs args) {
    constexpr int KEYS = 8 * TILES;
    const int n = int(args.k.shape[2]);
    Head head = {args, 0, 0, 0, n};
    const View& rows = args.rows;
    const int m = rows.data ? int(rows.shape[1]) : n, own = WARP_ROWS * (threads() / 32);
    const int row_blocks = (m + own - 1) / own, key_blocks = (n + KEYS - 1) / KEYS,
              stride = row_stride(head.head_dim());
    const int first = block() % row_blocks * own, first_key = block() / row_blocks % key_blocks * KEYS;
    head.b = block() / row_blocks / key_blocks;
    const Parts parts = {reinterpret_cast<bf16*>(shared()), 2 * KEYS * stride, stride};
    float* const memory = reinterpret_cast<float*>(parts.rows + 3 * parts.part);
    RowToken* const tokens = reinterpret_cast<RowToken*>(memory + (3 * own + 2 * KEYS) * stride);
    const Side queries = {memory, own * stride, tokens};
    const Side keys = {memory + 3 * own * stride, KEYS * stride, tokens + own};
    const Side mine = {queries.rows + warp() * WARP_ROWS * stride, queries.step, tokens + warp() * WARP_ROWS};
    const auto query = [&](int at) {
        if (first + at >= m) return n;
        if (!rows.data) return first + at;
        return int(
            static_cast<const int64_t*>(rows.data)[head.b * rows.stride[0] + (first + at) * rows.stride[1]]);
    };
    float map[TILES][4] = {};
    const int heads = int(args.k.shape[1]);
    for (head.h = 0; head.h < heads; ++head.h) {
        fill<true>(queries, head, own, query);
        fill<false>(keys, head, KEYS, [&](int at) { return first_key + at; });
        commit_copies();
        wait_copies<0>();
        barrier();
        split(parts, keys.rows, 2 * KEYS, head.head_dim());
        barrier();
        if (any_pair<TILES>(mine.tokens, keys.tokens)) {
            Pairs<TILES> pairs;
            multiply<true, TILES>(pairs, mine, parts, head.head_dim());
            weigh<true, TILES>(pairs, mine.tokens, keys.tokens, args);
            UNROLL
            for (int tile = 0; tile < TILES; ++tile)
                for (int e = 0; e < 4; ++e) map[tile][e] += pairs.weighted[tile][e];
        }
        barrier();
    }
    UNROLL
    for (int tile = 0; tile < TILES; ++tile)
        for (int e = 0; e < 4; ++e) {
            const int row = first + warp() * WARP_ROWS + lane() / 4 + e / 2 * 8,
                      j = first_key + 8 * tile + lane() % 4 * 2 + e % 2;
            if (row < m && j < n) args.map[(int64_t(head.b) * m + row) * n + j] = map[tile][e] / float(heads);
        }
}

template <int TILES>
static void start(const RelevanceArgs& args, void* stream) {
    const int64_t n = args.k.shape[2], m = args.rows.data ? args.rows.shape[1] : n, keys = 8 * TILES;
    const int head_dim = int(args.k.shape[3]), warps = warps_that_fit(map_bytes<TILES>, head_dim),
              own = WARP_ROWS * warps;
    const int64_t blocks = (m + own - 1) / own * ((n + keys - 1) / keys) * args.k.shape[0];
    launch(relevance_maps_kernel<TILES>, blocks, 32 * warps, map_bytes<TILES>(head_dim, warps), stream, args);
}

void relevance_maps(const RelevanceArgs& args, void* stream) {
    args.k.shape[3] <= 64 ? start<4>(args, stream) : start<2>(args, stream);
}

}  // namespace pyglobenc
