// rollout_step: multiplies rows of the rollout by the norms, without storing the norms.
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

void rollout_step(const PairArgs& args, const View& r, const View& out) {
    RolloutSink sink{args, r, out};
    walk(args, sink);
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
