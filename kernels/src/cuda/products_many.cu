// Products with many rows of activations: bound by the tensor cores.
//
// A block makes 128 output features for ROWS rows, 64 of k at a time. Activations are copied to shared memory asynchronously; weights are
// loaded to registers, expanded to bf16 there and stored to shared memory; both for the next 64 while these are multiplied. Rows of shared memory
// are 128 bytes, in which the 16-byte chunks of row r change places by r % 8, so that eight rows' chunks are in different banks.
//
// Where features and rows make fewer blocks than a GPU has room for, k is divided among more of them, and `add_parts` adds their sums up.
#include "formats.cuh"

constexpr int MANY_THREADS = 256;
constexpr int MANY_FEATURES = 128;
constexpr int MANY_K = 64;

// Where chunk `chunk` of a row of 64 elements is, in elements.
DEVICE int swizzled(int row, int chunk) { return row * MANY_K + (chunk ^ (row & 7)) * 8; }

template <class F, int ROWS> struct Many {
    static constexpr int RUNS = MANY_K / F::RUN;
    // Runs of the weights that a thread brings.
    static constexpr int MINE = MANY_FEATURES * RUNS / MANY_THREADS;
    // Warps stand 4 along features and 2 along rows.
    static constexpr int TILES = ROWS / 16;

    // `end`: of the columns of the block's split, here and below.
    static DEVICE void load_weights(const Product &p, const Part &part, int k0, int end, Run (&runs)[MINE]) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int at = thread() + i * MANY_THREADS;
            int feature = block_x() * MANY_FEATURES + at / RUNS, k = k0 + at % RUNS * F::RUN;
            runs[i].quants = uint4{0, 0, 0, 0};
            runs[i].scale = runs[i].minimum = 0.0f;
            runs[i].more = 0;
            if (feature < p.features && k < end) F::load(p.w, part.matrix_row + static_cast<size_t>(feature), k, runs[i]);
        }
    }

    static DEVICE void store_weights(const Run (&runs)[MINE], uint16_t *shared) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int at = thread() + i * MANY_THREADS;
            int row = at / RUNS, chunk = at % RUNS * (F::RUN / 8);
            uint32_t pairs[F::RUN / 2];
            F::expand(runs[i], pairs);
#pragma unroll
            for (int c = 0; c < F::RUN / 8; c++) {
                uint4 *to = reinterpret_cast<uint4 *>(shared + swizzled(row, chunk + c));
                *to = uint4{pairs[4 * c], pairs[4 * c + 1], pairs[4 * c + 2], pairs[4 * c + 3]};
            }
        }
    }

    static DEVICE void copy_activations(const Product &p, const Part &part, int k0, int end, uint16_t *shared) {
#pragma unroll
        for (int i = 0; i < ROWS * 8 / MANY_THREADS; i++) {
            int at = thread() + i * MANY_THREADS;
            int row = at / 8, chunk = at % 8, k = k0 + 8 * chunk;
            bool there = row < part.rows && k < end;
            const uint16_t *from = there ? row_of_x(p, part.first + row) + k : p.x;
            copy_async(shared + swizzled(row, chunk), from, there);
        }
        copy_async_commit();
    }

    static DEVICE void multiply(float (&sums)[2][TILES][4], const uint16_t *weights, const uint16_t *activations) {
        int feature = warp() % 4 * 32, row = warp() / 4 * (ROWS / 2);
        int which = lane() / 8, in = lane() % 8;
#pragma unroll
        for (int step = 0; step < MANY_K / 16; step++) {
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                // Matrices: rows 0-7 and 8-15 of the first eight of k, then of the next.
                int r = feature + 16 * m + in + which % 2 * 8;
                load_matrices(a[m], weights + swizzled(r, 2 * step + which / 2));
            }
#pragma unroll
            for (int n = 0; n < TILES; n += 2) {
                // Matrices: the first eight rows' two halves of k, then the next rows'.
                uint32_t b[4];
                int r = row + 8 * n + in + which / 2 * 8;
                load_matrices(b, activations + swizzled(r, 2 * step + which % 2));
                uint32_t first[2] = {F::activations(b[0]), F::activations(b[1])};
                uint32_t second[2] = {F::activations(b[2]), F::activations(b[3])};
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    F::mma(sums[m][n], a[m], first);
                    F::mma(sums[m][n + 1], a[m], second);
                }
            }
        }
    }

    static DEVICE void run(const Product &p) {
        Part part;
        int tile = block_y() / p.splits, split = block_y() % p.splits;
        if (!part_of(p, tile, ROWS, part)) return;
        int begin = split * p.split_cols, end = p.w.cols - begin < p.split_cols ? p.w.cols : begin + p.split_cols;
        constexpr int WEIGHTS = MANY_FEATURES * MANY_K, ACTIVATIONS = ROWS * MANY_K;
        uint16_t *shared = reinterpret_cast<uint16_t *>(shared_memory());
        // Two buffers of each; which one, as arithmetic: an array of pointers would live in local memory.
        uint16_t *weights = shared, *activations = shared + 2 * WEIGHTS;
        float sums[2][TILES][4] = {};
        Run runs[MINE];
        copy_activations(p, part, begin, end, activations);
        load_weights(p, part, begin, end, runs);
        store_weights(runs, weights);
        copy_async_wait<0>();
        block_barrier();
        int now = 0;
        for (int k0 = begin; k0 < end; k0 += MANY_K) {
            bool more = k0 + MANY_K < end;
            if (more) {
                copy_activations(p, part, k0 + MANY_K, end, activations + (now ^ 1) * ACTIVATIONS);
                load_weights(p, part, k0 + MANY_K, end, runs);
            }
            multiply(sums, weights + now * WEIGHTS, activations + now * ACTIVATIONS);
            if (more) store_weights(runs, weights + (now ^ 1) * WEIGHTS);
            copy_async_wait<0>();
            block_barrier();
            now ^= 1;
        }
        int group = lane() / 4, place = lane() % 4;
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int n = 0; n < TILES; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int feature = block_x() * MANY_FEATURES + warp() % 4 * 32 + 16 * m + group + (i < 2 ? 0 : 8);
                    int row = warp() / 4 * (ROWS / 2) + 8 * n + 2 * place + i % 2;
                    if (feature < p.features && row < part.rows) put_sum(p, part, split * p.rows + part.first + row, feature, sums[m][n][i]);
                }
            }
        }
    }
};

#define MANY(format, name)                                                                                                      \
    KERNEL_OF_BLOCKS(product_many_##name##_64, Product, MANY_THREADS, 2) { Many<format, 64>::run(p); }                          \
    KERNEL(product_many_##name##_128, Product, MANY_THREADS) { Many<format, 128>::run(p); }

MANY(Bf16, bf16)
MANY(F16, f16)
MANY(Q4_0, q4_0)
MANY(Q5_1, q5_1)
MANY(Q4_K, q4_k)
MANY(Q8_0, q8_0)
MANY(Int4, int4)
MANY(Int8, int8)
MANY(Fp8, fp8)
