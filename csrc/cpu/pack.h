// Copies the numbers that a tile reads, in the order in which it reads them. Only real tokens are copied, and
// their numbers are converted to float32.
#pragma once

#include "kernels.h"
#include "tiles.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// Rounds a number of floats up to whole cache lines.
static inline int64_t aligned(int64_t count) { return (count + 15) / 16 * 16; }

static inline int64_t at(const View& v, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
    return a * v.stride[0] + b * v.stride[1] + c * v.stride[2] + d * v.stride[3];
}

static inline float number(const View& v, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
    return static_cast<const float*>(v.data)[at(v, a, b, c, d)];
}

// Loads up to W contiguous numbers of any type as floats; the remaining lanes are 0.
static inline Floats load_some(const View& x, int64_t first, int64_t count) {
    if (x.type == Type::f32) return load_some(static_cast<const float*>(x.data) + first, count);
    Halves halves = {};
    std::memcpy(&halves, static_cast<const uint16_t*>(x.data) + first,
                sizeof(uint16_t) * (count < W ? count : W));
    return x.type == Type::bf16 ? widen_bf16(halves) : widen_f16(halves);
}

// The contents of 32 bits of a packed vector: a float; two unchanged bf16; or, for tiles, two bf16 of the
// parts that floats are split into (csrc/cpu/tiles.h). The first parts of all numbers come first.
enum class Unit { single, pair, one_part, two_parts, three_parts };

// Returns the unit of scores.
static inline Unit unit_of(const View& x) {
    if (TILES)
        return x.type == Type::bf16  ? Unit::one_part
               : x.type == Type::f16 ? Unit::two_parts
                                     : Unit::three_parts;
    return PAIRS && x.type == Type::bf16 ? Unit::pair : Unit::single;
}
static constexpr int parts(Unit unit) { return int(unit) - int(Unit::one_part) + 1; }
static inline int64_t units(Unit unit, int64_t numbers) {
    return unit == Unit::single ? numbers
           : unit == Unit::pair ? (numbers + 1) / 2
                                : parts(unit) * tile_width(numbers);
}

// Copies numbers of x, from element `first` on and `step` elements apart, to the units of out; an odd last
// half is 0.
static inline void take(const View& x, Unit unit, int64_t first, int64_t step, int64_t numbers, float* out) {
    if (x.type == Type::f32) {
        const float* in = static_cast<const float*>(x.data) + first;
        if (step == 1)
            std::memcpy(out, in, sizeof(float) * numbers);
        else
            for (int64_t i = 0; i < numbers; ++i) out[i] = in[i * step];
        return;
    }
    const uint16_t* in = static_cast<const uint16_t*>(x.data) + first;
    if (unit == Unit::pair) {
        uint16_t* const to = reinterpret_cast<uint16_t*>(out);
        if (step == 1)
            std::memcpy(to, in, sizeof(uint16_t) * numbers);
        else
            for (int64_t i = 0; i < numbers; ++i) to[i] = in[i * step];
        if (numbers % 2) to[numbers] = 0;
        return;
    }
    for (int64_t i = 0; i < numbers; i += W) {
        const bool whole = numbers - i >= W;
        Halves halves = {};
        if (whole && step == 1)
            std::memcpy(&halves, in + i, sizeof halves);
        else
            for (int64_t l = 0; l < W && i + l < numbers; ++l) halves[l] = in[(i + l) * step];
        const Floats wide = x.type == Type::bf16 ? widen_bf16(halves) : widen_f16(halves);
        if (whole)
            std::memcpy(out + i, &wide, sizeof wide);
        else
            std::memcpy(out + i, &wide, sizeof(float) * (numbers - i));
    }
}

// Splits numbers of x, at most 2 * TILE, into parts of 32 bits at out[part * width].
static inline void take_parts(const View& x, Unit unit, int64_t first, int64_t step, int64_t numbers,
                              int64_t width, float* out) {
    float wide[2 * TILE] = {};
    take(x, Unit::single, first, step, numbers < 2 * TILE ? numbers : 2 * TILE, wide);
    split(wide, parts(unit), width, out);
}

// Splits numbers of x into parts [parts, tile_width(numbers)].
static inline void take_row(const View& x, Unit unit, int64_t first, int64_t step, int64_t numbers,
                            float* out) {
    const int64_t width = tile_width(numbers);
    for (int64_t c = 0; c < width; c += TILE)
        take_parts(x, unit, first + 2 * c * step, step, numbers - 2 * c, width, out + c);
}

// Does the same as pack_tokens for numbers that are split.
static inline void pack_parts(const View& x, Unit unit, const int64_t* first, int64_t count, int64_t step,
                              int64_t numbers, float* out) {
    const int64_t width = tile_width(numbers);
    for (int64_t l = 0; l < I; l += W)
        for (int64_t c = 0; c < width; c += W) {
            Floats rows[3][W] = {};
            for (int64_t r = 0; r < W && l + r < count; ++r)
                take_parts(x, unit, first[l + r] + 2 * c * step, step, numbers - 2 * c, W * W,
                           reinterpret_cast<float*>(rows[0] + r));
            for (int p = 0; p < parts(unit); ++p) {
                transpose(rows[p]);
                for (int64_t r = 0; r < W; ++r) store(out + (p * width + c + r) * I + l, rows[p][r]);
            }
        }
}

// Copies the vectors of `count` tokens, at most I, to out [units, I], with 0 beyond the last. Token l starts
// at element first[l].
static void pack_tokens(const View& x, Unit unit, const int64_t* first, int64_t count, int64_t step,
                        int64_t numbers, float* out) {
    if constexpr (TILES)
        if (unit != Unit::single) return pack_parts(x, unit, first, count, step, numbers, out);
    const int64_t width = units(unit, numbers), each = unit == Unit::pair ? 2 : 1;
    for (int64_t l = 0; l < I; l += W)
        for (int64_t c = 0; c < width; c += W) {
            const int64_t rest = numbers - c * each, here = rest < W * each ? rest : W * each;
            Floats rows[W] = {};
            for (int64_t r = 0; r < W && l + r < count; ++r)
                take(x, unit, first[l + r] + c * each * step, step, here, reinterpret_cast<float*>(rows + r));
            transpose(rows);
            for (int64_t r = 0; r < W && c + r < width; ++r) store(out + (c + r) * I + l, rows[r]);
        }
}

// The tokens of one block, at most I, of a tensor v (B, Hkv, n, dh). start holds the offset of each token in
// another tensor, which has the strides of_batch along the batch and of_token along the tokens.
struct BlockTokens {
    int64_t count, start[I];

    BlockTokens(const View& v, int64_t block, int64_t of_batch, int64_t of_token) {
        const int64_t n = v.shape[2], first = block * I, rest = v.shape[0] * n - first;
        count = rest < I ? rest : I;
        for (int64_t l = 0, b = first / n, j = first % n; l < count; ++l) {
            start[l] = b * of_batch + j * of_token;
            if (++j == n) j = 0, ++b;
        }
    }
};

// Packs the values of a block of tokens, v (B, Hkv, n, dh), to out [Hkv, units, I].
static inline void pack_values(const View& v, Unit unit, int64_t block, float* out) {
    BlockTokens values(v, block, v.stride[0], v.stride[2]);
    for (int64_t h = 0; h < v.shape[1]; ++h, out += units(unit, v.shape[3]) * I) {
        pack_tokens(v, unit, values.start, values.count, v.stride[3], v.shape[3], out);
        for (int64_t l = 0; l < values.count; ++l) values.start[l] += v.stride[1];
    }
}

// One example of the batch: the positions of its real keys, in order, and of its queries.
struct Example {
    int64_t b;
    int64_t n_keys, n_queries;
    const int32_t* keys;     // [n_keys]
    const int32_t* queries;  // [n_queries]
    const int32_t* rows;     // [n_queries] row of the output
    int64_t first_block;     // number of this example's first block of I queries within the chunk
};

// Packed blocks of I queries. The kernel compares every block with a tile of keys.
struct Queries {
    Unit unit;
    float* q;           // [blocks, H, units, I]
    float* offset;      // [blocks, H, I] -lse; -inf past the last query, which makes the probabilities 0
    int32_t* position;  // [blocks, I] -1 past the last query
};

static inline void pack_queries(const PairArgs& args, const Example& example, int64_t block,
                                const Queries& out) {
    const int64_t H = args.q.shape[1], dh = args.q.shape[3], width = units(out.unit, dh);
    const int64_t start = block * I, count = example.n_queries - start < I ? example.n_queries - start : I;
    const int64_t slot = example.first_block + block;
    int32_t* position = out.position + slot * I;
    for (int64_t l = 0; l < I; ++l) position[l] = l < count ? example.queries[start + l] : -1;
    for (int64_t h = 0; h < H; ++h) {
        int64_t first[I];
        for (int64_t l = 0; l < count; ++l) first[l] = at(args.q, example.b, h, position[l]);
        pack_tokens(args.q, out.unit, first, count, args.q.stride[3], dh, out.q + (slot * H + h) * width * I);
        float* offset = out.offset + (slot * H + h) * I;
        for (int64_t l = 0; l < I; ++l)
            offset[l] = l < count ? -number(args.lse, example.b, h, position[l]) : -INFINITY;
    }
}

// Returns the number of floats of one key's quadratic form. It holds the rows of G in pairs, from the
// diagonal on.
static inline int64_t form_size(int64_t H) {
    int64_t size = 0;
    for (int64_t h = 0; h < H; h += 2) size += 2 * (H - h);
    return size;
}

// Packs the quadratic form of key j, which is
//
//   a^T G a = sum_g a_g (sum_{h >= g} (G + G^T - diag G)_gh a_h)
//
// Rows g and g + 1 are stored together: a pair of entries for each h = g, g + 1, ...
static void pack_form(const View& gram, int64_t b, int64_t j, float* out) {
    const int64_t H = gram.shape[2], down = gram.stride[2], right = gram.stride[3];
    const float* const own = static_cast<const float*>(gram.data) + at(gram, b, j);
    for (int64_t g = 0; g < H; g += 2) {
        const float* const row = own + g * down;
        const float* const column = own + g * right;
        *out++ = row[g * right];
        *out++ = 0;
        if (g + 1 == H) break;
        *out++ = row[(g + 1) * right] + column[(g + 1) * down];
        *out++ = row[down + (g + 1) * right];
        for (int64_t h = g + 2; h < H; ++h) {
            *out++ = row[h * right] + column[h * down];
            *out++ = row[down + h * right] + column[h * down + right];
        }
    }
}

// A packed block of keys with their quadratic forms.
struct Keys {
    Unit unit;
    int64_t first, count;  // number of the block's first key among the example's real keys, and of its keys
    float* k;              // [Hkv, count rounded up to a multiple of KEYS, units]
    float* form;           // [count, form_size(H)]
};

static inline void pack_keys(const PairArgs& args, const Example& example, const Keys& keys) {
    const int64_t Hkv = args.k.shape[1], size = form_size(args.q.shape[1]),
                  width = units(keys.unit, args.k.shape[3]);
    const int64_t rows = (keys.count + KEYS - 1) / KEYS * KEYS;
    const auto copy = TILES ? take_row : take;
    for (int64_t h = 0; h < Hkv; ++h) {
        float* const k = keys.k + h * rows * width;
        for (int64_t j = 0; j < keys.count; ++j)
            copy(args.k, keys.unit, at(args.k, example.b, h, example.keys[keys.first + j]), args.k.stride[3],
                 args.k.shape[3], k + j * width);
        std::memset(k + keys.count * width, 0, sizeof(float) * (rows - keys.count) * width);
    }
    for (int64_t j = 0; j < keys.count; ++j)
        pack_form(args.gram, example.b, example.keys[keys.first + j], keys.form + j * size);
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
