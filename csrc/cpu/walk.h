// Visits every (key, query) pair of a batch, tile by tile, and passes the norms of each tile to a sink.
//
// A task is one block of keys of one example. One thread computes all norms of a key, in the order of the
// queries, so that results depend neither on the number of threads nor on the size of the blocks.
#pragma once

#include "parallel.h"
#include "tile.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

constexpr int64_t MAX_KEYS = 48 / KEYS * KEYS;  // of a block
constexpr int64_t SCRATCH = 384 * 1024;   // bytes of the second-level cache that a block of keys may use
constexpr int64_t CHUNK_QUERIES = 8192;   // packed queries of a chunk, unless one example has more

// The norms of one tile, as a sink receives them.
struct NormsTile {
    const Example& example;
    int64_t slot;              // number of the block of queries within the chunk
    int64_t query, n_queries;  // number of the block's first query within the example, and of its queries
    int64_t key, count;        // number of the tile's first key within the example, and of its keys
    int64_t offset;            // number of the tile's first key within its block of keys
    const float* norm;         // [KEYS, I]
};

// The examples of a batch, with the positions of their real tokens and of their queries. Padded keys are left
// out here. Packed sequences are examples that share one tensor.
struct Examples {
    Memory memory;
    int64_t batch;

    explicit Examples(const PairArgs& args) : memory(size(args)), batch(count(args)) {
        const int64_t n = args.q.shape[2], m = args.rows ? args.rows.shape[1] : n;
        const int64_t* ends = static_cast<const int64_t*>(args.cu_seqlens.data);
        int32_t* next = memory.as<int32_t>(batch * sizeof(Example));
        for (int64_t index = 0; index < batch; ++index) {
            Example& e = example(index);
            const int64_t b = ends ? 0 : index, first = ends ? ends[index] : 0,
                          last = ends ? ends[index + 1] : n;
            e.b = b;
            e.n_keys = e.n_queries = e.first_block = 0;
            e.keys = e.queries = next;
            for (int64_t j = first; j < last; ++j)
                if (real(args, b, j)) next[e.n_keys++] = int32_t(j);
            e.n_queries = e.n_keys;
            e.rows = e.keys;
            next += last - first;
            if (!args.rows) continue;
            e.queries = next;
            e.rows = next + m;
            e.n_queries = 0;
            for (int64_t t = 0; t < m; ++t) {
                const int64_t i = static_cast<const int64_t*>(args.rows.data)[at(args.rows, b, t)];
                if (!real(args, b, i)) continue;
                next[e.n_queries] = int32_t(i);
                next[m + e.n_queries++] = int32_t(t);
            }
            next += 2 * m;
        }
    }

    Example& example(int64_t b) const { return memory.as<Example>()[b]; }

    // Returns whether token j is real. Padded keys never enter an example's list of keys.
    static bool real(const PairArgs& args, int64_t b, int64_t j) {
        return !args.key_mask || static_cast<const uint8_t*>(args.key_mask.data)[at(args.key_mask, b, j)];
    }

    static int64_t count(const PairArgs& args) {
        return args.cu_seqlens ? args.cu_seqlens.shape[0] - 1 : args.q.shape[0];
    }

    static int64_t size(const PairArgs& args) {
        const int64_t m = args.rows ? args.rows.shape[1] : 0, batch = args.q.shape[0];
        return count(args) * int64_t(sizeof(Example)) +
               batch * int64_t(sizeof(int32_t)) * (args.q.shape[2] + 2 * m);
    }
};

// The examples whose packed queries are held at the same time, and the division of their work into tasks.
struct Chunk {
    int64_t first, last;  // the examples first to last - 1
    int64_t blocks;       // number of blocks of queries
    int64_t pairs;        // number of (query, key) pairs
    int64_t keys;         // number of keys in a block
    int64_t tasks;        // number of blocks of keys

    Chunk(const Examples& examples, int64_t start, int64_t most_keys, int threads)
        : first(start), last(start), blocks(0), pairs(0), tasks(0) {
        int64_t n_keys = 0;
        while (last < examples.batch && (last == first || blocks * I < CHUNK_QUERIES)) {
            Example& e = examples.example(last++);
            e.first_block = blocks;
            blocks += (e.n_queries + I - 1) / I;
            pairs += e.n_queries * e.n_keys;
            n_keys += e.n_keys;
        }
        keys = n_keys / (4 * threads) / KEYS * KEYS;
        keys = keys < KEYS ? KEYS : keys > most_keys ? most_keys : keys;
        for (int64_t b = first; b < last; ++b) tasks += count(examples.example(b));
    }

    int64_t count(const Example& e) const { return (e.n_keys + keys - 1) / keys; }

    // Returns the example of a task, and replaces the task's number by its number within that example.
    const Example& find(const Examples& examples, int64_t& task) const {
        int64_t b = first;
        while (task >= count(examples.example(b))) task -= count(examples.example(b++));
        return examples.example(b);
    }
};

// Sizes, in floats, of the buffers of one thread.
struct Layout {
    int64_t k, form, alpha, norm, sink;

    Layout(const PairArgs& args, int64_t keys, int64_t sink_size) : sink(aligned(sink_size)) {
        const int64_t H = args.q.shape[1];
        k = aligned(args.k.shape[1] * keys * units(unit_of(args.k), args.k.shape[3]));
        form = aligned(keys * form_size(H));
        alpha = keys * H * I;
        norm = KEYS * I;
    }

    int64_t total() const { return k + form + alpha + norm + sink; }

    static int64_t most_keys(const PairArgs& args, int64_t sink_size) {
        const int64_t H = args.q.shape[1];
        const int64_t one = 4 * (args.k.shape[1] * args.q.shape[3] + form_size(H) + H * I + sink_size);
        const int64_t keys = SCRATCH / one / KEYS * KEYS;
        return keys < KEYS ? KEYS : keys > MAX_KEYS ? MAX_KEYS : keys;
    }
};

// Computes the norms of one block of queries with one block of keys, and passes them to the sink.
template <int VT, class Sink>
static void visit(const PairArgs& args, const Example& example, const Keys& keys, const Queries& queries,
                  int64_t block, float* alpha, float* norm, float* sink_memory, Sink& sink) {
    const int64_t H = args.q.shape[1], group = H / args.k.shape[1], size = form_size(H),
                  width = units(keys.unit, args.q.shape[3]);
    const int64_t slot = example.first_block + block, tiles = (keys.count + KEYS - 1) / KEYS;
    const int64_t n_queries = example.n_queries - block * I < I ? example.n_queries - block * I : I;
    const int32_t* position = queries.position + slot * I;
    const int32_t* key = example.keys + keys.first;
    if (!sink.wants(slot)) return;
    int32_t low = position[0], high = position[0];
    for (int64_t l = 1; l < n_queries; ++l) {
        low = position[l] < low ? position[l] : low;
        high = position[l] > high ? position[l] : high;
    }
    if (Overlap(args, key[0], key[keys.count - 1], low, high).hidden) return;
    const auto scores = probabilities_from<VT>(keys.unit);
    for (int64_t h = 0; h < H; ++h)
        for (int64_t t = 0; t < tiles; ++t)
            scores(queries.q + (slot * H + h) * width * I, keys.k + (h / group * tiles + t) * KEYS * width,
                   queries.offset + (slot * H + h) * I, args.scaling, width, alpha + (t * KEYS * H + h) * I,
                   H * I);
    for (int64_t j = 0; j < keys.count; j += KEYS) {
        const int64_t count = keys.count - j < KEYS ? keys.count - j : KEYS;
        const Overlap overlap(args, key[j], key[j + count - 1], low, high);
        if (overlap.hidden) continue;
        tile_norms<VT>(args, example, overlap, key + j, count, keys.form + j * size, position,
                       alpha + j * H * I, norm);
        sink.take(NormsTile{example, slot, block * I, n_queries, keys.first + j, count, j, norm},
                  sink_memory);
    }
}

// Computes the norms of all queries of an example with one block of keys.
template <class Sink>
static void run_task(const PairArgs& args, const Example& example, int64_t first, int64_t most,
                     const Queries& queries, float* scratch, const Layout& layout, Sink& sink) {
    const Keys keys{queries.unit, first, example.n_keys - first < most ? example.n_keys - first : most,
                    scratch, scratch + layout.k};
    float* alpha = keys.form + layout.form;
    float* norm = alpha + layout.alpha;
    float* sink_memory = norm + layout.norm;
    pack_keys(args, example, keys);
    sink.begin(keys.count, sink_memory);
    for (int64_t block = 0; block * I < example.n_queries; ++block) {
        const int64_t rest = example.n_queries - block * I;
        if (rest > (V - 1) * W)
            visit<V>(args, example, keys, queries, block, alpha, norm, sink_memory, sink);
        else if (V > 2 && rest > 2 * W)
            visit<V - 1>(args, example, keys, queries, block, alpha, norm, sink_memory, sink);
        else if (V > 2 && rest > W)
            visit<2>(args, example, keys, queries, block, alpha, norm, sink_memory, sink);
        else
            visit<1>(args, example, keys, queries, block, alpha, norm, sink_memory, sink);
    }
    sink.end(example, first, keys.count, sink_memory);
}

// Visits every pair of a batch. The sink's methods are called in this order:
//
//   size(keys)                        returns the floats of scratch memory for a block of that many keys.
//   open(blocks)                      starts a chunk of that many blocks of queries.
//   pack(example, block, slot)        prepares one block of queries.
//   begin(keys, memory)               starts a block of keys.
//   wants(slot)                       returns whether a block of queries matters to the result.
//   take(tile, memory)                receives the norms of one tile.
//   end(example, first, keys, memory) ends a block of keys.
template <class Sink>
static void walk(const PairArgs& args, Sink& sink) {
    const int64_t H = args.q.shape[1], dh = args.q.shape[3],
                  most_keys = Layout::most_keys(args, sink.size(1));
    const Examples examples(args);
    for (int64_t start = 0; start < examples.batch;) {
        Chunk chunk(examples, start, most_keys, args.threads);
        start = chunk.last;
        const Layout layout(args, chunk.keys, sink.size(chunk.keys));
        const bool serial = chunk.pairs * H * (dh + H) < SERIAL;
        const int threads = serial ? 1 : args.threads;
        const Unit unit = unit_of(args.q);
        const int64_t q = chunk.blocks * H * units(unit, dh) * I, offset = chunk.blocks * H * I,
                      position = aligned(chunk.blocks * I);
        const Memory memory(4 * (q + offset + position + threads * layout.total()));
        const Queries queries{unit, memory.as<float>(), memory.as<float>(4 * q),
                              memory.as<int32_t>(4 * (q + offset))};
        float* const scratch = memory.as<float>(4 * (q + offset + position));
        sink.open(chunk.blocks);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            [[maybe_unused]] const TileRegisters registers;
            float* const mine = scratch + thread() * layout.total();
#pragma omp for schedule(dynamic)
            for (int64_t slot = 0; slot < chunk.blocks; ++slot) {
                int64_t b = chunk.first;
                while (b + 1 < chunk.last && examples.example(b + 1).first_block <= slot) ++b;
                const Example& example = examples.example(b);
                pack_queries(args, example, slot - example.first_block, queries);
                sink.pack(example, slot - example.first_block, slot);
            }
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < chunk.tasks; ++item) {
                int64_t task = item;
                const Example& example = chunk.find(examples, task);
                run_task(args, example, task * chunk.keys, chunk.keys, queries, mine, layout, sink);
            }
        }
    }
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
