// Defines the Python module pyglobenc._cpu.
#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "../common/tensor.h"
#include "kernels.h"

namespace py = pybind11;

namespace pyglobenc {

// The last released block of at most KEPT bytes is kept for the next call. Otherwise the system would clear
// new memory, which takes longer than the kernel of a short text. The size of a block is stored before it.
constexpr size_t KEPT = size_t(8) << 20, HEADER = 64;
static std::atomic<char*> kept{nullptr};

static size_t& size_of(char* block) { return *reinterpret_cast<size_t*>(block); }

void* allocate(int64_t bytes) {
    const size_t size = HEADER + (size_t(bytes) + 64) / 64 * 64;
    char* block = size <= KEPT ? kept.exchange(nullptr) : nullptr;
    if (block && size_of(block) < size) {
        std::free(block);
        block = nullptr;
    }
    if (!block) {
        block = static_cast<char*>(std::aligned_alloc(64, size));
        if (!block) throw std::bad_alloc();
        size_of(block) = size;
    }
    return block + HEADER;
}

void release(void* memory) {
    char* block = static_cast<char*>(memory) - HEADER;
    if (size_of(block) <= KEPT) block = kept.exchange(block);
    std::free(block);
}

static void free_kept() { std::free(kept.exchange(nullptr)); }

// Returns the instruction sets that this build and this machine have, the fastest first.
static std::vector<const Kernels*> available() {
    std::vector<const Kernels*> out;
    const auto add = [&](const Kernels& kernels) {
        if (kernels.supported()) out.push_back(&kernels);
    };
#ifdef PYGLOBENC_HAS_AMX
    add(kernels_amx);
#endif
#ifdef PYGLOBENC_HAS_AVX512BF16
    // Whether vdpbf16ps pays was measured. On AMD's Zen 4, rollout_step of bfloat16 takes two thirds of the
    // time of float32 with it. On Intel's Sapphire Rapids, scores take twice the time.
    const bool pays = __builtin_cpu_is("amd");
    if (pays) add(kernels_avx512bf16);
#endif
#ifdef PYGLOBENC_HAS_AVX512
    add(kernels_avx512);
#endif
#ifdef PYGLOBENC_HAS_AVX512BF16
    if (!pays) add(kernels_avx512bf16);
#endif
#ifdef PYGLOBENC_HAS_AVX2
    add(kernels_avx2);
#endif
#ifdef PYGLOBENC_HAS_PORTABLE
    add(kernels_portable);
#endif
    if (out.empty()) throw py::import_error("built for instruction sets that this machine doesn't have");
    return out;
}

static const Kernels* in_use = nullptr;

static void use(const std::string& name) {
    for (const Kernels* kernels : available())
        if (name == kernels->name) {
            in_use = kernels;
            return;
        }
    throw py::value_error("instruction set " + name + " is not available on this machine");
}

// Returns the functions for scores and sums of products of a tensor's numbers. On tile registers float32 takes
// six products of parts. On Intel's Sapphire Rapids this takes as long as fused multiply-adds, and up to twice
// as long while another process uses the core's other thread.
static const Kernels* kernels_for(const View& x) {
#if defined(PYGLOBENC_HAS_AMX) && defined(PYGLOBENC_HAS_AVX512)
    if (in_use == &kernels_amx && x.type == Type::f32) return &kernels_avx512;
#endif
    (void)x;
    return in_use;
}

static PairArgs pair_args(const py::tuple& given, int threads) {
    PairArgs args;
    View* const views[] = {&args.q,           &args.k,    &args.lse,      &args.gram, &args.cross,
                           &args.residual_sq, &args.rstd, &args.key_mask, &args.rows, &args.cu_seqlens};
    for (size_t index = 0; index < 10; ++index) *views[index] = view(given[index]);
    args.scaling = given[10].cast<float>();
    const py::tuple window = given[11];
    args.left = window[0].cast<int64_t>();
    args.right = window[1].cast<int64_t>();
    args.threads = threads < 1 ? 1 : threads;
    return args;
}

static void pair_norms(const py::tuple& given, const py::object& out, int threads) {
    const PairArgs args = pair_args(given, threads);
    const View to = view(out);
    py::gil_scoped_release nogil;
    kernels_for(args.q)->pair_norms(args, to);
}

static void rollout_step(const py::tuple& given, const py::object& r, const py::object& out,
                         const py::object& log_scale, int threads) {
    const PairArgs args = pair_args(given, threads);
    const View from = view(r), to = view(out), scale = view(log_scale);
    py::gil_scoped_release nogil;
    kernels_for(args.q)->rollout_step(args, from, to, scale);
}

static void head_gram(const py::object& v, const py::object& kernel, const py::object& x,
                      const py::object& cross_kernel, const py::object& gram, const py::object& cross,
                      int threads) {
    const View views[] = {view(v), view(kernel), view(x), view(cross_kernel), view(gram), view(cross)};
    py::gil_scoped_release nogil;
    in_use->head_gram(views[0], views[1], views[2], views[3], views[4], views[5], threads < 1 ? 1 : threads);
}

static void norm_terms(const py::object& v, const py::object& weight, const py::object& x,
                       const py::object& gammas, const py::tuple& out, int threads) {
    const View views[] = {view(v),      view(weight), view(x),     view(gammas),
                          view(out[0]), view(out[1]), view(out[2])};
    py::gil_scoped_release nogil;
    kernels_for(views[0])->norm_terms(views[0], views[1], views[2], views[3], views[4], views[5], views[6],
                                      threads < 1 ? 1 : threads);
}

// Returns the numbers of a contiguous float32 tensor; the Python launchers have checked that it is one.
static float* floats(const py::handle& tensor) { return static_cast<float*>(view(tensor).data); }

static void clone_relevance(const py::list& parts, const py::object& x, const py::object& out, int64_t count,
                            int threads) {
    std::vector<const float*> pointers;
    for (const py::handle part : parts) pointers.push_back(floats(part));
    const float* const from = floats(x);
    float* const to = floats(out);
    py::gil_scoped_release nogil;
    in_use->clone_relevance(pointers.data(), int64_t(pointers.size()), from, to, count, threads);
}

static void add_relevance(const py::object& r, const py::object& a, const py::object& b,
                          const py::object& out_a, const py::object& out_b, float stabilizer, bool rescale,
                          int threads) {
    const View whole = view(r);
    float* const pointers[] = {floats(r), floats(a), floats(b), floats(out_a), floats(out_b)};
    py::gil_scoped_release nogil;
    in_use->add_relevance(pointers[0], pointers[1], pointers[2], pointers[3], pointers[4], whole.shape[0],
                          whole.shape[1] * whole.shape[2], stabilizer, rescale, threads);
}

static int64_t linear_quotient(const py::object& r, const py::object& output, const py::object& bias,
                               const py::object& bound, float least, const py::object& s,
                               const py::object& dead, int threads) {
    const View whole = view(r), marks = view(dead);
    float* const pointers[] = {floats(r), floats(output), floats(bias), floats(bound), floats(s)};
    py::gil_scoped_release nogil;
    return in_use->linear_quotient(pointers[0], pointers[1], pointers[2], pointers[3], least,
                                   whole.shape[0] * whole.shape[1], whole.shape[2], pointers[4],
                                   static_cast<uint8_t*>(marks.data), threads);
}

static void linear_product(const py::object& x, const py::object& signed_sums, const py::object& abs_sums,
                           const py::object& out, int64_t count, int threads) {
    float* const pointers[] = {floats(x), floats(signed_sums), floats(abs_sums), floats(out)};
    py::gil_scoped_release nogil;
    in_use->linear_product(pointers[0], pointers[1], pointers[2], pointers[3], count, threads);
}

static bool matmul(const py::object& a, bool absolute_a, const py::object& b, bool absolute_b,
                   const py::object& out, int threads) {
    const View views[] = {view(a), view(b), view(out)};
    py::gil_scoped_release nogil;
    return in_use->matmul(views[0], absolute_a, views[1], absolute_b, views[2], threads < 1 ? 1 : threads);
}

static void relevance_attention(const py::tuple& tensors, const py::tuple& out, float scaling,
                                const py::tuple& window, bool additive_mask, bool normalize,
                                float stabilizer, const py::object& sums, int threads) {
    RelevanceArgs args;
    View* const views[] = {&args.q,      &args.k, &args.v,        &args.lse,
                           &args.grad_o, &args.s, &args.key_mask, &args.r};
    for (size_t index = 0; index < 8; ++index) *views[index] = view(tensors[index]);
    View* const results[] = {&args.r_q, &args.r_k, &args.r_v, &args.row_sums, &args.r_out};
    for (size_t index = 0; index < 5; ++index) *results[index] = view(out[index]);
    args.scaling = scaling;
    args.left = window[0].cast<int64_t>();
    args.right = window[1].cast<int64_t>();
    args.additive_mask = additive_mask;
    args.normalize = normalize;
    args.stabilizer = stabilizer;
    args.threads = threads < 1 ? 1 : threads;
    double* const to = static_cast<double*>(view(sums).data);
    py::gil_scoped_release nogil;
    in_use->relevance_attention(args, to);
}

static void relevance_tile(const py::tuple& tensors, int64_t first, float scaling, const py::tuple& window,
                           int threads) {
    RelevanceTile tile;
    View* const views[] = {&tile.dots, &tile.relevance, &tile.gradient, &tile.lse,
                           &tile.map,  &tile.key_mask,  &tile.rows};
    for (size_t index = 0; index < 7; ++index) *views[index] = view(tensors[index]);
    tile.first = first;
    tile.scaling = scaling;
    tile.left = window[0].cast<int64_t>();
    tile.right = window[1].cast<int64_t>();
    py::gil_scoped_release nogil;
    in_use->relevance_tile(tile, threads);
}

static void proximity(const py::object& alpha, const py::object& f, const py::object& y, const py::object& out,
                      int threads) {
    const View views[] = {view(alpha), view(f), view(y), view(out)};
    py::gil_scoped_release nogil;
    in_use->proximity(views[0], views[1], views[2], views[3], threads < 1 ? 1 : threads);
}

static void project(const py::object& t, const py::object& u, const py::object& out, int threads) {
    const View views[] = {view(t), view(u), view(out)};
    py::gil_scoped_release nogil;
    in_use->project(views[0], views[1], views[2], threads < 1 ? 1 : threads);
}

static void exp_of(const py::object& x, const py::object& out, int threads) {
    const int64_t count = view(x).shape[0];
    const float* const from = floats(x);
    float* const to = floats(out);
    py::gil_scoped_release nogil;
    in_use->exp(from, to, count, threads);
}

}  // namespace pyglobenc

PYBIND11_MODULE(_cpu, m) {
    using namespace pyglobenc;
    in_use = available().front();
    m.doc() = "CPU kernels; see pyglobenc/backends/cpu for the launchers.";
    m.def("free_kept", &free_kept, "Frees the block of memory that is kept for the next call.");
    m.def(
        "instruction_sets",
        [] {
            py::list names;
            for (const Kernels* kernels : available()) names.append(kernels->name);
            return names;
        },
        "Return the names of the instruction sets that this build and this machine have, fastest first.");
    m.def("instruction_set", [] { return in_use->name; }, "Return the name of the instruction set in use.");
    m.def("use", use, "Use the instruction set of this name.");
    m.def("pair_norms", pair_norms);
    m.def("rollout_step", rollout_step);
    m.def("head_gram", head_gram);
    m.def("norm_terms", norm_terms);
    m.def("clone_relevance", clone_relevance);
    m.def("add_relevance", add_relevance);
    m.def("linear_quotient", linear_quotient);
    m.def("linear_product", linear_product);
    m.def("matmul", matmul);
    m.def("relevance_attention", relevance_attention);
    m.def("relevance_tile", relevance_tile);
    m.def("proximity", proximity);
    m.def("project", project);
    m.def("exp", exp_of, py::arg("x"), py::arg("out"), py::arg("threads") = 1);
}
