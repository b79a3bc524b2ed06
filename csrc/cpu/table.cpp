// The table of one instruction set's functions, and whether this machine supports it.
#include "ops.h"
#include "tiles.h"

#if TILES && !defined(PYGLOBENC_EMULATE_TILES) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace pyglobenc {
namespace PYGLOBENC_ISA {

#if TILES
// Returns whether the processor has tile registers with products of bf16, and the system lets this process
// use them. Linux asks for a request, because the registers enlarge the state of each thread.
static bool tiles_permitted() {
#if defined(PYGLOBENC_EMULATE_TILES)
    return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (AMX_BF16 | AMX_TILE)) return false;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
#else
    return false;
#endif
}
#endif

static bool supported() {
#if TILES
    if (!tiles_permitted()) return false;
#endif
#if defined(__AVX512BF16__)
    if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return true;
#endif
}

}  // namespace PYGLOBENC_ISA

namespace isa = PYGLOBENC_ISA;

const Kernels JOIN(kernels_, PYGLOBENC_ISA) = {
    TEXT(PYGLOBENC_ISA),  isa::supported,      isa::pair_norms,      isa::rollout_step,
    isa::head_gram,       isa::norm_terms,     isa::clone_relevance, isa::add_relevance,
    isa::linear_quotient, isa::linear_product, isa::matmul, isa::relevance_attention, isa::relevance_tile,
    isa::proximity, isa::project, isa::exp,
};

}  // namespace pyglobenc
