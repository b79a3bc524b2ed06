// matmul: multiplies two float32 matrices on the tile registers, as accurately as float32.
//
// Both matrices are split into bf16 parts, and a product of two floats is the sum of up to six products of
// their parts (csrc/cpu/tiles.h). The rows of the left matrix are packed once. Then each thread packs one
// panel of columns of the right matrix, some rows at a time, and multiplies all rows of the left one by it.
#include <atomic>

#include "ops.h"
#include "pack.h"
#include "parallel.h"

namespace pyglobenc {
namespace PYGLOBENC_ISA {

#if TILES

constexpr int64_t CELL = TILE * TILE;  // 32-bit words of a tile
constexpr int64_t SUM = 2 * TILE;      // terms that one tile holds of a sum
// Tiles along the sum that are multiplied before the next columns. A right matrix of bf16 has one part.
constexpr int64_t DEPTH = 4, BF16_DEPTH = 12;
// The most rows that are packed at a time, and the most columns of a panel.
constexpr int64_t MAX_ROWS = 1024, MAX_PANEL = 128;
constexpr int MAX_PARTS = 3;
static_assert(DEPTH * MAX_PARTS == BF16_DEPTH);
// The bits of the smallest and of the largest power of two that a column's largest entry may have. Parts
// below float32's smallest normal number would count as 0, and sums of larger numbers could overflow.
constexpr int32_t LEAST = (127 - 100) << 23, MOST = (127 + 100) << 23;

// Loads up to W contiguous numbers as floats; the remaining lanes are 0. Fewer than W are rare.
__attribute__((noinline)) static Floats load_few(const View& x, int64_t first, int64_t count) {
    return count > 0 ? load_some(x, first, count) : Floats{};
}

static inline Floats some(const View& x, int64_t first, int64_t count, bool absolute) {
    const Floats out = count >= W ? load_some(x, first, W) : load_few(x, first, count);
    return absolute ? magnitude(out) : out;
}

// Fetches numbers into the caches. A panel's rows lie far apart, which the processor does not foresee.
static inline void fetch(const View& x, int64_t first) {
    const int64_t size = x.type == Type::f32 ? 4 : 2;
    __builtin_prefetch(static_cast<const char*>(x.data) + first * size);
}

// Returns the number of parts that hold anything but 0. rest holds the bits of the second and third part.
static inline int parts_in(const Ints rest[2]) {
    int out = 1;
    for (int p = 0; p < 2; ++p)
        for (int l = 0; l < W; ++l)
            if (rest[p][l] & 0x7fffffff) out = p + 2;
    return out;
}

// The left matrix [rows, sum], or some of its rows.
struct Left {
    const View& x;
    bool absolute;
    int64_t first, rows;  // the rows first to first + rows - 1
    int64_t steps() const { return (x.shape[1] + SUM - 1) / SUM; }
    // A pair of tiles of rows is multiplied at a time.
    int64_t tiles() const { return (rows + 2 * TILE - 1) / (2 * TILE) * 2; }
    int64_t tile_size() const { return steps() * MAX_PARTS * CELL; }
};

// Packs a tile of rows to out [steps, MAX_PARTS, TILE, TILE]. Each row is scaled by a power of two so that its
// largest entry is about 1, and `back` [TILE] undoes this. Returns the number of parts, or 0 if a row has
// entries that are not finite or not normal.
static int pack_left(const Left& left, int64_t tile, float* out, float* back) {
    const int64_t width = left.x.shape[1];
    Ints found[2] = {};
    for (int64_t r = 0; r < TILE; ++r) {
        const int64_t row = tile * TILE + r, first = (left.first + row) * left.x.stride[0];
        const int64_t count = row < left.rows ? width : 0;
        Ints top = {};
        for (int64_t c = 0; c < count; c += W) {
            const Ints bits = magnitude_bits(some(left.x, first + c, width - c, false));
            top = bits > top ? bits : top;
        }
        int32_t largest = 0;
        for (int l = 0; l < W; ++l) largest = top[l] > largest ? top[l] : largest;
        const int32_t exponent = largest ? largest >> 23 : 127;
        if (exponent == 0 || exponent > 252) return 0;
        float scale;
        const int32_t up = (254 - exponent) << 23, down = exponent << 23;
        std::memcpy(&scale, &up, sizeof scale);
        std::memcpy(back + r, &down, sizeof scale);
        for (int64_t c = 0; c < left.steps() * SUM; c += W) {
            Floats rest = some(left.x, first + c, count - c, left.absolute) * scale;
            float* const to = out + c / SUM * MAX_PARTS * CELL + r * TILE + c % SUM / 2;
            for (int p = 0; p < MAX_PARTS; ++p) {
                const Ints part = take_part(rest);
                if (p) found[p - 1] |= part;
                const Halves words = __builtin_convertvector(part >> 16, Halves);
                std::memcpy(to + p * CELL, &words, sizeof words);
            }
        }
    }
    return parts_in(found);
}

// A panel of columns of the right matrix [sum, columns], whose rows or columns are contiguous.
struct Right {
    const View& x;
    bool absolute;
    int64_t first, columns;  // the columns first to first + columns - 1
    int64_t tiles() const { return (columns + 2 * TILE - 1) / (2 * TILE) * 2; }
    int parts() const { return x.type == Type::bf16 ? 1 : MAX_PARTS; }
    int64_t depth() const { return x.type == Type::bf16 ? BF16_DEPTH : DEPTH; }
    int64_t step_size() const { return parts() * tiles() * CELL; }
};

// Packs `steps` tiles of the sum, from number `step` on, to out [steps, parts, tiles, TILE, TILE]. Word
// (c, n) of a tile holds rows 2 c and 2 c + 1 of column n. Returns the number of parts. top [columns rounded
// up] keeps the largest entry of each column, as bits.
static int pack_right(const Right& right, int64_t step, int64_t steps, float* out, Ints* top) {
    const View& x = right.x;
    const int64_t sum = x.shape[0], tiles = right.tiles();
    const int most = right.parts();
    Ints found[2] = {};
    for (int64_t s = 0; s < steps; ++s, out += right.step_size()) {
        const int64_t k = (step + s) * SUM;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t n = right.first + t * TILE, count = right.first + right.columns - n;
            float* const tile = out + t * CELL;
            if (x.stride[1] == 1) {
                for (int64_t c = 0; c < TILE; ++c) {
                    const int64_t row = k + 2 * c;
                    if (row + SUM + 1 < sum) {
                        fetch(x, (row + SUM) * x.stride[0] + n);
                        fetch(x, (row + SUM + 1) * x.stride[0] + n);
                    }
                    Floats even = some(x, row * x.stride[0] + n, row < sum ? count : 0, right.absolute),
                           odd = some(x, (row + 1) * x.stride[0] + n, row + 1 < sum ? count : 0,
                                      right.absolute);
                    Ints bits = magnitude_bits(even);
                    top[t] = bits > top[t] ? bits : top[t];
                    bits = magnitude_bits(odd);
                    top[t] = bits > top[t] ? bits : top[t];
                    for (int p = 0; p < most; ++p) {
                        const Ints low = take_part(even), high = take_part(odd);
                        if (p) found[p - 1] |= low | high;
                        store(tile + p * tiles * CELL + c * TILE,
                              reinterpret_cast<Floats>((low >> 16 & 0xffff) | high));
                    }
                }
                continue;
            }
            const bool last = t + 1 == tiles;
            const int64_t next = last ? right.first : n + TILE, from = last ? k + SUM : k;
            for (int64_t l = 0; l < TILE && next + l < x.shape[1] && from + W < sum; ++l) {
                fetch(x, (next + l) * x.stride[1] + from);
                fetch(x, (next + l) * x.stride[1] + from + W);
            }
            Floats words[MAX_PARTS][TILE] = {};
            Ints columns[TILE] = {};
            for (int64_t l = 0; l < TILE && l < count; ++l)
                for (int half = 0; half < 2; ++half) {
                    const int64_t row = k + half * W;
                    Floats rest = some(x, (n + l) * x.stride[1] + row, sum - row, right.absolute);
                    const Ints bits = magnitude_bits(rest);
                    columns[l] = bits > columns[l] ? bits : columns[l];
                    for (int p = 0; p < most; ++p) {
                        const Ints part = take_part(rest);
                        if (p) found[p - 1] |= part;
                        const Halves halves = __builtin_convertvector(part >> 16, Halves);
                        std::memcpy(reinterpret_cast<uint16_t*>(&words[p][l]) + half * W, &halves,
                                    sizeof halves);
                    }
                }
            for (int p = 0; p < most; ++p) {
                transpose(words[p]);
                for (int64_t c = 0; c < TILE; ++c) store(tile + p * tiles * CELL + c * TILE, words[p][c]);
            }
            // The columns' maxima, lane by lane.
            Floats* const lanes = reinterpret_cast<Floats*>(columns);
            transpose(lanes);
            for (int64_t c = 0; c < TILE; ++c) top[t] = columns[c] > top[t] ? columns[c] : top[t];
        }
    }
    return parts_in(found);
}

// Adds the product of two tiles of rows and two tiles of columns to sums, four tiles. LP and RP are the
// numbers of parts. Products of parts a and b with a + b > 2 are left out. In this order, few tiles are loaded
// twice.
template <int LP, int RP>
__attribute__((noinline)) static void multiply(const float* left,  // [2 rows, steps, MAX_PARTS] of tiles
                                               int64_t left_tile,
                                               const float* right,  // [steps, parts, columns] tiles
                                               int64_t right_step, int64_t right_part, int64_t steps,
                                               bool first, float* sums, int64_t down) {
    // The intrinsics do not tell the compiler that they read memory.
    asm volatile("" ::: "memory");
    if (first) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    } else {
        TILE_LOAD(0, sums, 4 * TILE);
        TILE_LOAD(1, sums + CELL, 4 * TILE);
        TILE_LOAD(2, sums + down, 4 * TILE);
        TILE_LOAD(3, sums + down + CELL, 4 * TILE);
    }
    for (; steps; --steps, left += MAX_PARTS * CELL, right += right_step) {
        const auto rows = [=](int part) __attribute__((always_inline)) {
            TILE_LOAD(4, left + part * CELL, 4 * TILE);
            TILE_LOAD(5, left + part * CELL + left_tile, 4 * TILE);
        };
        const auto columns = [=](int part) __attribute__((always_inline)) {
            TILE_LOAD(6, right + part * right_part, 4 * TILE);
            TILE_LOAD(7, right + part * right_part + CELL, 4 * TILE);
        };
        const auto product = []() __attribute__((always_inline)) {
            TILE_MULTIPLY(0, 4, 6);
            TILE_MULTIPLY(1, 4, 7);
            TILE_MULTIPLY(2, 5, 6);
            TILE_MULTIPLY(3, 5, 7);
        };
        rows(0);
        if constexpr (RP > 1) {
            columns(2), product();
            columns(0), product();
            columns(1), product();
            if constexpr (LP > 1) rows(1), product();
        }
        if constexpr (RP == 1 || LP > 1) columns(0);
        if constexpr (RP == 1) product();
        if constexpr (RP == 1 && LP > 1) rows(1);
        if constexpr (LP > 1) {
            product();
            rows(2), product();
        }
    }
    TILE_STORE(0, sums, 4 * TILE);
    TILE_STORE(1, sums + CELL, 4 * TILE);
    TILE_STORE(2, sums + down, 4 * TILE);
    TILE_STORE(3, sums + down + CELL, 4 * TILE);
}

// Multiplies all rows by one panel of columns, into sums [tiles of rows, tiles of columns, TILE, TILE]. right is
// scratch memory. Returns false if a column's entries are too small, too large or not finite.
static bool multiply_panel(const Left& left, const float* packed, int left_parts, const Right& columns,
                           float* right, float* sums) {
    const int64_t tiles = columns.tiles();
    Ints top[MAX_PANEL / TILE] = {};
    for (int64_t step = 0; step < left.steps(); step += columns.depth()) {
        const int64_t rest = left.steps() - step, count = rest < columns.depth() ? rest : columns.depth();
        const int right_parts = pack_right(columns, step, count, right, top);
        const auto add = left_parts > 1 ? right_parts > 1 ? multiply<3, 3> : multiply<3, 1>
                         : right_parts > 1 ? multiply<1, 3>
                                           : multiply<1, 1>;
        for (int64_t row = 0; row < left.tiles(); row += 2)
            for (int64_t column = 0; column < tiles; column += 2)
                add(packed + row * left.tile_size() + step * MAX_PARTS * CELL, left.tile_size(),
                    right + column * CELL, columns.step_size(), tiles * CELL, count, step == 0,
                    sums + (row * tiles + column) * CELL, tiles * CELL);
    }
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int l = 0; l < W; ++l)
            if (top[tile][l] && (top[tile][l] < LEAST || top[tile][l] > MOST)) return false;
    return true;
}

// Writes the sums of a panel, times the rows' factors `back`, to out, whose rows lie `width` apart.
static void write_panel(const Left& left, const float* back, const Right& columns, const float* sums,
                        int64_t width, float* out) {
    for (int64_t row = 0; row < left.rows; ++row)
        for (int64_t n = 0; n < columns.columns; n += TILE) {
            const int64_t tile = row / TILE * columns.tiles() + n / TILE, lanes = columns.columns - n;
            const Floats scaled = load(sums + tile * CELL + row % TILE * TILE) * back[row];
            store_some(out + row * width + n, scaled, lanes);
        }
}

bool matmul(const View& a, bool absolute_a, const View& b, bool absolute_b, const View& out, int threads) {
    const int64_t rows = a.shape[0], width = b.shape[1], share = width / (2 * threads) / 32 * 32,
                  panel = share < 32 ? 32 : share < MAX_PANEL ? share : MAX_PANEL,
                  panels = (width + panel - 1) / panel;
    const Left largest{a, absolute_a, 0, rows < MAX_ROWS ? rows : MAX_ROWS};
    const int64_t left_size = largest.tiles() * largest.tile_size(), scales = aligned(largest.tiles() * TILE),
                  right_size = BF16_DEPTH * (panel / TILE) * CELL,
                  sums_size = largest.tiles() * (panel / TILE) * CELL;
    if (rows * a.shape[1] * width == 0) return false;
    const Memory memory(4 * (left_size + scales + threads * (right_size + sums_size)));
    float* const packed = memory.as<float>();
    float* const back = packed + left_size;
    float* const scratch = back + scales;
    std::atomic<bool> fits{true};
    for (int64_t start = 0; start < rows && fits; start += MAX_ROWS) {
        const Left left{a, absolute_a, start, rows - start < MAX_ROWS ? rows - start : MAX_ROWS};
        std::atomic<int> parts{1};
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            [[maybe_unused]] const TileRegisters registers;
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < left.tiles(); ++tile) {
                const int here =
                    pack_left(left, tile, packed + tile * left.tile_size(), back + tile * TILE);
                if (!here) fits = false;
                for (int now = parts; now < here && !parts.compare_exchange_weak(now, here);) {
                }
            }
            float* const right = scratch + thread() * (right_size + sums_size);
            float* const sums = right + right_size;
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < out.shape[0] * panels; ++item) {
                if (!fits) continue;
                const int64_t copy = item / panels, first = item % panels * panel, rest = width - first;
                const Right columns{b, absolute_b || copy, first, rest < panel ? rest : panel};
                if (!multiply_panel(left, packed, parts, columns, right, sums)) fits = false;
                write_panel(left, back, columns, sums, width,
                            static_cast<float*>(out.data) + (copy * rows + start) * width + first);
            }
        }
    }
    return fits;
}

#else

// Without tile registers, torch's products are as fast.
bool matmul(const View&, bool, const View&, bool, const View&, int) { return false; }

#endif

}  // namespace PYGLOBENC_ISA
}  // namespace pyglobenc
