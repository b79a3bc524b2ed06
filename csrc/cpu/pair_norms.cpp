// pair_norms: computes and stores the norms of all (query, key) pairs.
#include "ops.h"
#include "walk.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

struct NormsSink {
    const PairArgs& args;
    const View& out;  // [B, T or n, n]

    int64_t size(int64_t) const { return 0; }
    void open(int64_t) {}
    void pack(const Example&, int64_t, int64_t) {}
    bool wants(int64_t) const { return true; }
    void begin(int64_t, float*) {}
    void end(const Example&, int64_t, int64_t, float*) {}

    void take(const NormsTile& tile, float*) {
        const Example& e = tile.example;
        for (int64_t l = 0; l < tile.n_queries; ++l) {
            const float scale = args.rstd ? number(args.rstd, e.b, e.queries[tile.query + l]) : 1.0f;
            float* row = static_cast<float*>(out.data) + at(out, e.b, e.rows[tile.query + l]);
            for (int64_t j = 0; j < tile.count; ++j) row[e.keys[tile.key + j]] = tile.norm[j * I + l] * scale;
        }
    }
};

void pair_norms(const PairArgs& args, const View& out) {
    NormsSink sink{args, out};
    walk(args, sink);
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
