// What kernels are told. `params.rs` mirrors every struct; a test compares their sizes.
#pragma once
#include "device.cuh"

// The bits of a row's elements.
enum Precision : int { F32 = 0, BF16 = 1 };

// Rows of activations.
struct Rows {
    const void *data;
    // Elements from one row to the next.
    int stride;
    // A Precision.
    int precision;
};

DEVICE float element(const Rows &x, size_t row, int col) {
    size_t at = row * static_cast<size_t>(x.stride) + static_cast<size_t>(col);
    return x.precision == F32 ? static_cast<const float *>(x.data)[at] : bf16_value(static_cast<const uint16_t *>(x.data)[at]);
}

DEVICE void put(const Rows &x, size_t row, int col, float value) {
    size_t at = row * static_cast<size_t>(x.stride) + static_cast<size_t>(col);
    void *data = const_cast<void *>(x.data);
    if (x.precision == F32) {
        static_cast<float *>(data)[at] = value;
    } else {
        static_cast<uint16_t *>(data)[at] = to_bf16(value);
    }
}

// The step, as `plan.rs` lays it out: this header at a fixed address, and arrays of 32-bit words that it says the places of, counted in
// words from `base`. The kernels' parameters do not change from step to step, so that a step can be recorded as a graph.
struct Step {
    const uint32_t *base;
    // Rows of the step, and rows whose logits are wanted. The rest of a bucket is padding.
    uint32_t rows, logit_rows;
    // Of each row: token (or DRAWN and a draw of the step before), position, whether it is beyond the rotary switch. `[bucket]`
    uint32_t tokens, positions, beyond;
    // Where each row's keys and values go, as block · block_size + place; -1: nowhere. `[groups, bucket]`
    uint32_t slots;
    // Block tables of all spans.
    uint32_t tables;
    // `[logit bucket]`
    uint32_t logits;
    // Pairs of blocks to be copied.
    uint32_t copies;
    // Of each draw a Draw of sampling.cu. `[draw bucket]`
    uint32_t draws;
    // Lists of attention work: where they are and how long.
    uint32_t lists[4], list_lengths[4];
};

// The bit of a row's token that says that the rest is a draw: no vocabulary has so many tokens.
constexpr uint32_t DRAWN = 0x80000000u;

DEVICE const uint32_t *words(const Step *step, uint32_t at) { return step->base + at; }

// A matrix on the device: planes of rows, one after the other. What is in them is the format's business; see formats.cuh.
struct Weights {
    const uint8_t *quants;
    const uint8_t *scales;
    const uint8_t *more;
    int cols;
    // Groups of elements under one scale in a row; and 2^32 divided by the eights of such a group, rounded up (0 where the row is one group).
    int groups;
    uint32_t group_inverse;
    int pad;
};

// Which of its row's groups element `k` is in: its quotient by the group's size, without a division for every 16 bytes. Exact for rows of matrices that
// are accepted (`matrix.rs`).
DEVICE size_t group_of(const Weights &w, size_t row, int k) {
    return row * static_cast<size_t>(w.groups) + multiply_high(static_cast<uint32_t>(k) / 8, w.group_inverse);
}

// So many rows of one expert, from one place on among the rows sorted by expert.
struct Tile {
    uint32_t expert, first, rows;
};

// out[r, column + f] (+)= Σ_k x[r, k] · w[f, k] + bias[f].
struct Product {
    Weights w;
    // bf16, `[rows, cols]`; its rows begin at multiples of 16 bytes.
    const uint16_t *x;
    float *out;
    // Of the whole matrix; null: none.
    const float *bias;
    // For experts: the tiles, how many there are, and the row of x of each place (null: the place itself). Null for a plain product.
    const Tile *tiles;
    const uint32_t *tile_count;
    const uint32_t *row_of;
    int rows, features;
    int x_stride, out_stride;
    // Where its features begin among the columns of `out` and among the biases.
    int column;
    // Add to `out` what there is.
    int add;
    // Products of many rows may divide k: into how many splits, of how many columns; the sums of each are `rows` rows further on in `out`.
    int splits, split_cols;
};

// The part of a product that a tile's number, mostly a block's second index, names.
struct Part {
    // The first row of x (or place) and of the matrix, and how many rows of x.
    int first, rows;
    size_t matrix_row;
    // Of the bias.
    int bias;
};

// False where there is nothing to do.
DEVICE bool part_of(const Product &p, int at, int tile_rows, Part &part) {
    if (p.tiles == nullptr) {
        part.first = at * tile_rows;
        part.rows = p.rows - part.first < tile_rows ? p.rows - part.first : tile_rows;
        part.matrix_row = 0;
        part.bias = p.column;
        return true;
    }
    if (static_cast<uint32_t>(at) >= *p.tile_count) return false;
    Tile tile = p.tiles[at];
    part.first = static_cast<int>(tile.first);
    part.rows = static_cast<int>(tile.rows);
    part.matrix_row = static_cast<size_t>(tile.expert) * static_cast<size_t>(p.features);
    part.bias = static_cast<int>(tile.expert) * p.features;
    return true;
}

DEVICE const uint16_t *row_of_x(const Product &p, int place) {
    size_t row = p.row_of == nullptr ? static_cast<size_t>(place) : p.row_of[place];
    return p.x + row * static_cast<size_t>(p.x_stride);
}

DEVICE void put_sum(const Product &p, const Part &part, int place, int feature, float sum) {
    float *out = p.out + static_cast<size_t>(place) * static_cast<size_t>(p.out_stride) + static_cast<size_t>(p.column + feature);
    if (p.bias != nullptr) sum += p.bias[part.bias + feature];
    *out = p.add ? *out + sum : sum;
}
