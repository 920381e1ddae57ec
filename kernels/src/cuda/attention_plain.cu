// Attention without tensor cores, for caches and heads they have no instruction for: f32, and heads whose rows are no multiple of 16 bytes.
//
// A warp for each (row, head), from the oldest position it sees to its own; each lane has every 32nd element of the head.
#include "attention.cuh"

constexpr int PLAIN_THREADS = 128;
// Most elements of a head.
constexpr int PLAIN_D = 512;

// Items hold one row each here: `first` counts rows of the span, not queries.
KERNEL(attention_plain, AttentionParams, PLAIN_THREADS) {
    if (static_cast<uint32_t>(block_x()) >= p.step->list_lengths[p.list]) return;
    Item item = items(p)[block_x()];
    int head = block_y() * (PLAIN_THREADS / 32) + warp();
    if (head >= p.heads) return;
    int row = static_cast<int>(item.row + item.first), position = static_cast<int>(item.start + item.first);
    const float *q = query_of(p, row, head);
    const uint32_t *table = words(p.step, p.step->tables) + item.table;
    size_t kv_head = static_cast<size_t>(head / (p.heads / p.kv_heads));
    CacheDtype dtype = static_cast<CacheDtype>(p.dtype);
    HeadPart part = head_part(dtype, p.block_size, p.d);
    float out[PLAIN_D / 32] = {};
    float most = -INFINITY, sum = 0.0f;
    if (p.sinks != nullptr) {
        most = p.sinks[head];
        sum = 1.0f;
    }
    for (int at = oldest_seen(p, position); at <= position; at++) {
        int in_table = block_of(p, at), place = at - in_table * p.block_size;
        size_t block = table[in_table * p.page_groups + p.page_group];
        const uint8_t *of_head = static_cast<const uint8_t *>(p.cache) + (block * static_cast<size_t>(p.kv_heads) + kv_head) * part.bytes;
        const uint8_t *key = of_head + static_cast<size_t>(place) * part.row, *value = key + part.keys;
        float key_scale = 1.0f, value_scale = 1.0f;
        if (dtype == CacheDtype::FP8) {
            const uint16_t *scales = reinterpret_cast<const uint16_t *>(of_head + part.both) + place;
            key_scale = bf16_value(scales[0]);
            value_scale = bf16_value(scales[p.block_size]);
        }
        float score = 0.0f;
        for (int i = lane(); i < p.d; i += 32) score = fmaf(q[i], cache_element(dtype, key, i), score);
        score = capped(p, warp_sum(score) * key_scale);
        float larger = fmaxf(most, score);
        float shrink = expf(most - larger), weight = expf(score - larger);
        most = larger;
        sum = fmaf(sum, shrink, weight);
        weight *= value_scale;
#pragma unroll
        for (int i = 0; i < PLAIN_D / 32; i++) {
            int k = lane() + 32 * i;
            if (k < p.d) out[i] = fmaf(weight, cache_element(dtype, value, k), out[i] * shrink);
        }
    }
#pragma unroll
    for (int i = 0; i < PLAIN_D / 32; i++) {
        int k = lane() + 32 * i;
        if (k < p.d) put(p.out, static_cast<size_t>(row), head * p.d + k, out[i] / sum);
    }
}
