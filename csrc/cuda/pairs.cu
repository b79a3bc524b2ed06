// Does the work before the kernel of rollout_step and pair_norms: chooses its tile and packs the quadratic
// forms.
#include "pairs.h"

#include <stdexcept>

#include "pair_form.h"

namespace pyglobenc {

int form_heads(int heads) { return heads > 16 ? WIDE : padded_heads(heads); }

int form_size(int heads) {
    const int padded = form_heads(heads), blocks = blocks_of(heads);
    return padded ? padded * (padded + 1) / 2 : blocks * (blocks + 1) / 2 * SIDE * SIDE;
}

// Writes the position and the weights of query `row` of an example.
DEVICE void fill_query(const PairArgs& p, int b, int row) {
    const int i = p.rows.data ? int(element<int64_t>(p.rows, b, row)) : row;
    const bool counts = !p.key_mask.data || element<uint8_t>(p.key_mask, b, i);
    const float rstd = counts && p.rstd.data ? element<float>(p.rstd, b, i) : 1.0f;
    Weighted* out = p.queries + int64_t(b) * p.lines * p.n_queries + row;
    for (int t = 0; t < p.lines; ++t, out += p.n_queries)
        *out = counts ? Weighted{i, p.r.data ? element<float>(p.r, b, t, i) * rstd : rstd} : Weighted{-1, 0};
}

// Writes the bounds of the sequence that a token lies in: its first token, and its last one + 1.
DEVICE void fill_span(const PairArgs& p, int token) {
    int low = 0, high = int(p.cu_seqlens.shape[0]) - 1;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (element<int>(p.cu_seqlens, middle) > token ? high : low) = middle;
    }
    p.spans[token] = element<int>(p.cu_seqlens, low);
    p.spans[p.n + token] = element<int>(p.cu_seqlens, high);
}

// Packs the coefficients of each key's form: G[h][g] + G[g][h] for h < g, G[h][h] for h = g, and else 0. Also
// packs the queries. The blocks of the grid divide the work.
KERNEL(256) pack_kernel(PairArgs p, int padded) {
    for (int row = block() % p.key_blocks * threads() + thread(); row < p.n_queries;
         row += p.key_blocks * threads()) {
        fill_query(p, block() / p.key_blocks, row);
        if (p.spans) fill_span(p, row);
    }
    const int b = block() / p.key_blocks, key = block() % p.key_blocks * KEYS + lane();
    float* out = p.packed + int64_t(block()) * p.form_size * KEYS;
    const float* gram =
        static_cast<const float*>(p.gram.data) + b * p.gram.stride[0] + key * p.gram.stride[1];
    for (int e = warp(); e < p.form_size; e += threads() / 32) {
        // The triangle is stored row by row. It consists of entries, or of blocks of SIDE x SIDE.
        const int unit = padded ? 1 : SIDE, each = unit * unit;
        int row = 0, rest = e / each, length = padded ? padded : blocks_of(p.heads);
        while (rest >= length) rest -= length--, ++row;
        const int h = row * unit + e % each / unit, g = (row + rest) * unit + e % each % unit;
        float value = 0;
        if (key < p.n && g < p.heads && h <= g) {
            value = gram[h * p.gram.stride[2] + g * p.gram.stride[3]];
            if (h < g) value += gram[g * p.gram.stride[2] + h * p.gram.stride[3]];
        }
        out[e * KEYS + lane()] = value;
    }
}

PairTile choose_tile(int heads, int kv_heads, int head_dim, int size, int limit) {
    const int padded = form_heads(heads);
    for (int choice = 0; choice < 4; ++choice) {
        PairTile tile;
        tile.held = choice < 2;
        tile.groups = choice % 2 ? 1 : 2;
        tile.queries = padded != WIDE && padded <= 12 && size == 2 ? 32 : 16;
        tile.warps = THREADS / 32 / tile.groups;
        const int head = 4 * KEYS * tile.queries, listed = tile.queries * (4 + 4 + 4 * MAX_ROWS) + 8;
        tile.alpha = tile.held ? kv_heads * ((head_dim * size + 63) / 64) * 2048 : tile.warps * 2048;
        // After the last tile, the sums of the warps take the place of alpha.
        const int alpha = padded_heads(heads) * head, sums = tile.warps * MAX_ROWS * KEYS * 4;
        tile.partial = tile.alpha + (alpha > sums ? alpha : sums);
        tile.own = tile.partial + (padded ? 0 : tile.warps * head);
        tile.lse = tile.own + (heads + 1) * KEYS * 4;
        tile.lists = tile.lse + tile.warps * 2 * tile.queries * 4;
        tile.bytes = (tile.lists + 2 * listed + 127) / 128 * 128;
        if (tile.groups * tile.bytes <= limit) return tile;
    }
    return PairTile();
}

PairRoom choose_room(int64_t batch, int heads, int64_t n, int64_t n_queries, int64_t rows, int shares,
                     bool packed_sequences) {
    const auto whole = [](int64_t floats) { return (floats + 31) / 32 * 32; };
    PairRoom room;
    room.queries = batch * ((n + KEYS - 1) / KEYS) * form_size(heads) * KEYS;
    room.spans = room.queries + whole(2 * batch * (rows ? rows : 1) * n_queries);
    room.parts = room.spans + (packed_sequences ? whole(2 * n) : 0);
    room.size = room.parts + (shares > 1 ? shares * batch * rows * n : 0);
    return room;
}

PairArgs prepared(PairArgs p, void* stream) {
    if (!p.tile.groups)
        throw std::runtime_error("no tile of this many heads fits the device's shared memory");
    if (p.shares > MAX_SHARES) throw std::runtime_error("the queries in more shares than are added up");
    const int padded = form_heads(int(p.q.shape[1])), size = p.q.type == Type::f32 ? 4 : 2;
    p.n = int(p.k.shape[2]);
    p.heads = int(p.q.shape[1]);
    p.group = p.heads / int(p.k.shape[1]);
    p.n_queries = int(p.rows ? p.rows.shape[1] : p.q.shape[2]);
    p.n_rows = int(p.r.shape[1]);
    p.steps = int(p.q.shape[3]) * size / 64;
    for (int axis = 0; axis < 3; ++axis)
        p.q_step[axis] = p.q.stride[axis] * size, p.k_step[axis] = p.k.stride[axis] * size;
    for (const int64_t step : {p.q_step[1], p.k_step[1], p.lse.stride[1] * 4})
        if (step > INT32_MAX) throw std::runtime_error("the heads of q, k or lse lie more than 2 GiB apart");
    p.q_head = int(p.q_step[1]);
    p.k_head = int(p.k_step[1]);
    p.lse_head = int(p.lse.stride[1] * 4);
    if (p.q_step[2] / 16 * p.n > UINT32_MAX) throw std::runtime_error("a head of q takes more than 64 GiB");
    p.q_row = uint32_t(p.q_step[2] / 16);
    p.to_base_2 = float(p.scaling * 1.4426950408889634);
    p.per_group = (65535 + p.group) / p.group;
    p.key_blocks = (p.n + KEYS - 1) / KEYS;
    p.row_blocks = p.r ? (p.n_rows + MAX_ROWS - 1) / MAX_ROWS : 1;
    p.form_size = form_size(p.heads);
    p.lines = p.r ? p.n_rows : 1;
    const PairRoom room =
        choose_room(p.q.shape[0], p.heads, p.n, p.n_queries, p.n_rows, p.shares, bool(p.cu_seqlens));
    if (p.room.shape[0] < room.size) throw std::runtime_error("too little scratch memory");
    p.packed = static_cast<float*>(p.room.data);
    p.queries = reinterpret_cast<Weighted*>(p.packed + room.queries);
    p.spans = p.cu_seqlens ? reinterpret_cast<int*>(p.packed + room.spans) : nullptr;
    // A single share is summed directly in the result.
    p.parts = p.shares > 1 ? p.packed + room.parts : static_cast<float*>(p.out.data);
    launch(pack_kernel, p.key_blocks * p.q.shape[0], 256, 0, stream, p, padded);
    return p;
}

}  // namespace pyglobenc
