// The words of `src/cuda/device.cuh` on a processor: kernels run as C++, thread by thread, against the PTX ISA's definitions.
//
// A block's threads are fibers of one operating-system thread. Each runs until it comes to something collective — a barrier, a
// shuffle, an mma — and waits there for the others. What that proves and what it does not:
//
// - Fragment layouts, indices, masks, barriers that are missing between a write and a read in another warp: warps run in a random
//   order, one after the other from barrier to barrier, so a read that does not wait for a write mostly comes before it.
// - Shared memory is poisoned with NaN at the start of each block, and device allocations end at a page that cannot be touched.
// - An asynchronous copy happens at the wait for it and not before: a missing wait reads the poison.
// - Not: speed, registers, bank conflicts, races within a warp, the accuracy of approximate instructions.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define DEVICE inline
#define __restrict__ __restrict

using std::fabs;

struct uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};

namespace emulation {

struct Size {
    int x, y;
};
// Where the running fiber is.
struct Place {
    int thread, threads;
    Size block, grid;
    char *shared;
};
extern thread_local Place place;

// Runs `body` once in every thread of every block.
void run(Size grid, int threads, size_t shared, const std::function<void()> &body);

void block_barrier();
// Gives `size` bytes of every lane of the warp to all of them: lane i's are at `i * size` of what is returned, until the next exchange.
const char *gather(const void *mine, size_t size);

void copy_async(void *to, const void *from, bool there);
void copy_async_commit();
void copy_async_wait(int latest);

// Ends the process with a message that names the kernel's thread.
[[noreturn]] void fail(const char *what);

using Entry = void (*)(Size grid, int threads, size_t shared, const void *params);
struct Registration {
    Registration(const char *name, size_t size, int threads, Entry entry);
};

float f16_value(uint16_t bits);
uint16_t to_f16(float x);
uint16_t to_bf16(float x);
inline float bf16_value(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*value)(uint16_t));
void load_matrices(uint32_t (&r)[4], const void *row, bool transposed);

inline const void *aligned(const void *at, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("an access that is not aligned to its size");
    return at;
}

} // namespace emulation

#define KERNEL(name, Params, block_threads)                                                                                     \
    static void name##_body(const Params &p);                                                                                   \
    static void name##_entry(emulation::Size grid, int threads, size_t shared, const void *params) {                           \
        const Params &p = *static_cast<const Params *>(params);                                                                \
        emulation::run(grid, threads, shared, [&] { name##_body(p); });                                                        \
    }                                                                                                                           \
    static emulation::Registration name##_registration(#name, sizeof(Params), block_threads, name##_entry);                    \
    static void name##_body(const Params &p)

#define KERNEL_OF_BLOCKS(name, Params, block_threads, blocks) KERNEL(name, Params, block_threads)

DEVICE char *shared_memory() { return emulation::place.shared; }

DEVICE uint4 load16(const void *from) {
    uint4 x;
    memcpy(&x, emulation::aligned(from, 16), 16);
    return x;
}
DEVICE uint32_t load4(const void *from) {
    uint32_t x;
    memcpy(&x, emulation::aligned(from, 4), 4);
    return x;
}

DEVICE void copy_async(void *to, const void *from, bool there) { emulation::copy_async(to, from, there); }
DEVICE void copy_async_commit() { emulation::copy_async_commit(); }
template <int N> DEVICE void copy_async_wait() { emulation::copy_async_wait(N); }

DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulation::mma(c, a, b, emulation::bf16_value); }
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulation::mma(c, a, b, emulation::f16_value); }
DEVICE void load_matrices(uint32_t (&r)[4], const void *row) { emulation::load_matrices(r, row, false); }
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void *row) { emulation::load_matrices(r, row, true); }

DEVICE uint32_t pack_bf16(float low, float high) {
    return emulation::to_bf16(low) | static_cast<uint32_t>(emulation::to_bf16(high)) << 16;
}
DEVICE uint32_t pack_f16(float low, float high) {
    return emulation::to_f16(low) | static_cast<uint32_t>(emulation::to_f16(high)) << 16;
}
DEVICE float f16_value(uint16_t bits) { return emulation::f16_value(bits); }
DEVICE uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
    for (int half = 0; half < 2; half++) {
        auto value = [&](uint32_t x) { return static_cast<double>(emulation::bf16_value(static_cast<uint16_t>(x >> (16 * half)))); };
        float sum = static_cast<float>(value(a) * value(b) + value(c));
        d |= static_cast<uint32_t>(emulation::to_bf16(sum)) << (16 * half);
    }
    return d;
}
DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t d = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t which = (selector >> (4 * i)) & 7;
        d |= static_cast<uint32_t>((bytes >> (8 * which)) & 0xff) << (8 * i);
    }
    return d;
}

DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

template <class T> T exchange_of(T x, int mask) {
    int lane = emulation::place.thread % 32;
    const char *all = emulation::gather(&x, sizeof x);
    T other;
    memcpy(&other, all + static_cast<size_t>(lane ^ mask) * sizeof x, sizeof x);
    return other;
}
DEVICE float exchange(float x, int mask) { return exchange_of(x, mask); }
DEVICE int exchange(int x, int mask) { return exchange_of(x, mask); }
DEVICE uint64_t exchange(uint64_t x, int mask) { return exchange_of(x, mask); }
DEVICE uint32_t vote(bool x) {
    const char *all = emulation::gather(&x, 1);
    uint32_t votes = 0;
    for (int i = 0; i < 32; i++) votes |= static_cast<uint32_t>(all[i] != 0) << i;
    return votes;
}
DEVICE int count_bits(uint32_t x) { return __builtin_popcount(x); }
DEVICE void warp_barrier() {
    char nothing = 0;
    emulation::gather(&nothing, 1);
}
DEVICE void block_barrier() { emulation::block_barrier(); }
// No two fibers run at once.
DEVICE void count_up(int *counter) { *counter += 1; }
DEVICE uint32_t add_up(uint32_t *sum, uint32_t x) {
    uint32_t before = *sum;
    *sum += x;
    return before;
}

// Compiled without contractions: see build.rs.
DEVICE float product(float a, float b) { return a * b; }

DEVICE float power_of_two(float x) { return exp2f(x); }

DEVICE int thread() { return emulation::place.thread; }
DEVICE int threads() { return emulation::place.threads; }
DEVICE int block_x() { return emulation::place.block.x; }
DEVICE int block_y() { return emulation::place.block.y; }
DEVICE int blocks_x() { return emulation::place.grid.x; }
DEVICE int blocks_y() { return emulation::place.grid.y; }
DEVICE float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
DEVICE uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
