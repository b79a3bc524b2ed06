// Defines the kernel of rollout_step and pair_norms; pair_tile.h describes it.
#pragma once

#include "pair_form.h"

namespace pyglobenc {
namespace {

// The queries of a tile and their weights, as the group reads them.
template <int QUERIES>
struct Listed {
    // Offsets of the rows of q, in pieces of 16 bytes. A query that is padding repeats the row of another
    // one.
    uint32_t rows[QUERIES];
    alignas(8) int positions[QUERIES];
    alignas(8) float weights[MAX_ROWS][QUERIES];
    bool any;  // whether any of the queries is real
};

// Returns the query that this thread lists, out of the queries `row` to `rows` - 1.
template <int QUERIES>
DEVICE Weighted fetch_query(const Place& place, int row, int rows) {
    row += place.thread;
    return place.thread < QUERIES && row < rows ? place.queries[row] : Weighted{-1, 0};
}

// Lists the queries of the next tile. The weights of further rollout rows are read only here, after the
// previous tile has been computed.
template <bool ROLLOUT, int QUERIES>
DEVICE void list(const PairArgs& p, const Place& place, int row, const Weighted& query,
                 Listed<QUERIES>& out) {
    if (place.warp != 0) return;
    const bool some = any(query.position >= 0);
    if (place.thread == 0) out.any = some;
    if (place.thread >= QUERIES) return;
    out.rows[place.thread] = query.position < 0 ? 0 : query.position * p.q_row;
    out.positions[place.thread] = query.position;
    out.weights[0][place.thread] = query.weight;
    if constexpr (ROLLOUT) {
        if (p.n_rows == 1) return;
        ROLL for (int line = 1; line < MAX_ROWS; ++line) {
            const bool counts = query.position >= 0 && place.first_row + line < p.n_rows;
            out.weights[line][place.thread] =
                counts ? place.queries[int64_t(line) * p.n_queries + row + place.thread].weight : 0.0f;
        }
    }
}

template <int QUERIES>
DEVICE Rows<QUERIES> rows_of(const PairArgs& p, const Place& place, const Listed<QUERIES>& listed) {
    Rows<QUERIES> out;
    UNROLL
    for (int n = 0; n < QUERIES / 8; ++n) out.q[n] = listed.rows[8 * n + lane() / 4];
    const int position = listed.positions[lane() % QUERIES];
    out.lse = settled(place.lse + (position < 0 ? 0 : position) * p.lse.stride[2] * 4);
    return out;
}

DEVICE void add_warps(const PairArgs& p, const Place& place, const float (&sums)[MAX_ROWS], float* scratch) {
    UNROLL
    for (int line = 0; line < MAX_ROWS; ++line)
        scratch[(place.warp * MAX_ROWS + line) * KEYS + lane()] = sums[line];
    barrier(1 + place.group, 32 * p.tile.warps);
    for (int line = place.warp; line < MAX_ROWS && place.first_row + line < p.n_rows; line += p.tile.warps) {
        float sum = 0;
        for (int w = 0; w < p.tile.warps; ++w) sum += scratch[(w * MAX_ROWS + line) * KEYS + lane()];
        float* out =
            p.parts + ((place.share * p.q.shape[0] + place.b) * p.n_rows + place.first_row + line) * p.n;
        if (place.key < p.n) out[place.key] = sum;
    }
}

DEVICE Place find_place(const PairArgs& p) {
    Place out;
    const int grid = (p.key_blocks + p.tile.groups - 1) / p.tile.groups;
    int rest = block();
    out.group = warp() / p.tile.warps;
    out.warp = warp() % p.tile.warps;
    out.thread = thread() % (32 * p.tile.warps);
    // Neighbouring blocks of the grid read the same queries.
    out.block = rest % grid * p.tile.groups + out.group;
    rest /= grid;
    out.share = rest % p.shares;
    rest /= p.shares;
    out.first_row = rest % p.row_blocks * MAX_ROWS;
    out.b = rest / p.row_blocks;
    out.key = out.block * KEYS + lane();
    out.memory = shared() + out.group * p.tile.bytes;
    out.q = settled(static_cast<const char*>(p.q.data) + out.b * p.q_step[0] + lane() % 4 * 16);
    out.k = static_cast<const char*>(p.k.data) + out.b * p.k_step[0] + lane() % 4 * 16;
    out.lse = static_cast<const char*>(p.lse.data) + out.b * p.lse.stride[0] * 4;
    out.queries = p.queries + (int64_t(out.b) * p.lines + out.first_row) * p.n_queries;
    return out;
}

// Loads what the residual adds where a query is the key, [H + 1, KEYS]: the cross terms and residual_sq. The
// tensors may hold anything at padded keys, so 0 is stored there.
DEVICE void hold_own(const PairArgs& p, const Place& place, const QueryRange& seen) {
    if (!p.cross.data) return;
    for (int h = place.warp; h <= p.heads; h += p.tile.warps) {
        float* const to = place.at<float>(p.tile.own) + h * KEYS + lane();
        if (seen.first >= seen.last)
            *to = 0;
        else
            *to = h < p.heads ? element<float>(p.cross, place.b, place.key, h)
                              : element<float>(p.residual_sq, place.b, place.key);
    }
}

template <class T, int HEADS, bool ROLLOUT>
KERNEL(THREADS, 1)
pairs_kernel(PairArgs p) {
    constexpr int QUERIES = HEADS != WIDE && HEADS <= 12 && sizeof(T) == 2 ? 32 : 16,
                  HEAD = QUERIES / 2 * KEYS;
    // The number of groups of 8 queries whose scores are in registers at a time.
    constexpr int AT_ONCE = HEADS > 12 && sizeof(T) == 4 ? 1 : QUERIES / 8;
    const Place place = find_place(p);
    const int heads = p.heads, id = 1 + place.group, count = 32 * p.tile.warps;
    if (place.block >= p.key_blocks) return;
    Listed<QUERIES>* const lists = place.at<Listed<QUERIES>>(p.tile.lists);
    Float2* const alpha = place.at<Float2>(p.tile.alpha);
    float* const lse = place.at<float>(p.tile.lse) + place.warp * 2 * QUERIES;
    const QueryRange seen = queries_of_key(p, place.b, place.key);
    const QueryRange all =
        share_of(ROLLOUT ? seen.of_warp() : QueryRange{0, p.n_queries}, place.share, p.shares, QUERIES);

    if (p.tile.held) hold_keys(p, place);
    hold_own(p, place, seen);
    for (int at = heads * HEAD + place.thread; at < padded_heads(heads) * HEAD; at += count)
        alpha[at] = {0, 0};
    Form<HEADS, QUERIES> form;
    form.load(p.packed + (place.b * int64_t(p.key_blocks) + place.block) * p.form_size * KEYS);
    list<ROLLOUT>(p, place, all.first, fetch_query<QUERIES>(place, all.first, all.last), lists[0]);
    barrier(id, count);

    Rows<QUERIES> rows = rows_of(p, place, lists[0]);
    Fragments<QUERIES> fragments;
    float sums[MAX_ROWS] = {};
    if (place.warp < heads) load_queries(p, place, rows, place.warp, 0, fragments);
    for (int row = all.first, turn = 0; row < all.last; row += QUERIES, turn ^= 1) {
        const Listed<QUERIES>& here = lists[turn];
        const Weighted next = fetch_query<QUERIES>(place, row + QUERIES, all.last);
        if (here.any)
            for (int h = place.warp, at = 0; h < heads; h += p.tile.warps, at ^= 1)
                head_alpha<T, AT_ONCE>(p, place, rows, h, h + p.tile.warps, fragments, lse + at * QUERIES,
                                       alpha + h * HEAD);
        list<ROLLOUT>(p, place, row + QUERIES, next, lists[turn ^ 1]);
        barrier(id, count);
        rows = rows_of(p, place, lists[turn ^ 1]);
        if (place.warp < heads) load_queries(p, place, rows, place.warp, 0, fragments);
        if (here.any) form.prepare(p, place, alpha);
        if (here.any || !ROLLOUT)
            take_queries<ROLLOUT>(p, place, seen, here.positions, here.weights, row, all.last, form, sums);
        barrier(id, count);
    }
    if constexpr (ROLLOUT) add_warps(p, place, sums, place.at<float>(p.tile.alpha));
}

template <bool ROLLOUT, class T>
void run_heads(const PairArgs& p, void* stream) {
    const int64_t blocks =
        int64_t((p.key_blocks + p.tile.groups - 1) / p.tile.groups) * p.shares * p.row_blocks * p.q.shape[0];
    const int padded = form_heads(p.heads);
    const auto kernel = padded == 8    ? pairs_kernel<T, 8, ROLLOUT>
                        : padded == 12 ? pairs_kernel<T, 12, ROLLOUT>
                        : padded == 16 ? pairs_kernel<T, 16, ROLLOUT>
                                       : pairs_kernel<T, WIDE, ROLLOUT>;
    launch(kernel, blocks, 32 * p.tile.groups * p.tile.warps, p.tile.groups * p.tile.bytes, stream, p);
}

// Starts the kernel with prepared arguments. With `exact`, products of float32 keep float32's digits.
template <bool ROLLOUT>
void run_pairs(const PairArgs& p, bool exact, void* stream) {
    if (p.q.type == Type::bf16)
        run_heads<ROLLOUT, bf16>(p, stream);
    else if (p.q.type == Type::f16)
        run_heads<ROLLOUT, f16>(p, stream);
    else if (exact)
        run_heads<ROLLOUT, float>(p, stream);
    else
        run_heads<ROLLOUT, tf32>(p, stream);
}

}  // namespace
}  // namespace pyglobenc
