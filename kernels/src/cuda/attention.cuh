// What the attention kernels share: the work list and a layer's parameters.
#pragma once
#include "cache.cuh"

// Queries of one sequence and the keys they walk. A query is a head of a KV head's group in one row: query f of a span is head f % group of
// row f / group, so that all heads that share keys pass over them together.
struct Item {
    // The span: its first row, that row's position, its block table.
    uint32_t row, start, table;
    // The first query, and how many.
    uint32_t first, count;
    // Positions walked: from `begin` up to but not including `end`.
    uint32_t begin, end;
    // Where its partial results go, in queries.
    uint32_t partial;
};

// Partial results of the same queries, to be added up: item i's are `stride` queries after item i - 1's.
struct Merge {
    uint32_t row, first, count, partial, stride, splits;
};

struct AttentionParams {
    const Step *step;
    // [rows, qkv_stride]
    const float *qkv;
    // The layer's part of the cache: `[block][kv head]`, each as `cache.cuh` says.
    const void *cache;
    const float *sinks;
    // [rows, heads · d]
    Rows out;
    // Of split work: sums of values [query, d] that are not divided yet, and [query] of (maximum, sum), in powers of two.
    float *partial;
    float2 *softmax;
    int list, heads, kv_heads, d, qkv_stride, block_size, page_groups, page_group;
    // A CacheDtype.
    int dtype;
    // 0: none.
    int window;
    float scale;
    // 0: none.
    float softcap;
    // 2^32 / block_size, rounded up: see `block_of`.
    uint32_t block_inverse;
    // Of the list, the first item that is this launch's.
    int first;
};

// Which of its sequence's blocks a position is in: its quotient by the block size, exact where their product is below 2^32 or the size is a power of
// two, which the host sees to. A division takes twenty instructions, which every 16 bytes of the cache would.
DEVICE int block_of(const AttentionParams &p, int position) {
    return static_cast<int>(multiply_high(static_cast<uint32_t>(position), p.block_inverse));
}

DEVICE const Item *items(const AttentionParams &p) { return reinterpret_cast<const Item *>(words(p.step, p.step->lists[p.list])); }

DEVICE const float *query_of(const AttentionParams &p, int row, int head) {
    return p.qkv + static_cast<size_t>(row) * static_cast<size_t>(p.qkv_stride) + static_cast<size_t>(head) * static_cast<size_t>(p.d);
}

DEVICE int oldest_seen(const AttentionParams &p, int position) {
    return p.window > 0 && position >= p.window ? position - p.window + 1 : 0;
}

// A score as the softmax takes it.
DEVICE float capped(const AttentionParams &p, float score) {
    score *= p.scale;
    return p.softcap > 0.0f ? p.softcap * tanhf(score / p.softcap) : score;
}
