// Copies of what a tile reads, in the order in which it is read: real tokens only, widened to float32.
#pragma once

#include "../common/half.h"
#include "kernels.h"
#include "simd.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

static inline int64_t aligned(int64_t count) { return (count + 15) / 16 * 16; }  // floats, to a cache line

static inline int64_t at(const View& v, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
    return a * v.stride[0] + b * v.stride[1] + c * v.stride[2] + d * v.stride[3];
}

static inline float number(const View& v, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
    return static_cast<const float*>(v.data)[at(v, a, b, c, d)];
}

// Vector x[a, b, c, :] of any type to out, `step` floats apart.
static inline void widen(const View& x, int64_t a, int64_t b, int64_t c, float* out, int64_t step) {
    const int64_t count = x.shape[3], stride = x.stride[3], first = at(x, a, b, c);
    if (x.type == Type::f32) {
        const float* in = static_cast<const float*>(x.data) + first;
        for (int64_t i = 0; i < count; ++i) out[i * step] = in[i * stride];
        return;
    }
    const uint16_t* in = static_cast<const uint16_t*>(x.data) + first;
    if (x.type == Type::bf16)
        for (int64_t i = 0; i < count; ++i) out[i * step] = widen_bf16(in[i * stride]);
    else
        for (int64_t i = 0; i < count; ++i) out[i * step] = widen_f16(in[i * stride]);
}

// One example of the batch: the positions of its real keys, in order, and of the queries to compute.
struct Example {
    int64_t b;
    int64_t n_keys, n_queries;
    const int32_t* keys;     // [n_keys]
    const int32_t* queries;  // [n_queries]
    const int32_t* rows;     // [n_queries] row of the output
    int64_t first_block;     // of its blocks of I queries, among those of the chunk
};

// Blocks of I queries, the unit that is streamed past a tile of keys.
struct Queries {
    float* q;           // [blocks, H, dh, I]
    float* offset;      // [blocks, H, I] -lse; -inf beyond the last query, whose probabilities are then 0
    int32_t* position;  // [blocks, I] -1 beyond the last query
};

static void pack_queries(const PairArgs& args, const Example& example, int64_t block, const Queries& out) {
    const int64_t H = args.q.shape[1], dh = args.q.shape[3];
    const int64_t start = block * I, count = example.n_queries - start < I ? example.n_queries - start : I;
    const int64_t slot = example.first_block + block;
    int32_t* position = out.position + slot * I;
    for (int64_t l = 0; l < I; ++l) position[l] = l < count ? example.queries[start + l] : -1;
    for (int64_t h = 0; h < H; ++h) {
        float* q = out.q + (slot * H + h) * dh * I;
        float* offset = out.offset + (slot * H + h) * I;
        if (count < I) std::memset(q, 0, sizeof(float) * dh * I);
        for (int64_t l = 0; l < count; ++l) {
            widen(args.q, example.b, h, position[l], q + l, I);
            offset[l] = -number(args.lse, example.b, h, position[l]);
        }
        for (int64_t l = count; l < I; ++l) offset[l] = -INFINITY;
    }
}

// Floats of one key's quadratic form: rows of G two at a time, from the diagonal on.
static inline int64_t form_size(int64_t H) {
    int64_t size = 0;
    for (int64_t h = 0; h < H; h += 2) size += 2 * (H - h);
    return size;
}

static inline float folded(const View& gram, int64_t b, int64_t j, int64_t g, int64_t h) {
    return g == h ? number(gram, b, j, g, g) : number(gram, b, j, g, h) + number(gram, b, j, h, g);
}

// a^T G a = sum_g a_g (sum_{h >= g} (G + G^T - diag G)_gh a_h): pairs (row g, row g + 1) for h = g, g + 1, ...
static void pack_form(const View& gram, int64_t b, int64_t j, float* out) {
    const int64_t H = gram.shape[2];
    for (int64_t g = 0; g < H; g += 2)
        for (int64_t h = g; h < H; ++h) {
            *out++ = folded(gram, b, j, g, h);
            *out++ = h > g ? folded(gram, b, j, g + 1, h) : 0.0f;
        }
}

// A block of keys and what belongs to them.
struct Keys {
    int64_t first, count;  // among the example's real keys
    float* k;              // [Hkv, tiles, dh, J]
    float* form;           // [count, form_size(H)]
};

static void pack_keys(const PairArgs& args, const Example& example, const Keys& keys) {
    const int64_t Hkv = args.k.shape[1], dh = args.k.shape[3], size = form_size(args.q.shape[1]);
    const int64_t tiles = (keys.count + J - 1) / J;
    if (keys.count < tiles * J) std::memset(keys.k, 0, sizeof(float) * Hkv * tiles * dh * J);
    for (int64_t j = 0; j < keys.count; ++j) {
        const int64_t position = example.keys[keys.first + j];
        for (int64_t h = 0; h < Hkv; ++h) widen(args.k, example.b, h, position, keys.k + (h * tiles + j / J) * dh * J + j % J, J);
        pack_form(args.gram, example.b, position, keys.form + j * size);
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
