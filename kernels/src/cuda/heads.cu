// Query and key heads are normalised and rotated where they are; keys and values go to the cache. A warp for each head of a row.
#include "params.cuh"

constexpr int HEAD_THREADS = 128;

struct NormRopeStore {
    const Step *step;
    // [rows, (heads + 2 · kv_heads) · d]
    float *qkv;
    // Weights of a head by itself; null: none (or the rows were normalised before).
    const float *q_norm, *k_norm;
    // [rows, 2 · pairs]: cosines, then sines; null with no pairs.
    const float *rotary;
    // The layer's part of the cache: [block][kv head][keys, values][block_size][d].
    void *cache;
    int bucket, heads, kv_heads, d, pairs, block_size, page_group;
    // 16-bit floats, or f32.
    int wide;
    float eps;
};

DEVICE void put_in_cache(const NormRopeStore &p, size_t at, float x) {
    if (p.wide) {
        static_cast<float *>(p.cache)[at] = x;
    } else {
        static_cast<uint16_t *>(p.cache)[at] = to_f16(x);
    }
}

KERNEL(norm_rope_store, NormRopeStore, HEAD_THREADS) {
    int head = block_y() * (HEAD_THREADS / 32) + warp();
    int all = p.heads + 2 * p.kv_heads;
    size_t row = static_cast<size_t>(block_x());
    if (head >= all) return;
    float *x = p.qkv + (row * static_cast<size_t>(all) + static_cast<size_t>(head)) * static_cast<size_t>(p.d);
    bool query = head < p.heads, value = head >= p.heads + p.kv_heads;
    const float *weight = query ? p.q_norm : p.k_norm;
    float inverse = 1.0f;
    if (value) weight = nullptr;
    if (weight != nullptr) {
        float squares = 0.0f;
        for (int i = lane(); i < p.d; i += 32) squares = fmaf(x[i], x[i], squares);
        inverse = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(p.d) + p.eps);
    }
    // Where it goes, unless it is a query or padding.
    int slot = static_cast<int>(words(p.step, p.step->slots)[p.page_group * p.bucket + static_cast<int>(row)]);
    bool stored = !query && slot >= 0;
    size_t at = 0;
    if (stored) {
        size_t kv_head = static_cast<size_t>(head - p.heads) % static_cast<size_t>(p.kv_heads);
        size_t block = static_cast<size_t>(slot / p.block_size), in_block = static_cast<size_t>(slot % p.block_size);
        size_t tile = static_cast<size_t>(p.block_size) * static_cast<size_t>(p.d);
        at = ((block * static_cast<size_t>(p.kv_heads) + kv_head) * 2 + (value ? 1 : 0)) * tile + in_block * static_cast<size_t>(p.d);
    }
    int pairs = value ? 0 : p.pairs;
    const float *angles = p.rotary + row * static_cast<size_t>(2 * p.pairs);
    for (int i = lane(); i < p.d - pairs; i += 32) {
        // The first `pairs` elements each bring their partner; then come those that are not rotated.
        if (i < pairs) {
            float a = x[i] * inverse, b = x[i + pairs] * inverse;
            if (weight != nullptr) {
                a *= weight[i];
                b *= weight[i + pairs];
            }
            float c = angles[i], s = angles[p.pairs + i];
            float low = a * c - b * s, high = b * c + a * s;
            if (query) {
                x[i] = low;
                x[i + pairs] = high;
            }
            if (stored) {
                put_in_cache(p, at + static_cast<size_t>(i), low);
                put_in_cache(p, at + static_cast<size_t>(i + pairs), high);
            }
        } else {
            int k = i + pairs;
            float a = x[k] * inverse;
            if (weight != nullptr) a *= weight[k];
            if (query) x[k] = a;
            if (stored) put_in_cache(p, at + static_cast<size_t>(k), a);
        }
    }
}
