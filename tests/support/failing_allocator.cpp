// Replaces the allocators of glibc and lets the n-th allocation of one library fail. It is preloaded into a
// process, see failing_allocations.py.
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <new>

extern "C" void* __libc_malloc(size_t size);
extern "C" void* __libc_memalign(size_t alignment, size_t size);

static std::atomic<uintptr_t> low{0}, high{0};
static std::atomic<long> left{0}, failed{0};

// The n-th allocation that code in [from, to) asks for fails; none for n = 0.
extern "C" void arm(uintptr_t from, uintptr_t to, long n) {
    low = from;
    high = to;
    failed = 0;
    left = n;
}

extern "C" long has_failed() { return failed; }

static bool fails(void* caller) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(caller);
    if (left <= 0 || at < low || at >= high || left.fetch_sub(1) != 1) return false;
    failed = 1;
    errno = ENOMEM;
    return true;
}

extern "C" void* malloc(size_t size) {
    return fails(__builtin_return_address(0)) ? nullptr : __libc_malloc(size);
}

extern "C" void* aligned_alloc(size_t alignment, size_t size) {
    return fails(__builtin_return_address(0)) ? nullptr : __libc_memalign(alignment, size);
}

extern "C" int posix_memalign(void** out, size_t alignment, size_t size) {
    if (fails(__builtin_return_address(0))) return ENOMEM;
    *out = __libc_memalign(alignment, size);
    return *out ? 0 : ENOMEM;
}

void* operator new(size_t size) {
    void* memory = fails(__builtin_return_address(0)) ? nullptr : __libc_malloc(size ? size : 1);
    if (!memory) throw std::bad_alloc();
    return memory;
}
