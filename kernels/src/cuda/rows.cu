// What begins and ends a step: embeddings, rotary tables, rows in another precision, logits, block copies.
#include "formats.cuh"

constexpr int ROW_THREADS = 256;

// out[r] = scale · table[token(r)]; zeroes for tokens that are not in the table but in another rank's.
struct Embed {
    const Step *step;
    Weights table;
    // What the step before drew.
    const uint32_t *drawn;
    float *out;
    // The table's first token, and how many it has.
    uint32_t first, rows;
    float scale;
};

DEVICE uint32_t token_of(const Embed &p, int row) {
    uint32_t token = words(p.step, p.step->tokens)[row];
    return token & DRAWN ? p.drawn[token & ~DRAWN] : token;
}

template <class F> DEVICE void embed(const Embed &p) {
    int row = block_x(), cols = p.table.cols;
    // Below zero is beyond the end.
    uint32_t token = token_of(p, row) - p.first;
    if (token >= p.rows) {
        float *out = p.out + static_cast<size_t>(row) * static_cast<size_t>(cols);
        for (int k = thread(); k < cols; k += ROW_THREADS) out[k] = 0.0f;
        return;
    }
    for (int k = thread() * F::RUN; k < cols; k += ROW_THREADS * F::RUN) {
        Run run;
        run.minimum = 0.0f;
        uint32_t pairs[F::RUN / 2];
        F::load(p.table, token, k, run);
        F::expand(run, pairs);
        float *out = p.out + static_cast<size_t>(row) * static_cast<size_t>(cols) + k;
        for (int i = 0; i < F::RUN / 2; i++) {
            out[2 * i] = p.scale * F::low(pairs[i]);
            out[2 * i + 1] = p.scale * F::high(pairs[i]);
        }
    }
}

#define EMBED(format, name) KERNEL(embed_##name, Embed, ROW_THREADS) { embed<format>(p); }

EMBED(Bf16, bf16)
EMBED(F16, f16)
EMBED(Q4_0, q4_0)
EMBED(Q5_1, q5_1)
EMBED(Q4_K, q4_k)
EMBED(Q8_0, q8_0)
EMBED(Int4, int4)
EMBED(Int8, int8)
EMBED(Fp8, fp8)

KERNEL(embed_f32, Embed, ROW_THREADS) {
    size_t cols = static_cast<size_t>(p.table.cols);
    uint32_t token = token_of(p, block_x()) - p.first;
    bool own = token < p.rows;
    const float *from = reinterpret_cast<const float *>(p.table.quants) + (own ? token * cols : 0);
    float *out = p.out + static_cast<size_t>(block_x()) * cols;
    for (int k = thread(); k < p.table.cols; k += ROW_THREADS) out[k] = own ? p.scale * from[k] : 0.0f;
}

// out[r] = [cos(position · f) …, sin(position · f) …] · scale.
struct Rotary {
    const Step *step;
    const float *frequencies, *beyond;
    float *out;
    int count;
    float scale;
};

KERNEL(rotary, Rotary, ROW_THREADS) {
    int row = block_x();
    const float *frequencies = words(p.step, p.step->beyond)[row] ? p.beyond : p.frequencies;
    double position = words(p.step, p.step->positions)[row];
    float *out = p.out + static_cast<size_t>(row) * static_cast<size_t>(2 * p.count);
    for (int i = thread(); i < p.count; i += ROW_THREADS) {
        // In f64: at position 100,000 an f32 angle is off by a hundredth of a radian.
        double angle = position * static_cast<double>(frequencies[i]);
        out[i] = static_cast<float>(cos(angle)) * p.scale;
        out[p.count + i] = static_cast<float>(sin(angle)) * p.scale;
    }
}

// Rows as bf16, their columns in another order where there is one.
struct Convert {
    Rows x, out;
    const uint32_t *order;
    int cols;
};

KERNEL(convert, Convert, ROW_THREADS) {
    size_t row = static_cast<size_t>(block_x());
    for (int k = thread(); k < p.cols; k += ROW_THREADS) {
        int from = p.order == nullptr ? k : static_cast<int>(p.order[k]);
        put(p.out, row, k, element(p.x, row, from));
    }
}

// Rows as f16, within its range, for products by cuBLASLt.
KERNEL(convert_f16, Convert, ROW_THREADS) {
    size_t row = static_cast<size_t>(block_x());
    uint16_t *out = static_cast<uint16_t *>(const_cast<void *>(p.out.data)) + row * static_cast<size_t>(p.out.stride);
    for (int k = thread(); k < p.cols; k += ROW_THREADS) {
        out[k] = to_f16(fminf(fmaxf(element(p.x, row, k), -65504.0f), 65504.0f));
    }
}

// x += bias, for products by cuBLASLt.
struct AddBias {
    float *x;
    const float *bias;
    int stride, cols;
};

KERNEL(add_bias, AddBias, ROW_THREADS) {
    float *x = p.x + static_cast<size_t>(block_x()) * static_cast<size_t>(p.stride);
    for (int i = thread(); i < p.cols; i += ROW_THREADS) x[i] += p.bias[i];
}

// x = cap · tanh(scale · x / cap); without a cap (0), scale · x.
struct LogitsRule {
    float *x;
    int cols;
    float scale, cap;
};

KERNEL(logits_rule, LogitsRule, ROW_THREADS) {
    float *x = p.x + static_cast<size_t>(block_x()) * static_cast<size_t>(p.cols);
    for (int i = block_y() * ROW_THREADS + thread(); i < p.cols; i += blocks_y() * ROW_THREADS) {
        float scaled = p.scale * x[i];
        x[i] = p.cap > 0.0f ? p.cap * tanhf(scaled / p.cap) : scaled;
    }
}

// Copies blocks of every layer, in order: each thread has bytes of its own and does all pairs with them.
struct CopyBlocks {
    const Step *step;
    uint8_t *cache;
    int count, blocks;
    // Bytes of a block of one layer; a multiple of 16.
    long long bytes;
};

KERNEL(copy_blocks, CopyBlocks, ROW_THREADS) {
    uint8_t *layer = p.cache + static_cast<long long>(block_y()) * p.blocks * p.bytes;
    for (long long at = 16LL * (block_x() * ROW_THREADS + thread()); at < p.bytes; at += 16LL * blocks_x() * ROW_THREADS) {
        const uint32_t *pairs = words(p.step, p.step->copies);
        for (int i = 0; i < p.count; i++) {
            const uint4 *from = reinterpret_cast<const uint4 *>(layer + pairs[2 * i] * p.bytes + at);
            *reinterpret_cast<uint4 *>(layer + pairs[2 * i + 1] * p.bytes + at) = *from;
        }
    }
}

// Numbers that look random, in -1..1 times `scale`, as 16-bit floats or f32: weights for benchmarks, made where they are used.
struct Random {
    void *out;
    long long count;
    uint32_t seed;
    // A Precision.
    int precision;
    float scale;
};

KERNEL(random_values, Random, ROW_THREADS) {
    for (long long i = static_cast<long long>(block_x()) * ROW_THREADS + thread(); i < p.count; i += static_cast<long long>(blocks_x()) * ROW_THREADS) {
        // Wang's hash: enough for data that compresses into nothing.
        uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ p.seed ^ static_cast<uint32_t>(i >> 32);
        x = (x ^ 61u) ^ (x >> 16);
        x *= 9u;
        x ^= x >> 4;
        x *= 0x27d4eb2du;
        x ^= x >> 15;
        float value = p.scale * (static_cast<float>(x >> 8) / 8388608.0f - 1.0f);
        if (p.precision == F32) {
            static_cast<float *>(p.out)[i] = value;
        } else {
            static_cast<uint16_t *>(p.out)[i] = to_bf16(value);
        }
    }
}
