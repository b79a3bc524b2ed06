// Runs a block of threads on the CPU. Each thread is a fiber, which runs until it must wait for others at a
// barrier or at a function of its whole warp.
//
// Behaviour that a GPU leaves undefined becomes an error here. Shared memory that was not written, and bytes
// that are still being copied, hold NaN. Each warp runs as far as it can before the next one starts, and
// tests can reverse the order. Races for shared memory are reported, and so are threads that wait for others
// that have ended.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

namespace pyglobenc {
namespace emulated {

// A place where threads wait for one another. `what` names the instruction that all of them must have
// reached.
struct Gate {
    std::vector<int> arrived;  // threads
    int64_t generation = 0;
    const char* what = nullptr;
};

struct Warp {
    Gate gate;
    // The values that the lanes exchange. Two buffers take turns, because a fast lane may already write its
    // next value while others still read this one.
    alignas(16) char exchanged[2][32][32];
};

struct Copy {
    void* to;
    const void* from;  // null for a copy of zeros
    int bytes;
};

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    jmp_buf state;
    bool begun, done;
    Gate* gate;
    int64_t generation;
    std::deque<std::vector<Copy>> copies;  // the last group is not yet committed
};

struct Launch {
    int64_t blocks;
    int threads, bytes;  // of shared memory
};

struct Machine {
    static constexpr size_t STACK = 256 * 1024;
    static constexpr size_t GUARD = 1024;

    // Tests set these. With `reversed`, the last warps and their last lanes run first.
    bool reversed = false;
    int shared_limit = 227 * 1024, processors = 2;
    std::vector<Launch> launches;

    int block = 0, threads = 0, thread = 0;
    char* shared = nullptr;
    size_t shared_bytes = 0;  // 0 unless a block runs
    Races races;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Gate gates[16];
    std::function<void()> body;
    std::string error;
    jmp_buf scheduler;
};

inline Machine machine;

// longjmp is used because swapcontext makes a system call for the signal mask every time.
__attribute__((noinline)) inline void leave() {
    if (!_setjmp(machine.fibers[machine.thread].state)) _longjmp(machine.scheduler, 1);
}

inline void fail(const std::string& error) {
    machine.error =
        error + ", thread " + std::to_string(machine.thread) + " of block " + std::to_string(machine.block);
    leave();
}

// Waits until `count` threads have reached the gate. With `orders`, each of them then sees what the others
// wrote before.
inline void arrive(Gate& gate, int count, const char* what, bool orders) {
    if (!gate.arrived.empty() && gate.what != what)
        fail(std::string("threads meet at ") + gate.what + " and " + what);
    gate.what = what;
    gate.arrived.push_back(machine.thread);
    if (int(gate.arrived.size()) == count) {
        if (orders) machine.races.meet(gate.arrived);
        gate.arrived.clear();
        ++gate.generation;
        return;
    }
    Fiber& fiber = machine.fibers[machine.thread];
    fiber.gate = &gate;
    fiber.generation = gate.generation;
    leave();
}

// Records that the current thread reads or writes memory. Fails if another thread may use the same shared
// memory at that time and one of the two writes.
inline void touch(const void* at, size_t bytes, bool write) {
    const size_t offset = size_t(static_cast<const char*>(at) - machine.shared);
    if (offset >= machine.shared_bytes) return;
    const int other = machine.races.touch(machine.thread, offset, bytes, write);
    if (other >= 0)
        fail("race with thread " + std::to_string(other) + " at byte " + std::to_string(offset) +
             " of shared memory");
}

// Passes x to the other lanes of the warp. Returns the address of lane 0's value; the value of lane l lies
// 32 l bytes further.
template <class V>
const char* exchange(const V& x, const char* what, bool orders = false) {
    static_assert(sizeof(V) <= 32, "a lane hands over at most 32 bytes");
    Warp& warp = machine.warps[machine.thread / 32];
    auto& slots = warp.exchanged[warp.gate.generation % 2];
    std::memcpy(slots[machine.thread % 32], &x, sizeof x);
    arrive(warp.gate, 32, what, orders);
    return slots[0];
}

template <class V>
V taken(const char* slots, int lane) {
    V out;
    std::memcpy(&out, slots + 32 * lane, sizeof out);
    return out;
}

inline void enter() {
    machine.body();
    Fiber& fiber = machine.fibers[machine.thread];
    for (const auto& group : fiber.copies)
        if (!group.empty()) machine.error = "a thread ended with copies that it never waited for";
    fiber.done = true;
    _longjmp(machine.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
    if (_setjmp(machine.scheduler)) return;
    if (fiber.begun) _longjmp(fiber.state, 1);
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Machine::STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
}

// Runs a warp until all its threads wait. Returns whether any of them advanced. Subtracts the threads that
// end from `left`.
inline bool run_warp(int warp, int& left) {
    bool any = false;
    for (bool moved = true; moved; any |= moved) {
        moved = false;
        for (int step = 0; step < 32; ++step) {
            machine.thread = 32 * warp + (machine.reversed ? 31 - step : step);
            Fiber& fiber = machine.fibers[machine.thread];
            if (fiber.done || (fiber.gate && fiber.gate->generation == fiber.generation)) continue;
            fiber.gate = nullptr;
            resume(fiber);
            if (!machine.error.empty()) throw std::runtime_error("emulated kernel: " + machine.error);
            moved = true;
            left -= fiber.done;
        }
    }
    return any;
}

inline void run_block() {
    const int warps = machine.threads / 32;
    for (int left = machine.threads; left;) {
        bool moved = false;
        for (int step = 0; step < warps; ++step)
            moved |= run_warp(machine.reversed ? warps - 1 - step : step, left);
        if (!moved) throw std::runtime_error("emulated kernel: threads wait for others that never come");
    }
}

// Runs a whole grid: calls body() in every thread of every block, one block after the other.
inline void run(int64_t blocks, int threads, int shared, std::function<void()> body) {
    Machine& m = machine;
    if (threads < 32 || threads % 32 || threads > 1024)
        throw std::runtime_error("emulated kernel: blocks are whole warps, up to 32");
    if (blocks < 1 || blocks > INT32_MAX)
        throw std::runtime_error("emulated kernel: a grid of " + std::to_string(blocks) + " blocks");
    if (shared > m.shared_limit)
        throw std::runtime_error("emulated kernel: more shared memory than a block may have");
    m.launches.push_back({blocks, threads, shared});
    const auto release = [](char* at) {
        machine.shared_bytes = 0;
        std::free(at);
    };
    const size_t room = (shared + 127) / 128 * 128 + Machine::GUARD;
    std::unique_ptr<char, void (*)(char*)> memory(static_cast<char*>(std::aligned_alloc(128, room)), release);
    if (!memory) throw std::bad_alloc();
    m.shared = memory.get();
    m.shared_bytes = size_t(shared);
    m.body = body;
    m.threads = threads;
    m.fibers.resize(std::max(m.fibers.size(), size_t(threads)));
    for (m.block = 0; m.block < blocks; ++m.block) {
        std::memset(m.shared, 0xff, size_t(shared) + Machine::GUARD);
        m.races.start(threads, shared);
        m.warps.assign(threads / 32, Warp());
        for (Gate& gate : m.gates) gate = Gate();
        m.error.clear();
        for (int thread = 0; thread < threads; ++thread) {
            Fiber& fiber = m.fibers[thread];
            if (!fiber.stack) fiber.stack.reset(new char[Machine::STACK]);
            fiber.begun = fiber.done = false;
            fiber.gate = nullptr;
            fiber.copies.assign(1, {});
        }
        run_block();
        for (size_t at = 0; at < Machine::GUARD; ++at)
            if (m.shared[shared + at] != char(0xff))
                throw std::runtime_error("emulated kernel: wrote past its shared memory");
    }
}

}  // namespace emulated
}  // namespace pyglobenc
