// relevance_attention and relevance_rollout_step, like flash attention's backward pass, to the formulas of
// pyglobenc/ops/relevance_attention.py.
//
// A pass over rows gives R_q, the sums of A's rows and, with an additive mask, what its factor needs; a pass over columns gives R_k, R_v
// and each head's part of the rollout step. 9 n^2 d multiply-adds; nothing of n x n is stored, no atomics: runs repeat bit for bit.
#include "launch.h"
#include "relevance_pairs.h"

namespace pyglobenc {

// One block's way through the pairs of its rows; ROWS: it holds queries and streams keys, else the reverse. SLICE: the columns of R_q, or
// of R_k and R_v, that a block sums up in registers; 0 when no relevance is asked for.
template <bool ROWS, int SLICE>
struct Pass {
    // two tiles where sums take the registers, or wide heads the shared memory
    static constexpr int COLUMNS = SLICE, TILES = SLICE == 64 ? 4 : 2, STREAM = 8 * TILES, W_STRIDE = STREAM + 4;
    static constexpr int HELD_TENSORS = ROWS ? 3 : 2, STREAM_TENSORS = ROWS ? 2 : 3;

    static int bytes(int head_dim, int warps) {
        const int rows = HELD_TENSORS * WARP_ROWS * warps + 2 * STREAM_TENSORS * STREAM, places = WARP_ROWS * warps + 2 * STREAM;
        return 4 * (rows * row_stride(head_dim) + 2 * places + 2 * RelevanceArgs::MOST_ROWS * W_STRIDE);
    }

    Head head;
    int start, slice, head_index;
    Side held;

    DEVICE explicit Pass(const RelevanceArgs& args) : head{args, 0, 0} {
        const int heads = int(args.k.shape[0] * args.k.shape[1]), of_head = (head.n() + own() - 1) / own();
        start = block() % of_head * own();
        head_index = block() / of_head % heads;
        slice = block() / of_head / heads * SLICE;
        head.b = head_index / args.k.shape[1];
        head.h = head_index % args.k.shape[1];
        float* const rows = reinterpret_cast<float*>(shared());
        const int step = own() * row_stride(head.head_dim());
        held = {rows, step, reinterpret_cast<Place*>(rows + HELD_TENSORS * step + 2 * STREAM_TENSORS * stream_step())};
    }

    DEVICE int own() const { return WARP_ROWS * (threads() / 32); }
    DEVICE int stream_step() const { return STREAM * row_stride(head.head_dim()); }
    DEVICE Side streamed(int stage) const {
        float* const rows = held.rows + HELD_TENSORS * held.step + stage * STREAM_TENSORS * stream_step();
        return {rows, stream_step(), held.places + own() + stage * STREAM};
    }
    // [MOST_ROWS, STREAM], rows W_STRIDE apart
    DEVICE float* w(int stage) const {
        return reinterpret_cast<float*>(held.places + own() + 2 * STREAM) + stage * RelevanceArgs::MOST_ROWS * W_STRIDE;
    }

    DEVICE void fetch(int stage, int first) const {
        fill<!ROWS>(streamed(stage), head, STREAM, [&](int at) { return first + at; });
        if constexpr (!ROWS) fetch_w(stage, first);
    }

    DEVICE void fetch_w(int stage, int first) const {
        const View& from = head.args.w;
        if (!from.data) return;
        for (int at = thread(); at < RelevanceArgs::MOST_ROWS * STREAM; at += threads()) {
            const int t = at / STREAM, i = first + at % STREAM;
            const bool ok = t < from.shape[1] && i < head.n();
            const int64_t offset = ok ? head.b * from.stride[0] + t * from.stride[1] + i * from.stride[2] : 0;
            copy_async<4>(w(stage) + t * W_STRIDE + at % STREAM, static_cast<const float*>(from.data) + offset, ok);
        }
    }

    // body(pairs, streamed rows, w) for each tile of the other side that has a pair with this warp's rows.
    template <class Body>
    DEVICE void walk(const Body& body) const {
        const RelevanceArgs& args = head.args;
        const int before = start - (ROWS ? args.left : args.right), after = start + own() + (ROWS ? args.right : args.left);
        const int first = before > 0 ? before / STREAM * STREAM : 0, last = after < head.n() ? after : head.n();
        const Side mine = {held.rows + warp() * WARP_ROWS * row_stride(head.head_dim()), held.step, held.places + warp() * WARP_ROWS};
        fill<ROWS>(held, head, own(), [&](int at) { return start + at; });
        fetch(0, first);
        commit_copies();
        for (int at = first, stage = 0; at < last; at += STREAM, stage ^= 1) {
            if (at + STREAM < last) fetch(stage ^ 1, at + STREAM);
            commit_copies();
            wait_copies<1>();
            barrier();
            const Side others = streamed(stage);
            if (any_pair<TILES>(mine.places, others.places)) {
                Pairs<TILES> pairs;
                multiply<ROWS, TILES>(pairs, mine, others, head.head_dim(), args.grad.data);
                weigh<ROWS, TILES>(pairs, mine.places, others.places, args);
                body(pairs, others, w(stage));
            }
            barrier();
        }
        wait_copies<0>();
    }

    // sums += the left factor times 16 rows from shared memory, this block's columns.
    DEVICE void add(float (&sums)[SLICE / 8][4], const Left& left, const float* rows) const {
        const int stride = row_stride(head.head_dim());
        UNROLL
        for (int d = 0; d < SLICE / 8; ++d)
            if (slice + 8 * d < head.head_dim()) product(sums[d], left, right_below(rows + slice + 8 * d, stride, 1));
    }

    // Writes this warp's sums times its own rows of a held tensor, halved.
    DEVICE void store(float* out, const float (&sums)[SLICE / 8][4], int tensor) const {
        const int head_dim = head.head_dim();
        UNROLL
        for (int d = 0; d < SLICE / 8; ++d)
            for (int e = 0; e < 4; ++e) {
                const int row = warp() * WARP_ROWS + lane() / 4 + e / 2 * 8, column = slice + 8 * d + lane() % 4 * 2 + e % 2;
                if (start + row >= head.n() || column >= head_dim) continue;
                const float own = held.rows[tensor * held.step + row * row_stride(head_dim) + column];
                out[(int64_t(head_index) * head.n() + start + row) * head_dim + column] = sums[d][e] * own * 0.5f;
            }
    }
};

// R' without the additive mask's factor.
DEVICE float passed_on(const RelevanceArgs& args, float relevance, float dot) {
    if (!args.additive) return relevance;
    const float score = dot * args.scaling;
    return safe_divide(relevance, score) * score;
}

// The sum over the four lanes that share a row of a tile.
template <class T>
DEVICE T sum_of_row(T x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

template <int SLICE>
KERNEL(32 * MOST_WARPS) relevance_rows_kernel(CONSTANT RelevanceArgs args) {
    using Rows = Pass<true, SLICE>;
    const Rows pass(args);
    const int n = pass.head.n();
    float sums[2] = {0, 0}, r_q[SLICE ? SLICE / 8 : 1][4] = {};
    double before[2] = {0, 0}, after[2] = {0, 0};
    pass.walk([&](Pairs<Rows::TILES>& pairs, const Side& keys, const float*) {
        float of_tile[3][2] = {};
        UNROLL
        for (int tile = 0; tile < Rows::TILES; tile += 2) {
            float u[2][4];
            UNROLL
            for (int both = 0; both < 8; ++both) {
                const int at = tile + both / 4, e = both % 4;
                const float relevance = pairs.relevance[at][e], dot = pairs.dots[at][e], passed = passed_on(args, relevance, dot);
                u[both / 4][e] = safe_divide(passed, dot, args.stabilizer);
                of_tile[0][e / 2] += pairs.weighted[at][e];
                of_tile[1][e / 2] += relevance;
                of_tile[2][e / 2] += passed;
            }
            if constexpr (SLICE > 0) pass.add(r_q, left_of(u), keys.rows + 8 * tile * row_stride(pass.head.head_dim()));
        }
        UNROLL
        for (int half = 0; half < 2; ++half) {
            sums[half] += of_tile[0][half];
            if (SLICE == 0) continue;
            before[half] += double(of_tile[1][half]);
            after[half] += double(of_tile[2][half]);
        }
    });
    if constexpr (SLICE > 0) pass.store(args.r_q, r_q, 0);
    const int64_t all = args.q.shape[0] * args.q.shape[1] * n;
    UNROLL
    for (int half = 0; half < 2; ++half) {
        const int i = pass.start + warp() * WARP_ROWS + lane() / 4 + half * 8;
        const float sum = sum_of_row(sums[half]);
        const double whole = sum_of_row(before[half]), kept = sum_of_row(after[half]);
        if (i >= n || pass.slice || lane() % 4) continue;
        args.sums[int64_t(pass.head_index) * n + i] = sum;
        if (!args.totals) continue;
        args.totals[int64_t(pass.head_index) * n + i] = whole;
        args.totals[all + int64_t(pass.head_index) * n + i] = kept;
    }
}

template <int SLICE>
KERNEL(32 * MOST_WARPS) relevance_columns_kernel(CONSTANT RelevanceArgs args) {
    using Columns = Pass<false, SLICE>;
    const Columns pass(args);
    const int n = pass.head.n();
    const bool step = args.w.data && !pass.slice;
    float sums[4] = {0, 0, 0, 0}, r_k[SLICE ? SLICE / 8 : 1][4] = {}, r_v[SLICE ? SLICE / 8 : 1][4] = {};
    pass.walk([&](Pairs<Columns::TILES>& pairs, const Side& queries, const float* w) {
        UNROLL
        for (int tile = 0; tile < Columns::TILES; tile += 2) {
            float u[2][4], alpha[2][4], weighted[2][4];
            UNROLL
            for (int both = 0; both < 8; ++both) {
                const int at = tile + both / 4, e = both % 4;
                const float dot = pairs.dots[at][e];
                u[both / 4][e] = safe_divide(passed_on(args, pairs.relevance[at][e], dot), dot, args.stabilizer);
                alpha[both / 4][e] = pairs.alpha[at][e];
                weighted[both / 4][e] = pairs.weighted[at][e];
            }
            if (step) product(sums, left_of(weighted), right_below(w + 8 * tile, 1, Columns::W_STRIDE));
            if constexpr (SLICE > 0) {
                const float* const rows = queries.rows + 8 * tile * row_stride(pass.head.head_dim());
                pass.add(r_k, left_of(u), rows);
                pass.add(r_v, left_of(alpha), rows + queries.step);
            }
        }
    });
    if constexpr (SLICE > 0) {
        pass.store(args.r_k, r_k, 0);
        pass.store(args.r_v, r_v, 1);
    }
    const int64_t steps = args.w.shape[1];
    UNROLL
    for (int e = 0; e < 4; ++e) {
        const int j = pass.start + warp() * WARP_ROWS + lane() / 4 + e / 2 * 8, t = lane() % 4 * 2 + e % 2;
        if (step && j < n && t < steps) args.step[(pass.head_index * steps + t) * n + j] = sums[e];
    }
}

template <class AnyPass>
static void start(void (*kernel)(const RelevanceArgs), const RelevanceArgs& args, void* stream) {
    const int head_dim = int(args.k.shape[3]), warps = warps_that_fit(AnyPass::bytes, head_dim), own = WARP_ROWS * warps;
    const int64_t slices = AnyPass::COLUMNS ? (head_dim + AnyPass::COLUMNS - 1) / AnyPass::COLUMNS : 1;
    const int64_t blocks = (args.k.shape[2] + own - 1) / own * args.k.shape[0] * args.k.shape[1] * slices;
    launch(kernel, blocks, 32 * warps, AnyPass::bytes(head_dim, warps), stream, args);
}

void relevance_rows(const RelevanceArgs& args, void* stream) {
    if (!args.r_q) return start<Pass<true, 0>>(relevance_rows_kernel<0>, args, stream);
    if (args.k.shape[3] <= 64) return start<Pass<true, 64>>(relevance_rows_kernel<64>, args, stream);
    start<Pass<true, 128>>(relevance_rows_kernel<128>, args, stream);
}

void relevance_columns(const RelevanceArgs& args, void* stream) {
    if (!args.r_k) return start<Pass<false, 0>>(relevance_columns_kernel<0>, args, stream);
    if (args.k.shape[3] <= 64) return start<Pass<false, 64>>(relevance_columns_kernel<64>, args, stream);
    start<Pass<false, 128>>(relevance_columns_kernel<128>, args, stream);
}

int relevance_shared(int head_dim) { return Pass<false, 128>::bytes(head_dim, 1); }

}  // namespace pyglobenc
