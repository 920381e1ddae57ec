// Products with few rows of activations: bound by the memory the weights come from.
//
// A block makes 16 output features for 8·T rows. Its warps share k among them, a stretch of 4 runs at a time, and add their sums up in
// the order of the warps, so that a result depends on the matrix and its own row alone: the same for every T, and whatever else is in the
// step. Weights go from memory to registers and never touch shared memory: tensor cores do not care which k is which as long
// as both operands agree, so lane t of four takes one whole run (16 bytes) of rows g and g + 8, and the same stretch of the activations.
#include "formats.cuh"

constexpr int FEW_THREADS = 256;
constexpr int FEW_WARPS = FEW_THREADS / 32;
constexpr int FEW_FEATURES = 16;

DEVICE Run no_run() {
    Run run;
    run.quants = uint4{0, 0, 0, 0};
    run.scale = run.minimum = 0.0f;
    run.more = 0;
    return run;
}

// Two rows' runs at `k`; nothing where there are none.
template <class F> DEVICE void load_runs(const Product &p, const Part &part, int feature, int k, Run (&w)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int f = feature + 8 * half;
        w[half] = no_run();
        if (k < p.w.cols && f < p.features) F::load(p.w, part.matrix_row + static_cast<size_t>(f), k, w[half]);
    }
}

// Adds what a stretch contributes. `x`: the runs of the lane's rows of activations.
template <class F, int T> DEVICE void multiply_run(float (&sums)[T][4], const Run (&w)[2], const uint16_t *const (&x)[T], int k, bool there) {
    uint32_t low[F::RUN / 2], high[F::RUN / 2];
    F::expand(w[0], low);
    F::expand(w[1], high);
#pragma unroll
    for (int t = 0; t < T; t++) {
#pragma unroll
        for (int i = 0; i < F::RUN / 8; i++) {
            uint4 q = there && x[t] != nullptr ? load16(x[t] + k + 8 * i) : uint4{0, 0, 0, 0};
            uint32_t pairs[4];
            words_of(q, pairs);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = 4 * i + 2 * half;
                uint32_t a[4] = {low[at], high[at], low[at + 1], high[at + 1]};
                uint32_t b[2] = {F::activations(pairs[2 * half]), F::activations(pairs[2 * half + 1])};
                F::mma(sums[t], a, b);
            }
        }
    }
}

template <class F, int T> DEVICE void product_few(const Product &p) {
    Part part;
    if (!part_of(p, block_y(), 8 * T, part)) return;
    int group = lane() / 4, place = lane() % 4;
    int feature = block_x() * FEW_FEATURES + group;
    const uint16_t *x[T];
#pragma unroll
    for (int t = 0; t < T; t++) {
        int row = 8 * t + group;
        x[t] = row < part.rows ? row_of_x(p, part.first + row) : nullptr;
    }
    float sums[T][4] = {};
    constexpr int STRETCH = 4 * F::RUN;
    constexpr int STEP = FEW_WARPS * STRETCH;
    if constexpr (T == 1) {
        // Each stretch's place is loaded again as soon as it was multiplied, so that loads are always under way; more of them where a run is few
        // elements and the arithmetic short.
        constexpr int AHEAD = F::RUN == 8 ? 4 : 2;
        Run w[AHEAD][2];
        int k = warp() * STRETCH + place * F::RUN;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) load_runs<F>(p, part, feature, k + i * STEP, w[i]);
        for (int k0 = warp() * STRETCH; k0 < p.w.cols; k0 += AHEAD * STEP, k += AHEAD * STEP) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                multiply_run<F, T>(sums, w[i], x, k + i * STEP, k + i * STEP < p.w.cols);
                load_runs<F>(p, part, feature, k + (AHEAD + i) * STEP, w[i]);
            }
        }
    } else {
        // With more rows registers are short: loads of two stretches are under way at a time.
        for (int k0 = warp() * STRETCH; k0 < p.w.cols; k0 += 2 * STEP) {
            Run w[2][2];
            int k[2];
            bool there[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                k[i] = k0 + i * STEP + place * F::RUN;
                there[i] = k[i] < p.w.cols;
                load_runs<F>(p, part, feature, k[i], w[i]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) multiply_run<F, T>(sums, w[i], x, k[i], there[i]);
        }
    }
    // [warp][row][feature]
    float *shared = reinterpret_cast<float *>(shared_memory());
#pragma unroll
    for (int t = 0; t < T; t++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = 8 * t + 2 * place + i % 2, f = group + (i < 2 ? 0 : 8);
            shared[(warp() * 8 * T + row) * FEW_FEATURES + f] = sums[t][i];
        }
    }
    block_barrier();
    for (int i = thread(); i < 8 * T * FEW_FEATURES; i += FEW_THREADS) {
        int row = i / FEW_FEATURES, f = block_x() * FEW_FEATURES + i % FEW_FEATURES;
        if (row >= part.rows || f >= p.features) continue;
        float sum = 0.0f;
        for (int w = 0; w < FEW_WARPS; w++) sum += shared[w * 8 * T * FEW_FEATURES + i];
        put_sum(p, part, part.first + row, f, sum);
    }
}

#define FEW(format, name)                                                                                                       \
    KERNEL(product_few_##name##_8, Product, FEW_THREADS) { product_few<format, 1>(p); }                                         \
    KERNEL(product_few_##name##_16, Product, FEW_THREADS) { product_few<format, 2>(p); }                                        \
    KERNEL(product_few_##name##_32, Product, FEW_THREADS) { product_few<format, 4>(p); }

FEW(Bf16, bf16)
FEW(F16, f16)
FEW(Q4_0, q4_0)
FEW(Q5_1, q5_1)
FEW(Q4_K, q4_k)
FEW(Q8_0, q8_0)
FEW(Int4, int4)
FEW(Int8, int8)
FEW(Fp8, fp8)
