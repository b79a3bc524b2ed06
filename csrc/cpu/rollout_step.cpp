// rollout_step: multiplies rows of the rollout by the norms, without storing the norms, and scales each row to
// maximum 1.
#include <cmath>

#include "ops.h"
#include "walk.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

struct RolloutSink {
    const PairArgs& args;
    const View& r;              // [B, T, n]
    const View& out;            // [B, T, n]
    Memory* weights = nullptr;  // [blocks, T, I] r times the row scale, and 0 past the last query

    ~RolloutSink() { delete weights; }

    int64_t targets() const { return r.shape[1]; }
    int64_t size(int64_t keys) const { return keys * targets() * W; }

    void open(int64_t blocks) {
        delete weights;
        weights = nullptr;
        weights = new Memory(4 * blocks * targets() * I);
    }

    void pack(const Example& e, int64_t block, int64_t slot) {
        for (int64_t t = 0; t < targets(); ++t) {
            float* to = weights->as<float>(4 * (slot * targets() + t) * I);
            std::memset(to, 0, sizeof(float) * I);
            for (int64_t l = 0; l < I && block * I + l < e.n_queries; ++l) {
                const int32_t i = e.queries[block * I + l];
                to[l] = number(r, e.b, t, i) * (args.rstd ? number(args.rstd, e.b, i) : 1.0f);
            }
        }
    }

    // The first rows of a rollout are zero except at the targets.
    bool wants(int64_t slot) const {
        const float* weight = weights->as<float>(4 * slot * targets() * I);
        for (int64_t l = 0; l < targets() * I; ++l)
            if (weight[l] != 0) return true;
        return false;
    }

    void begin(int64_t keys, float* sums) { std::memset(sums, 0, 4 * size(keys)); }

    void take(const NormsTile& tile, float* sums) {
        const int64_t vectors = (tile.n_queries + W - 1) / W;
        const float* weight = weights->as<float>(4 * tile.slot * targets() * I);
        for (int64_t j = 0; j < tile.count; ++j) {
            float* sum = sums + (tile.offset + j) * targets() * W;
            for (int64_t t = 0; t < targets(); ++t) {
                Floats total = load(sum + t * W);
                for (int64_t v = 0; v < vectors; ++v)
                    total += load(tile.norm + j * I + v * W) * load(weight + t * I + v * W);
                store(sum + t * W, total);
            }
        }
    }

    void end(const Example& e, int64_t first, int64_t count, float* sums) {
        for (int64_t j = 0; j < count; ++j)
            for (int64_t t = 0; t < targets(); ++t)
                static_cast<float*>(out.data)[at(out, e.b, t, e.keys[first + j])] =
                    sum(load(sums + (j * targets() + t) * W));
    }
};

// Divides the numbers [first, last) of a row by their maximum, and adds the maximum's logarithm to log_scale.
// Numbers that are all zero, or hold NaN, keep their scale.
static void rescale(float* row, int64_t step, int64_t first, int64_t last, float* log_scale) {
    float top = 0;
    bool all = true;
    for (int64_t j = first; j < last; ++j) {
        const float x = row[j * step];
        all = all && x == x;
        if (x > top) top = x;
    }
    if (!all || top == 0) return;
    for (int64_t j = first; j < last; ++j) row[j * step] /= top;
    *log_scale += std::log(top);
}

void rollout_step(const PairArgs& args, const View& r, const View& out, const View& log_scale) {
    RolloutSink sink{args, r, out};
    walk(args, sink);
    const int64_t* const ends = static_cast<const int64_t*>(args.cu_seqlens.data);
    const int64_t sequences = ends ? args.cu_seqlens.shape[0] - 1 : out.shape[0];
    for (int64_t s = 0; s < sequences; ++s)
        for (int64_t t = 0; t < out.shape[1]; ++t)
            rescale(static_cast<float*>(out.data) + at(out, ends ? 0 : s, t), out.stride[2],
                    ends ? ends[s] : 0, ends ? ends[s + 1] : out.shape[2],
                    static_cast<float*>(log_scale.data) + at(log_scale, s, t));
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
