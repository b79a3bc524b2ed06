// Finds races in the shared memory of emulated blocks. A race is when two threads use the same bytes, one of
// them writes, and no barrier lies between. Kernels compiled with -fsanitize=thread call a function at every
// access; races.cpp defines these functions. A vector clock records what each thread knows of the others
// (Flanagan and Freund, FastTrack, 2009).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace pyglobenc {
namespace emulated {

class Races {
public:
    // Forgets the previous block; a new one begins.
    void start(int threads, int bytes) {
        n_ = threads;
        clocks_.assign(size_t(threads) * threads, 0);
        for (int thread = 0; thread < threads; ++thread) clock(thread, thread) = 1;
        cells_.assign((bytes + CELL - 1) / CELL, Cell());
    }

    // Records that threads meet at a barrier. From then on, each knows what the others did before.
    void meet(const std::vector<int>& met) {
        std::vector<uint32_t> joined(n_, 0);
        for (const int thread : met)
            for (int other = 0; other < n_; ++other)
                joined[other] = std::max(joined[other], clock(thread, other));
        for (const int thread : met) {
            std::copy(joined.begin(), joined.end(), &clock(thread, 0));
            ++clock(thread, thread);
        }
    }

    // Records an access to bytes of shared memory. Returns the thread that it races with, or -1.
    int touch(int thread, size_t at, size_t bytes, bool write) {
        const size_t end = std::min((at + bytes + CELL - 1) / CELL, cells_.size());
        for (size_t index = at / CELL; index < end; ++index) {
            Cell& cell = cells_[index];
            if (unknown(thread, cell.written)) return cell.written.thread;
            if (write) {
                for (const Access& read : cell.reads)
                    if (unknown(thread, read)) return read.thread;
                cell.reads.clear();
                cell.written = {thread, clock(thread, thread)};
                continue;
            }
            // A thread that races with an earlier read also races with this one.
            const auto known = [&](const Access& read) { return !unknown(thread, read); };
            cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), known), cell.reads.end());
            cell.reads.push_back({thread, clock(thread, thread)});
        }
        return -1;
    }

private:
    static constexpr size_t CELL = 2;  // bytes; the smallest unit that two threads use separately

    struct Access {
        int thread = -1;
        uint32_t time = 0;
    };
    struct Cell {
        Access written;
        std::vector<Access> reads;  // since the last write
    };

    uint32_t& clock(int thread, int other) { return clocks_[size_t(thread) * n_ + other]; }
    bool unknown(int thread, const Access& access) {
        return access.thread >= 0 && access.thread != thread && access.time > clock(thread, access.thread);
    }

    int n_ = 0;
    std::vector<uint32_t> clocks_;
    std::vector<Cell> cells_;
};

}  // namespace emulated
}  // namespace pyglobenc
