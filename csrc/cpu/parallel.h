// Gives a kernel its scratch memory and the number of the current thread.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

// A second thread does not pay below this number of multiply-adds.
constexpr int64_t SERIAL = int64_t(1) << 20;

struct Memory {
    void* start;
    explicit Memory(int64_t bytes) : start(allocate(bytes)) {}
    ~Memory() { release(start); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    template <class T>
    T* as(int64_t offset = 0) const {
        return reinterpret_cast<T*>(static_cast<char*>(start) + offset);
    }
};

static inline int thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
