// Quantised weights as bf16, for a library that multiplies those faster: what tensor cores are given is the same.
#include "formats.cuh"

constexpr int EXPAND_THREADS = 256;

struct Expand {
    Weights w;
    // [rows, cols]
    uint16_t *out;
    // Of the matrix's rows, the first, and how many: fewer than 2^31 elements.
    int first, rows;
};

// A warp takes 32 runs that follow each other, a lane one of them; they go through shared memory, so that a warp stores 512 bytes at a time. Chunks
// of 16 bytes change places there, so that eight lanes' are in different banks.
template <class F> DEVICE void expand_rows(const Expand &p) {
    constexpr int CHUNKS = F::RUN / 8;
    uint4 *mine = reinterpret_cast<uint4 *>(shared_memory()) + warp() * 32 * CHUNKS;
    uint4 *out = reinterpret_cast<uint4 *>(p.out);
    int runs = p.w.cols / F::RUN, all = runs * p.rows;
    for (int begin = block_x() * EXPAND_THREADS + 32 * warp(); begin < all; begin += blocks_x() * EXPAND_THREADS) {
        int at = begin + lane();
        if (at < all) {
            Run run;
            int row = at / runs;
            F::load(p.w, static_cast<size_t>(p.first + row), (at - row * runs) * F::RUN, run);
            uint32_t pairs[F::RUN / 2];
            F::expand(run, pairs);
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                mine[lane() * CHUNKS + (c ^ (lane() * CHUNKS / 8 & (CHUNKS - 1)))] = uint4{pairs[4 * c], pairs[4 * c + 1], pairs[4 * c + 2], pairs[4 * c + 3]};
            }
        }
        warp_barrier();
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            int chunk = 32 * i + lane(), of = chunk / CHUNKS;
            if (begin + of < all) {
                out[static_cast<size_t>(begin) * CHUNKS + static_cast<size_t>(chunk)] = mine[of * CHUNKS + (chunk % CHUNKS ^ (of * CHUNKS / 8 & (CHUNKS - 1)))];
            }
        }
        warp_barrier();
    }
}

#define EXPAND(format, name)                                                                                                    \
    KERNEL(expand_##name, Expand, EXPAND_THREADS) { expand_rows<format>(p); }

EXPAND(Q4_0, q4_0)
EXPAND(Q5_1, q5_1)
EXPAND(Q4_K, q4_k)
EXPAND(Q8_0, q8_0)
EXPAND(Int4, int4)
EXPAND(Int8, int8)
EXPAND(Fp8, fp8)
