// relevance_attention and relevance_rollout_step, structured like flash attention's backward pass, with the
// formulas of pyglobenc/ops/relevance_attention.py.
//
// A pass over rows computes R_q, the row sums of A, and with an additive mask the sums that its factor needs.
// A pass over columns computes R_k, R_v and each head's part of the rollout step. Together they take 9 n^2 d
// multiply-adds. They store no (n, n) array and use no atomics, so that results repeat bit for bit.
#include "launch.h"
#include "relevance_pairs.h"

namespace pyglobenc {

// The work of one block. With ROWS, it holds queries and reads the keys tile by tile; otherwise it holds
// keys. SLICE is the number of columns of R_q, or of R_k and R_v, that the block adds up in registers. It is
// 0 if no relevance is wanted.
template <bool ROWS, int SLICE>
struct Pass {
    // There are only two tiles where the sums fill the registers (two sums of 64 columns, or one of 128), or
    // where wide heads fill the shared memory.
    static constexpr int COLUMNS = SLICE, TILES = ROWS && SLICE == 64 ? 4 : 2, STREAM = 8 * TILES,
                         W_STRIDE = STREAM + 8;
    static constexpr int HELD_TENSORS = ROWS ? 3 : 2, STREAM_ROWS = (ROWS ? 2 : 3) * STREAM;

    static int bytes(int head_dim, int warps) {
        const int held = HELD_TENSORS * WARP_ROWS * warps, tokens = WARP_ROWS * warps + 2 * STREAM;
        const int w = ROWS ? 0 : 2 * RelevanceArgs::MAX_STEP_ROWS * W_STRIDE;
        const int floats = (held + STREAM_ROWS) * row_stride(head_dim) + 2 * tokens + w;
        return 4 * floats + 2 * 3 * STREAM_ROWS * row_stride(head_dim);
    }

    using Sums = float[SLICE ? SLICE / 8 : 1][4];

    Head head;
    int start, slice, head_index;
    Parts parts;  // the parts of the other side's rows, one tensor after the other
    float* raw;   // the next rows of the other side, not yet split into parts
    Side held;

    DEVICE explicit Pass(const RelevanceArgs& args) : head{args, 0, 0, 0, int(args.k.shape[2])} {
        const int heads = int(args.k.shape[1]), of_head = (args.longest + own() - 1) / own();
        head.h = block() / of_head % heads;
        const int example = block() / of_head / heads % args.examples;
        // A slice of 64 covers a whole head.
        slice = SLICE > 64 ? block() / of_head / heads / args.examples * SLICE : 0;
        if (args.cu_seqlens.data) {
            const int* const ends = static_cast<const int*>(args.cu_seqlens.data) + example;
            head.first = ends[0];
            head.last = ends[1];
        } else {
            head.b = example;
        }
        start = head.first + block() % of_head * own();
        head_index = head.b * heads + head.h;
        const int stride = row_stride(head.head_dim());
        parts = {reinterpret_cast<bf16*>(shared()), STREAM_ROWS * stride, stride};
        raw = reinterpret_cast<float*>(parts.rows + 3 * parts.part);
        float* const rows = raw + STREAM_ROWS * stride;
        held = {rows, own() * stride, reinterpret_cast<RowToken*>(rows + HELD_TENSORS * own() * stride)};
    }

    // Returns whether the block lies past the end of its sequence.
    DEVICE bool idle() const { return start >= head.last; }
    DEVICE int n() const { return int(head.args.k.shape[2]); }
    DEVICE int own() const { return WARP_ROWS * (threads() / 32); }
    DEVICE RowToken* tokens(int stage) const { return held.tokens + own() + stage * STREAM; }
    // Returns the rollout rows of a stage, [MAX_STEP_ROWS, STREAM], with rows W_STRIDE apart.
    DEVICE float* w(int stage) const {
        return reinterpret_cast<float*>(tokens(2)) + stage * RelevanceArgs::MAX_STEP_ROWS * W_STRIDE;
    }

    DEVICE void fetch(int stage, int first) const {
        fill<!ROWS>({raw, STREAM * parts.stride, tokens(stage)}, head, STREAM,
                    [&](int at) { return first + at; });
        if constexpr (!ROWS) fetch_w(stage, first);
        commit_copies();
    }

    DEVICE void fetch_w(int stage, int first) const {
        const View& from = head.args.w;
        if (!from.data) return;
        for (int at = thread(); at < RelevanceArgs::MAX_STEP_ROWS * STREAM; at += threads()) {
            const int t = at / STREAM, i = first + at % STREAM;
            const bool ok = t < from.shape[1] && i < head.last;
            const int64_t offset = ok ? head.b * from.stride[0] + t * from.stride[1] + i * from.stride[2] : 0;
            copy_async<4>(w(stage) + t * W_STRIDE + at % STREAM,
                          static_cast<const float*>(from.data) + offset, ok);
        }
    }

    // Calls body(pairs, w) for each tile of the other side that has a pair with this warp's rows.
    template <class Body>
    DEVICE void walk(const Body& body) {
        const RelevanceArgs& args = head.args;
        const int before = start - (ROWS ? args.left : args.right),
                  after = start + own() + (ROWS ? args.right : args.left);
        // Tiles are counted from the start of the sequence. So a packed sequence gives the same result as
        // alone.
        const int first = head.first + (before > head.first ? (before - head.first) / STREAM * STREAM : 0);
        const Side mine = {held.rows + warp() * WARP_ROWS * parts.stride, held.step,
                           held.tokens + warp() * WARP_ROWS};
        fill<ROWS>(held, head, own(), [&](int at) { return start + at; });
        // Rows past the window are not loaded.
        if (after < head.last) head.last = after;
        fetch(0, first);
        for (int at = first, stage = 0; at < head.last; at += STREAM, stage ^= 1) {
            wait_copies<0>();
            barrier();
            split(parts, raw, STREAM_ROWS, head.head_dim());
            barrier();
            if (at + STREAM < head.last) fetch(stage ^ 1, at + STREAM);
            if (!any_pair<TILES>(mine.tokens, tokens(stage))) continue;
            Pairs<TILES> pairs;
            multiply<ROWS, TILES>(pairs, mine, parts, head.head_dim());
            weigh<ROWS, TILES>(pairs, mine.tokens, tokens(stage), args);
            body(pairs, w(stage));
        }
    }

    // Returns whether this slice has columns 16 d to 16 d + 15.
    DEVICE bool has(int d) const { return slice + 16 * d < head.head_dim(); }

    // Adds the left factor times 16 rows of the other side's tensor to the sums, for the columns 16 d to
    // 16 d + 15 of this slice.
    DEVICE void add(Sums& sums, int d, const Left& left, int tensor, int tile) const {
        Right right[2];
        right_below(right, parts.at(tensor * STREAM + 8 * tile, slice + 16 * d));
        product(sums[2 * d], left, right[0]);
        product(sums[2 * d + 1], left, right[1]);
    }

    // Writes this warp's sums times its own rows of a held tensor, divided by 2.
    DEVICE void store(float* out, const Sums& sums, int tensor) const {
        const int head_dim = head.head_dim();
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = warp() * WARP_ROWS + lane() / 4 + half * 8, at = held.tokens[row].position;
            if (at < 0) continue;
            const float* const own = held.rows + tensor * held.step + row * row_stride(head_dim);
            float* const to = out + (int64_t(head_index) * n() + at) * head_dim;
            UNROLL
            for (int d = 0; d < SLICE / 8; ++d)
                for (int e = 0; e < 2; ++e) {
                    const int column = slice + 8 * d + lane() % 4 * 2 + e;
                    if (column < head_dim) to[column] = sums[d][2 * half + e] * own[column] * 0.5f;
                }
        }
    }
};

// Returns R' without the factor of the additive mask.
DEVICE float passed_on(const RelevanceArgs& args, float relevance, float dot) {
    if (!args.additive) return relevance;
    const float score = dot * args.scaling;
    return safe_divide(relevance, score) * score;
}

// Returns the sum over the four lanes that share a row of a tile.
template <class T>
DEVICE T sum_of_row(T x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

template <int SLICE>
KERNEL(32 * MAX_WARPS, BLOCKS_AT_ONCE)
relevance_rows_kernel(CONSTANT RelevanceArgs args) {
    using Rows = Pass<true, SLICE>;
    Rows pass(args);
    if (pass.idle()) return;
    // These are the row sums of A, R_alpha and R'. In float32 they would lose digits from about 8,192 keys
    // on.
    constexpr int SUMS = SLICE ? 3 : 1;
    double sums[SUMS][2] = {};
    typename Rows::Sums r_q = {};
    pass.walk([&](const Pairs<Rows::TILES>& pairs, const float*) {
        float of_tile[3][2] = {};
        UNROLL
        for (int tile = 0; tile < Rows::TILES; tile += 2) {
            float u[2][4];
            UNROLL
            for (int both = 0; both < 8; ++both) {
                const int at = tile + both / 4, e = both % 4;
                const float relevance = pairs.relevance[at][e], dot = pairs.dots[at][e],
                            passed = passed_on(args, relevance, dot);
                u[both / 4][e] = safe_divide(passed, dot, args.stabilizer);
                of_tile[0][e / 2] += pairs.weighted[at][e];
                of_tile[1][e / 2] += relevance;
                of_tile[2][e / 2] += passed;
            }
            const Left left = left_of(u);
            UNROLL
            for (int d = 0; d < SLICE / 16; ++d) {
                if (!pass.has(d)) break;
                pass.add(r_q, d, left, 0, tile);
            }
        }
        UNROLL
        for (int k = 0; k < SUMS; ++k)
            for (int half = 0; half < 2; ++half) sums[k][half] += double(of_tile[k][half]);
    });
    if constexpr (SLICE > 0) pass.store(args.r_q, r_q, 0);
    const int64_t all = args.q.shape[0] * args.q.shape[1] * pass.n();
    UNROLL
    for (int half = 0; half < 2; ++half) {
        const int i = pass.held.tokens[warp() * WARP_ROWS + lane() / 4 + half * 8].position;
        UNROLL
        for (int k = 0; k < SUMS; ++k) sums[k][half] = sum_of_row(sums[k][half]);
        if (i < 0 || pass.slice || lane() % 4) continue;
        UNROLL
        for (int k = 0; k < SUMS; ++k)
            if (k == 0 || args.additive)
                args.sums[k * all + int64_t(pass.head_index) * pass.n() + i] = sums[k][half];
    }
}

template <int SLICE>
KERNEL(32 * MAX_WARPS, BLOCKS_AT_ONCE)
relevance_columns_kernel(CONSTANT RelevanceArgs args) {
    using Columns = Pass<false, SLICE>;
    Columns pass(args);
    if (pass.idle()) return;
    const bool step = args.w.data && !pass.slice;
    float sums[4] = {0, 0, 0, 0};
    typename Columns::Sums r_k = {}, r_v = {};
    pass.walk([&](const Pairs<Columns::TILES>& pairs, const float* w) {
        UNROLL
        for (int tile = 0; tile < Columns::TILES && step; tile += 2)
            product(sums, left_of(pairs.weighted + tile), right_of(w + 8 * tile, Columns::W_STRIDE));
        UNROLL
        for (int tile = 0; tile < Columns::TILES; tile += 2) {
            float u[2][4];
            UNROLL
            for (int both = 0; both < 8; ++both) {
                const float dot = pairs.dots[tile + both / 4][both % 4],
                            relevance = pairs.relevance[tile + both / 4][both % 4];
                u[both / 4][both % 4] = safe_divide(passed_on(args, relevance, dot), dot, args.stabilizer);
            }
            const Left left = left_of(u), other = left_of(pairs.alpha + tile);
            UNROLL
            for (int d = 0; d < SLICE / 16; ++d) {
                if (!pass.has(d)) break;
                pass.add(r_k, d, left, 0, tile);
                pass.add(r_v, d, other, 1, tile);
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
        const int j = pass.held.tokens[warp() * WARP_ROWS + lane() / 4 + e / 2 * 8].position,
                  t = lane() % 4 * 2 + e % 2;
        if (step && j >= 0 && t < steps) args.step[(pass.head_index * steps + t) * pass.n() + j] = sums[e];
    }
}

template <class AnyPass>
static void start(void (*kernel)(const RelevanceArgs), const RelevanceArgs& args, void* stream) {
    const int head_dim = int(args.k.shape[3]), warps = warps_that_fit(AnyPass::bytes, head_dim),
              own = WARP_ROWS * warps;
    const int64_t slices = AnyPass::COLUMNS ? (head_dim + AnyPass::COLUMNS - 1) / AnyPass::COLUMNS : 1;
    const int64_t blocks = (args.longest + own - 1) / own * args.k.shape[1] * args.examples * slices;
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

int relevance_shared(int head_dim) {
    return head_dim <= 64 ? Pass<true, 64>::bytes(head_dim, 1) : Pass<false, 128>::bytes(head_dim, 1);
}

}  // namespace pyglobenc
