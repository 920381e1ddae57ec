// Query and key heads are normalised and rotated where they are; keys and values go to the cache. A warp for each head of a row.
#include "cache.cuh"

constexpr int HEAD_THREADS = 128;

struct NormRopeStore {
    const Step *step;
    // [rows, (heads + 2 · kv_heads) · d]
    float *qkv;
    // Weights of a head by itself; null: none (or the rows were normalised before).
    const float *q_norm, *k_norm;
    // [rows, 2 · pairs]: cosines, then sines; null with no pairs.
    const float *rotary;
    // The layer's part of the cache: `[block][kv head]`, each as `cache.cuh` says.
    void *cache;
    int bucket, heads, kv_heads, d, pairs, block_size, page_group;
    // A CacheDtype.
    int dtype;
    float eps;
};

// A head of a row on its way: normalised, and its first `2 · pairs` elements rotated.
struct Head {
    const float *x, *weight, *angles;
    float inverse;
    int pairs, all_pairs;
};

// Element `i` and, below `pairs`, its partner `i + pairs`; above, element `i + pairs` alone, as `low`.
DEVICE void prepared(const Head &head, int i, float &low, float &high) {
    bool turns = i < head.pairs;
    int k = turns ? i : i + head.pairs;
    float a = head.x[k] * head.inverse;
    if (head.weight != nullptr) a *= head.weight[k];
    low = a;
    high = 0.0f;
    if (turns) {
        float b = head.x[i + head.pairs] * head.inverse;
        if (head.weight != nullptr) b *= head.weight[i + head.pairs];
        float c = head.angles[i], s = head.angles[head.all_pairs + i];
        low = a * c - b * s;
        high = b * c + a * s;
    }
}

// `inverse`: of the row's scale.
DEVICE void put_in_cache(CacheDtype dtype, uint8_t *row, int k, float x, float inverse) {
    if (dtype == CacheDtype::F32) {
        reinterpret_cast<float *>(row)[k] = x;
    } else if (dtype == CacheDtype::FP8) {
        row[k] = to_e4m3(fminf(fmaxf(x * inverse, -E4M3_MOST), E4M3_MOST));
    } else {
        reinterpret_cast<uint16_t *>(row)[k] = dtype == CacheDtype::BF16 ? to_bf16(x) : to_f16(x);
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
    Head of;
    of.x = x;
    of.weight = weight;
    of.angles = p.rotary + row * static_cast<size_t>(2 * p.pairs);
    of.inverse = inverse;
    of.pairs = value ? 0 : p.pairs;
    of.all_pairs = p.pairs;
    // Where it goes, unless it is a query or padding.
    int slot = static_cast<int>(words(p.step, p.step->slots)[p.page_group * p.bucket + static_cast<int>(row)]);
    if (!query && slot < 0) return;
    CacheDtype dtype = static_cast<CacheDtype>(p.dtype);
    uint8_t *to = nullptr;
    float inverse_scale = 1.0f;
    if (!query) {
        HeadPart part = head_part(dtype, p.block_size, p.d);
        size_t kv_head = static_cast<size_t>(head - p.heads) % static_cast<size_t>(p.kv_heads);
        size_t block = static_cast<size_t>(slot / p.block_size);
        int place = slot % p.block_size;
        to = static_cast<uint8_t *>(p.cache) + (block * static_cast<size_t>(p.kv_heads) + kv_head) * part.bytes;
        if (dtype == CacheDtype::FP8) {
            float most = 0.0f;
            for (int i = lane(); i < p.d - of.pairs; i += 32) {
                float low, high;
                prepared(of, i, low, high);
                most = fmaxf(most, fmaxf(fabsf(low), fabsf(high)));
            }
            uint16_t scale = e4m3_scale(warp_max(most), inverse_scale);
            uint16_t *scales = reinterpret_cast<uint16_t *>(to + part.both) + (value ? p.block_size : 0);
            if (lane() == 0) scales[place] = scale;
        }
        to += (value ? part.keys : 0) + static_cast<size_t>(place) * part.row;
    }
    for (int i = lane(); i < p.d - of.pairs; i += 32) {
        float low, high;
        prepared(of, i, low, high);
        bool turns = i < of.pairs;
        int k = turns ? i : i + of.pairs;
        if (query) {
            x[k] = low;
            if (turns) x[i + of.pairs] = high;
        } else {
            put_in_cache(dtype, to, k, low, inverse_scale);
            if (turns) put_in_cache(dtype, to, i + of.pairs, high, inverse_scale);
        }
    }
}
