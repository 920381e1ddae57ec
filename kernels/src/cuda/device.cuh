// What kernels are made of: the few instructions that C++ has no words for, each as a small inline function.
//
// Every one of them has two bodies: PTX here, and plain C++ in `kernels/cuda-emulation/emulation.h`, with which the same kernels
// run on a processor, thread by thread. The fragment layouts of mma and ldmatrix are the PTX ISA's ("Matrix multiply-accumulate
// operation using mma instruction", m16n8k16); the emulation is written from its tables and not from the kernels.
//
// 16-bit floats are kept as bits (`uint16_t`, or two in a `uint32_t`, the first in the low half).
#pragma once

#ifdef QUIRE_EMULATION
#include "emulation.h"
#else

#include <stdint.h>

#define DEVICE __device__ __forceinline__

// Waits until what is ahead in the stream is done and can be seen, and lets what comes next begin to do so: a kernel that was launched to overlap the one before
// it may be there early, and may read and write nothing before (`driver.rs`). Otherwise, and before Hopper, there is nothing to wait for.
DEVICE void take_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A kernel takes one struct of parameters by value, which the host mirrors (`params.rs`). `threads` is its block size. Its first act is to take its turn.
#define KERNEL_OF(name, Params, bounds)                                                                                         \
    DEVICE void name##_body(const Params &p);                                                                                   \
    extern "C" __global__ void bounds name(const __grid_constant__ Params p) {                                                  \
        take_turn();                                                                                                            \
        name##_body(p);                                                                                                         \
    }                                                                                                                           \
    DEVICE void name##_body(const Params &p)
#define KERNEL(name, Params, threads) KERNEL_OF(name, Params, __launch_bounds__(threads))

// As KERNEL, with registers for so many `blocks` on a multiprocessor: without being told, the compiler may keep a few bytes in memory for the sake of one more,
// for which there is no shared memory; or take registers that a second block lacks.
#define KERNEL_OF_BLOCKS(name, Params, threads, blocks) KERNEL_OF(name, Params, __launch_bounds__(threads, blocks))

// The block's dynamic shared memory.
DEVICE char *shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

DEVICE uint4 load16(const void *from) { return __ldg(reinterpret_cast<const uint4 *>(from)); }
DEVICE uint32_t load4(const void *from) { return __ldg(reinterpret_cast<const uint32_t *>(from)); }

DEVICE uint32_t shared_address(const void *at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// Copies 16 bytes to shared memory while the thread goes on; zeroes instead where they are not `there`.
DEVICE void copy_async(void *to, const void *from, bool there) {
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all of this thread's copies but those of the latest `N` groups. Other threads see them after a barrier.
template <int N> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// c += a · b. a: 16 × 16 by row, b: 16 × 8 by column, both bf16; c: 16 × 8 f32.
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// As mma_bf16, of f16.
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 × 8 matrices of 16-bit elements from shared memory; lane i names row i % 8 of matrix i / 8.
DEVICE void load_matrices(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// As load_matrices, each transposed.
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Two floats, rounded to nearest even, the first in the low half.
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE uint32_t pack_f16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE float f16_value(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
// a · b + c of two bf16 each, rounded once.
DEVICE uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// Four bytes out of the eight of `low` and `high`: digit i of `selector` says which is byte i.
DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) { return __byte_perm(low, high, selector); }

// The high half of a · b.
DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

DEVICE float exchange(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE int exchange(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE uint64_t exchange(uint64_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE uint32_t vote(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE int count_bits(uint32_t x) { return __popc(x); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void count_up(int *counter) { atomicAdd(counter, 1); }
// What was there before.
DEVICE uint32_t add_up(uint32_t *sum, uint32_t x) { return atomicAdd(sum, x); }

// a · b, rounded, whatever it is added to.
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }

// 2^x, as fast as the hardware has it (2 ulp).
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE int thread() { return threadIdx.x; }
DEVICE int threads() { return blockDim.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int blocks_x() { return gridDim.x; }
DEVICE int blocks_y() { return gridDim.y; }
DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }

#endif

DEVICE int lane() { return thread() % 32; }
DEVICE int warp() { return thread() / 32; }

DEVICE float bf16_value(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }
DEVICE float low_bf16(uint32_t pair) { return float_of_bits(pair << 16); }
DEVICE float high_bf16(uint32_t pair) { return float_of_bits(pair & 0xffff0000u); }
DEVICE uint16_t to_bf16(float x) { return static_cast<uint16_t>(pack_bf16(x, 0.0f)); }
DEVICE uint16_t to_f16(float x) { return static_cast<uint16_t>(pack_f16(x, 0.0f)); }

// Sums and maxima of a warp, in the same order in every lane.
DEVICE float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += exchange(x, mask);
    return x;
}
DEVICE float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, exchange(x, mask));
    return x;
}

// The sum over a block of at most 1024 threads, in a fixed order; every thread gets it. `memory`: 32 floats that nobody else uses meanwhile.
DEVICE float block_sum(float x, float *memory) {
    x = warp_sum(x);
    if (lane() == 0) memory[warp()] = x;
    block_barrier();
    float total = 0.0f;
    for (int i = 0; i < threads() / 32; i++) total += memory[i];
    block_barrier();
    return total;
}
