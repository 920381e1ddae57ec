// Products with f32 matrices, in f32: exact where a decision hangs on them (routers of experts), and slow.
#include "params.cuh"

constexpr int FLOAT_THREADS = 256;
// Rows that share a pass over the weights.
constexpr int FLOAT_ROWS = 4;

// As Product, but x is as it is and the matrix is f32; experts are served as well.
struct FloatProduct {
    Product of;
    Rows x;
};

// A warp makes one feature of FLOAT_ROWS rows; the first index of a block counts features, the second rows.
KERNEL(product_f32, FloatProduct, FLOAT_THREADS) {
    const Product &of = p.of;
    Part part;
    if (!part_of(of, block_y(), FLOAT_ROWS, part)) return;
    int feature = block_x() * (FLOAT_THREADS / 32) + warp();
    if (feature >= of.features) return;
    size_t row = part.matrix_row + static_cast<size_t>(feature);
    const float *w = reinterpret_cast<const float *>(of.w.quants) + row * static_cast<size_t>(of.w.cols);
    float sums[FLOAT_ROWS] = {};
    for (int k = lane(); k < of.w.cols; k += 32) {
#pragma unroll
        for (int r = 0; r < FLOAT_ROWS; r++) {
            if (r >= part.rows) continue;
            size_t place = static_cast<size_t>(part.first + r);
            size_t from = of.row_of == nullptr ? place : of.row_of[place];
            sums[r] = fmaf(element(p.x, from, k), w[k], sums[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < FLOAT_ROWS; r++) {
        float sum = warp_sum(sums[r]);
        if (lane() == 0 && r < part.rows) put_sum(of, part, part.first + r, feature, sum);
    }
}
