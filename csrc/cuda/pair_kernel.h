// The kernel of rollout_step and token_norms: see pair_tile.h.
#pragma once

#include "pair_form.h"

namespace pyglobenc {
namespace {

// The query of a row of the list of queries, or -1 for padding and past the end.
DEVICE int position(const PairArgs& p, int b, int row, int rows) {
    if (row >= rows) return -1;
    const int i = p.rows.data ? int(element<int64_t>(p.rows, b, row)) : row;
    return p.key_mask.data && !element<uint8_t>(p.key_mask, b, i) ? -1 : i;
}

// What the norms of query i are multiplied with in row t of the rollout.
template <bool ROLLOUT>
DEVICE float weight(const PairArgs& p, int b, int t, int i) {
    if (i < 0 || (ROLLOUT && t >= p.n_rows)) return 0;
    const float r = ROLLOUT ? element<float>(p.r, b, t, i) : 1.0f;
    return p.rstd.data ? r * element<float>(p.rstd, b, i) : r;
}

// A tile's queries and their weights as the group takes them up.
template <int QUERIES>
struct Listed {
    Row rows[QUERIES];
    int positions[QUERIES];
    float weights[MAX_ROWS][QUERIES];
};

// The rows of r beyond the first are read only here, after the tile before has been computed.
template <bool ROLLOUT, int QUERIES>
DEVICE void list(const PairArgs& p, const Place& place, int position, float first, Listed<QUERIES>& out) {
    if (place.thread >= QUERIES) return;
    const int64_t row = position < 0 ? 0 : position;
    out.rows[place.thread] = {row * p.q_step[2], row * p.lse.stride[2]};
    out.positions[place.thread] = position;
    out.weights[0][place.thread] = first;
    if constexpr (ROLLOUT) {
        if (p.n_rows == 1) return;
        ROLL
        for (int line = 1; line < MAX_ROWS; ++line)
            out.weights[line][place.thread] = weight<true>(p, place.b, place.first_row + line, position);
    }
}

DEVICE void add_warps(const PairArgs& p, const Place& place, const float (&sums)[MAX_ROWS], float* scratch) {
    UNROLL
    for (int line = 0; line < MAX_ROWS; ++line) scratch[(place.warp * MAX_ROWS + line) * KEYS + lane()] = sums[line];
    barrier(1 + place.group, 32 * p.tile.warps);
    for (int line = place.warp; line < MAX_ROWS && place.first_row + line < p.n_rows; line += p.tile.warps) {
        float sum = 0;
        for (int w = 0; w < p.tile.warps; ++w) sum += scratch[(w * MAX_ROWS + line) * KEYS + lane()];
        float* out = static_cast<float*>(p.out.data) + ((place.share * p.q.shape[0] + place.b) * p.n_rows + place.first_row + line) * p.n;
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
    // neighbours in the grid read the same queries
    out.block = rest % grid * p.tile.groups + out.group;
    rest /= grid;
    out.share = rest % p.shares;
    rest /= p.shares;
    out.first_row = rest % p.row_blocks * MAX_ROWS;
    out.b = rest / p.row_blocks;
    out.key = out.block * KEYS + lane();
    out.memory = shared() + out.group * p.tile.bytes;
    out.q = static_cast<const char*>(p.q.data) + out.b * p.q_step[0] + lane() % 4 * 16;
    out.k = static_cast<const char*>(p.k.data) + out.b * p.k_step[0] + lane() % 4 * 16;
    out.lse = static_cast<const float*>(p.lse.data) + out.b * p.lse.stride[0];
    return out;
}

// The cross terms of the group's keys, [H, KEYS]; padding may hold anything.
DEVICE void hold_cross(const PairArgs& p, const Place& place, const Seen& seen) {
    if (!p.cross.data) return;
    for (int h = place.warp; h < p.heads; h += p.tile.warps)
        place.at<float>(p.tile.cross)[h * KEYS + lane()] = seen.first < seen.last ? element<float>(p.cross, place.b, place.key, h) : 0.0f;
}

template <class T, int HEADS, bool ROLLOUT>
KERNEL(THREADS, 1) pairs_kernel(PairArgs p) {
    constexpr int QUERIES = HEADS != WIDE && HEADS <= 12 && sizeof(T) == 2 ? 32 : 16, HEAD = QUERIES / 2 * KEYS;
    constexpr int AT_ONCE = HEADS > 12 && sizeof(T) == 4 ? 1 : QUERIES / 8;  // times 8 queries whose scores are in registers
    const Place place = find_place(p);
    const int heads = p.heads, id = 1 + place.group, count = 32 * p.tile.warps;
    if (place.block >= p.key_blocks) return;
    Listed<QUERIES>* const lists = place.at<Listed<QUERIES>>(p.tile.lists);
    Twin* const alpha = place.at<Twin>(p.tile.alpha);
    const Seen seen = seen_from(p, place.b, place.key);
    const Seen all = share_of(ROLLOUT ? seen.of_warp() : Seen{0, p.n_queries}, place.share, p.shares, QUERIES);

    if (p.tile.held) hold_keys(p, place);
    hold_cross(p, place, seen);
    for (int at = heads * HEAD + place.thread; at < padded_heads(heads) * HEAD; at += count) alpha[at] = {0, 0};
    Form<HEADS, QUERIES> form;
    form.load(static_cast<const float*>(p.packed.data) + (place.b * int64_t(p.key_blocks) + place.block) * p.form_size * KEYS);
    int next = place.thread < QUERIES ? position(p, place.b, all.first + place.thread, all.last) : -1;
    list<ROLLOUT>(p, place, next, weight<ROLLOUT>(p, place.b, place.first_row, next), lists[0]);
    barrier(id, count);

    Fragments<QUERIES> fragments;
    float sums[MAX_ROWS] = {};
    if (place.warp < heads) load_queries(p, place, lists[0].rows, place.warp, 0, fragments);
    for (int row = all.first, turn = 0; row < all.last; row += QUERIES, turn ^= 1) {
        const Listed<QUERIES>& here = lists[turn];
        next = place.thread < QUERIES ? position(p, place.b, row + QUERIES + place.thread, all.last) : -1;
        const float next_weight = weight<ROLLOUT>(p, place.b, place.first_row, next);
        for (int h = place.warp; h < heads; h += p.tile.warps)
            head_alpha<T, AT_ONCE>(p, place, here.rows, h, h + p.tile.warps, fragments, alpha + h * HEAD);
        list<ROLLOUT>(p, place, next, next_weight, lists[turn ^ 1]);
        barrier(id, count);
        if (place.warp < heads) load_queries(p, place, lists[turn ^ 1].rows, place.warp, 0, fragments);
        form.prepare(p, place, alpha);
        take_queries<ROLLOUT>(p, place, seen, here.positions, here.weights[0], row, all.last, form, sums);
        barrier(id, count);
    }
    if constexpr (ROLLOUT) add_warps(p, place, sums, place.at<float>(p.tile.alpha));
}

template <bool ROLLOUT, class T>
void run_heads(const PairArgs& p, void* stream) {
    const int64_t blocks = int64_t((p.key_blocks + p.tile.groups - 1) / p.tile.groups) * p.shares * p.row_blocks * p.q.shape[0];
    const int padded = form_heads(p.heads);
    const auto kernel = padded == 8    ? pairs_kernel<T, 8, ROLLOUT>
                        : padded == 12 ? pairs_kernel<T, 12, ROLLOUT>
                        : padded == 16 ? pairs_kernel<T, 16, ROLLOUT>
                                       : pairs_kernel<T, WIDE, ROLLOUT>;
    launch(kernel, blocks, 32 * p.tile.groups * p.tile.warps, p.tile.groups * p.tile.bytes, stream, p);
}

// exact: products of float32 keep float32's digits.
template <bool ROLLOUT>
void run_pairs(const PairArgs& given, bool exact, void* stream) {
    const PairArgs p = prepared(given, stream);
    if (p.q.type == Type::bf16) run_heads<ROLLOUT, bf16>(p, stream);
    else if (p.q.type == Type::f16) run_heads<ROLLOUT, f16>(p, stream);
    else if (exact) run_heads<ROLLOUT, float>(p, stream);
    else run_heads<ROLLOUT, tf32>(p, stream);
}

}  // namespace
}  // namespace pyglobenc
