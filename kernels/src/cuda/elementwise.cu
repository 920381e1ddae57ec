// What is between the products, a block (or several) for each row: norms, gates, sums into the residual stream.
//
// Rows are counted by a grid's first index, here and elsewhere: the second ends at 65,535.
#include "params.cuh"

constexpr int ROW_OF_ELEMENTS = 256;

// out[r] = x[from(r)] / sqrt(mean(x²) + eps) · weight. `x` and `out` may be the same rows.
struct RmsNorm {
    Rows x, out;
    const float *weight;
    // The step whose logit rows are taken; null: every row.
    const Step *step;
    int cols;
    float eps;
};

DEVICE float inverse_rms(const Rows &x, size_t row, int cols, float eps) {
    float squares = 0.0f;
    for (int i = thread(); i < cols; i += ROW_OF_ELEMENTS) {
        float value = element(x, row, i);
        squares = fmaf(value, value, squares);
    }
    float *memory = reinterpret_cast<float *>(shared_memory());
    return 1.0f / sqrtf(block_sum(squares, memory) / static_cast<float>(cols) + eps);
}

KERNEL(rms_norm, RmsNorm, ROW_OF_ELEMENTS) {
    size_t row = static_cast<size_t>(block_x());
    size_t from = p.step == nullptr ? row : words(p.step, p.step->logits)[row];
    float inverse = inverse_rms(p.x, from, p.cols, p.eps);
    for (int i = thread(); i < p.cols; i += ROW_OF_ELEMENTS) put(p.out, row, i, element(p.x, from, i) * inverse * p.weight[i]);
}

// out[r] += scale · x[r], x being normalised first where there are weights.
struct Add {
    Rows x;
    const float *weight;
    float *out;
    int cols;
    float eps, scale;
};

KERNEL(add, Add, ROW_OF_ELEMENTS) {
    size_t row = static_cast<size_t>(block_x());
    float *out = p.out + row * static_cast<size_t>(p.cols);
    float inverse = p.weight == nullptr ? 1.0f : inverse_rms(p.x, row, p.cols, p.eps);
    for (int i = thread(); i < p.cols; i += ROW_OF_ELEMENTS) {
        float x = element(p.x, row, i) * inverse;
        if (p.weight != nullptr) x *= p.weight[i];
        out[i] = fmaf(p.scale, x, out[i]);
    }
}

// out[r, i] = activation(gate_up[r, i], gate_up[r, n + i]).
struct Gate {
    const float *gate_up;
    Rows out;
    int n;
    // 0: SiLU, 1: GELU with tanh, 2: squared ReLU, 3: clamped SwiGLU.
    int kind;
    float alpha, limit;
};

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

DEVICE float gated(const Gate &p, float g, float u) {
    if (p.kind == 0) return g * sigmoid(g) * u;
    // (1 + tanh z) / 2 is the sigmoid of 2z.
    if (p.kind == 1) return g * sigmoid(1.5957691216f * g * fmaf(0.044715f * g, g, 1.0f)) * u;
    if (p.kind == 2) {
        float positive = fmaxf(g, 0.0f);
        return positive * positive * u;
    }
    g = fminf(g, p.limit);
    u = fminf(fmaxf(u, -p.limit), p.limit);
    return g * sigmoid(p.alpha * g) * (u + 1.0f);
}

KERNEL(gate, Gate, ROW_OF_ELEMENTS) {
    size_t row = static_cast<size_t>(block_x());
    const float *g = p.gate_up + row * static_cast<size_t>(2 * p.n);
    for (int i = block_y() * ROW_OF_ELEMENTS + thread(); i < p.n; i += blocks_y() * ROW_OF_ELEMENTS) {
        put(p.out, row, i, gated(p, g[i], g[p.n + i]));
    }
}
