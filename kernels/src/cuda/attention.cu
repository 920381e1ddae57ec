// Paged attention on tensor cores, with an online softmax (Dao 2023, "FlashAttention-2").
//
// A block takes queries of one KV head — all heads of its group, of one row or of several — over positions of one sequence, POSITIONS
// at a time, counted from position 0. Two ways to share the work among its warps:
//
// - *together* (prompts): 16 queries a warp, all positions of a tile each; results are final.
// - *split* (generation): 16 queries in all, a quarter of a tile's positions for each warp, and long sequences in splits of fixed size
//   for several blocks; `attention_merge` adds the partial results up in order of position.
//
// A query's result depends on its position and its sequence alone, whatever else is in the block: each row of a tensor-core
// product is by itself, and where tiles and splits begin is a function of positions.
#include "attention.cuh"

constexpr int ATTENTION_THREADS = 128;
constexpr int ATTENTION_WARPS = ATTENTION_THREADS / 32;
constexpr float LOG2_E = 1.4426950408889634f;

// Where chunk `chunk` (8 elements) of a row of D elements is: chunks change places so that eight rows' are in different banks.
template <int D> DEVICE int place_of(int row, int chunk) { return row * D + (chunk ^ (row & 7)) * 8; }

// `D`: the head's size, rounded up to what is compiled; elements from `d` on are zero.
template <int D, bool SPLIT> struct Attend {
    // Larger heads leave room for fewer positions.
    static constexpr int POSITIONS = !SPLIT && D > 128 ? 32 : 64;
    static constexpr int STAGES = SPLIT && D > 128 ? 1 : 2;
    static constexpr int QUERIES = SPLIT ? 16 : 16 * ATTENTION_WARPS;
    // Positions of a tile that one warp looks at, in eights.
    static constexpr int EIGHTS = (SPLIT ? POSITIONS / ATTENTION_WARPS : POSITIONS) / 8;
    static constexpr int CHUNKS = D / 8;
    static constexpr int TILE = POSITIONS * D;

    struct State {
        // Of rows `group` and `group + 8`: the maximum so far and, of this lane's columns, the sum.
        float most[2], sum[2];
        float out[D / 8][4];
    };

    // The queries as f16.
    static DEVICE void load_queries(const AttentionParams &p, const Item &item, int kv_head, uint16_t *shared) {
        int group = p.heads / p.kv_heads;
        for (int at = thread(); at < QUERIES * CHUNKS; at += ATTENTION_THREADS) {
            int query = at / CHUNKS, chunk = at % CHUNKS;
            uint32_t pairs[4] = {0, 0, 0, 0};
            if (query < static_cast<int>(item.count) && 8 * chunk < p.d) {
                int f = static_cast<int>(item.first) + query;
                const float *q = query_of(p, static_cast<int>(item.row) + f / group, kv_head * group + f % group) + 8 * chunk;
                for (int i = 0; i < 4; i++) pairs[i] = pack_f16(q[2 * i], q[2 * i + 1]);
            }
            *reinterpret_cast<uint4 *>(shared + place_of<D>(query, chunk)) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }

    // Asks for a tile's keys and values; zeroes stand where there is nothing to see.
    static DEVICE void load_tile(const AttentionParams &p, const Item &item, int kv_head, int begin, int oldest, uint16_t *keys, uint16_t *values) {
        const uint32_t *table = words(p.step, p.step->tables) + item.table;
        const uint16_t *cache = static_cast<const uint16_t *>(p.cache);
        size_t d = static_cast<size_t>(p.d), tile = static_cast<size_t>(p.block_size) * d;
        for (int at = thread(); at < POSITIONS * CHUNKS; at += ATTENTION_THREADS) {
            int row = at / CHUNKS, chunk = at % CHUNKS, position = begin + row;
            bool there = position >= oldest && position < static_cast<int>(item.end) && 8 * chunk < p.d;
            const uint16_t *from = cache;
            if (there) {
                size_t block = table[position / p.block_size * p.page_groups + p.page_group];
                from += (block * static_cast<size_t>(p.kv_heads) + static_cast<size_t>(kv_head)) * 2 * tile;
                from += static_cast<size_t>(position % p.block_size) * d + static_cast<size_t>(8 * chunk);
            }
            copy_async(keys + place_of<D>(row, chunk), from, there);
            copy_async(values + place_of<D>(row, chunk), there ? from + tile : cache, there);
        }
        copy_async_commit();
    }

    // One tile: `first` is the first of the warp's positions in it, `queries` its sixteen.
    static DEVICE void attend(const AttentionParams &p, const Item &item, const uint16_t *queries, const uint16_t *keys, const uint16_t *values,
                              int begin, int first, int first_query, State &state) {
        int which = lane() / 8, in = lane() % 8;
        float scores[EIGHTS][4] = {};
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            uint32_t a[4];
            load_matrices(a, queries + place_of<D>(first_query + in + which % 2 * 8, 2 * step + which / 2));
#pragma unroll
            for (int n = 0; n < EIGHTS; n += 2) {
                uint32_t b[4];
                load_matrices(b, keys + place_of<D>(first + 8 * n + in + which / 2 * 8, 2 * step + which % 2));
                uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                mma_f16(scores[n], a, low);
                mma_f16(scores[n + 1], a, high);
            }
        }
        soften(p, item, begin + first, first_query, scores, state);
        // Scores stand in the registers as the left operand wants them.
#pragma unroll
        for (int n = 0; n < EIGHTS; n += 2) {
            uint32_t a[4] = {pack_f16(scores[n][0], scores[n][1]), pack_f16(scores[n][2], scores[n][3]),
                             pack_f16(scores[n + 1][0], scores[n + 1][1]), pack_f16(scores[n + 1][2], scores[n + 1][3])};
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
                // Matrices: positions 0-7 and 8-15 of the first eight elements, then of the next.
                uint32_t b[4];
                load_matrices_transposed(b, values + place_of<D>(first + 8 * n + in + which % 2 * 8, chunk + which / 2));
                uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                mma_f16(state.out[chunk], a, low);
                mma_f16(state.out[chunk + 1], a, high);
            }
        }
    }

    // Scores become weights under the running maximum; what was summed up before shrinks to it.
    static DEVICE void soften(const AttentionParams &p, const Item &item, int begin, int first_query, float (&scores)[EIGHTS][4], State &state) {
        int group = p.heads / p.kv_heads;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int query = first_query + lane() / 4 + 8 * half;
            int position = -1;
            if (query < static_cast<int>(item.count)) position = static_cast<int>(item.start) + (static_cast<int>(item.first) + query) / group;
            int oldest = oldest_seen(p, position);
            if (oldest < static_cast<int>(item.begin)) oldest = static_cast<int>(item.begin);
            int last = position < static_cast<int>(item.end) - 1 ? position : static_cast<int>(item.end) - 1;
            float most = state.most[half];
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int at = begin + 8 * n + lane() % 4 * 2 + i;
                    float &score = scores[n][2 * half + i];
                    score = at >= oldest && at <= last ? capped(p, score) * LOG2_E : -INFINITY;
                    most = fmaxf(most, score);
                }
            }
            // The four lanes of a row.
            most = fmaxf(most, exchange(most, 1));
            most = fmaxf(most, exchange(most, 2));
            // A row that has seen nothing yet keeps its zeroes.
            float base = most == -INFINITY ? 0.0f : most;
            float shrink = power_of_two(state.most[half] - base);
            float sum = state.sum[half] * shrink;
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &score = scores[n][2 * half + i];
                    score = power_of_two(score - base);
                    sum += score;
                }
            }
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                state.out[chunk][2 * half] *= shrink;
                state.out[chunk][2 * half + 1] *= shrink;
            }
            state.most[half] = most;
            state.sum[half] = sum;
        }
    }

    static DEVICE void run(const AttentionParams &p) {
        if (static_cast<uint32_t>(block_x()) >= p.step->list_lengths[p.list]) return;
        Item item = items(p)[block_x()];
        int kv_head = block_y(), group = p.heads / p.kv_heads;
        uint16_t *queries = reinterpret_cast<uint16_t *>(shared_memory());
        uint16_t *keys = queries + QUERIES * D, *values = keys + STAGES * TILE;
        load_queries(p, item, kv_head, queries);
        State state = {};
        int first_query = SPLIT ? 0 : 16 * warp();
        for (int half = 0; half < 2; half++) {
            state.most[half] = -INFINITY;
            int query = first_query + lane() / 4 + 8 * half;
            if (!SPLIT && p.sinks != nullptr && query < static_cast<int>(item.count)) {
                // A score that stands for no value; its share of the sum is one lane's.
                state.most[half] = p.sinks[kv_head * group + (static_cast<int>(item.first) + query) % group] * LOG2_E;
                state.sum[half] = lane() % 4 == 0 ? 1.0f : 0.0f;
            }
        }
        // The oldest position that any of the queries sees, and the end of what any of them sees.
        int oldest = oldest_seen(p, static_cast<int>(item.start + item.first / static_cast<uint32_t>(group)));
        if (oldest < static_cast<int>(item.begin)) oldest = static_cast<int>(item.begin);
        int begin = oldest / POSITIONS * POSITIONS, end = static_cast<int>(item.end);
        if (begin < end) load_tile(p, item, kv_head, begin, oldest, keys, values);
        for (int stage = 0; begin < end; begin += POSITIONS) {
            bool more = begin + POSITIONS < end;
            if (more && STAGES == 2) {
                int next = stage ^ 1;
                load_tile(p, item, kv_head, begin + POSITIONS, oldest, keys + next * TILE, values + next * TILE);
                copy_async_wait<1>();
            } else {
                copy_async_wait<0>();
            }
            block_barrier();
            int first = SPLIT ? warp() * (POSITIONS / ATTENTION_WARPS) : 0;
            attend(p, item, queries, keys + stage * TILE, values + stage * TILE, begin, first, first_query, state);
            // Nobody overwrites what others still read.
            block_barrier();
            if (more && STAGES == 1) load_tile(p, item, kv_head, begin + POSITIONS, oldest, keys, values);
            if (STAGES == 2) stage ^= 1;
        }
        for (int half = 0; half < 2; half++) {
            state.sum[half] += exchange(state.sum[half], 1);
            state.sum[half] += exchange(state.sum[half], 2);
        }
        if (SPLIT) {
            block_barrier();
            store_partial(p, item, kv_head, state);
        } else {
            store(p, item, kv_head, first_query, state);
        }
    }

    static DEVICE void store(const AttentionParams &p, const Item &item, int kv_head, int first_query, const State &state) {
        int group = p.heads / p.kv_heads;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int query = first_query + lane() / 4 + 8 * half;
            if (query >= static_cast<int>(item.count)) continue;
            int f = static_cast<int>(item.first) + query;
            size_t row = static_cast<size_t>(item.row) + static_cast<size_t>(f / group);
            int head = kv_head * group + f % group;
            float inverse = 1.0f / state.sum[half];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                int k = 8 * chunk + lane() % 4 * 2;
                for (int i = 0; i < 2; i++) {
                    if (k + i < p.d) put(p.out, row, head * p.d + k + i, state.out[chunk][2 * half + i] * inverse);
                }
            }
        }
    }

    // The warps' sums, added up in their order. Shared memory: [warps][16] maxima, [warps][16] sums, [warps][16][D] values.
    static DEVICE void store_partial(const AttentionParams &p, const Item &item, int kv_head, const State &state) {
        float *most = reinterpret_cast<float *>(shared_memory());
        float *sums = most + ATTENTION_WARPS * 16, *out = sums + ATTENTION_WARPS * 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int query = lane() / 4 + 8 * half;
            if (lane() % 4 == 0) {
                most[warp() * 16 + query] = state.most[half];
                sums[warp() * 16 + query] = state.sum[half];
            }
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                float *to = out + (warp() * 16 + query) * D + 8 * chunk + lane() % 4 * 2;
                to[0] = state.out[chunk][2 * half];
                to[1] = state.out[chunk][2 * half + 1];
            }
        }
        block_barrier();
        size_t base = static_cast<size_t>(item.partial) + static_cast<size_t>(kv_head) * static_cast<size_t>(item.count);
        for (int at = thread(); at < static_cast<int>(item.count) * p.d; at += ATTENTION_THREADS) {
            int query = at / p.d, k = at % p.d;
            float largest = -INFINITY;
            for (int w = 0; w < ATTENTION_WARPS; w++) largest = fmaxf(largest, most[w * 16 + query]);
            float total = 0.0f, value = 0.0f;
            for (int w = 0; w < ATTENTION_WARPS && largest > -INFINITY; w++) {
                float weight = power_of_two(most[w * 16 + query] - largest);
                total = fmaf(weight, sums[w * 16 + query], total);
                value = fmaf(weight, out[(w * 16 + query) * D + k], value);
            }
            size_t to = base + static_cast<size_t>(query);
            p.partial[to * static_cast<size_t>(p.d) + static_cast<size_t>(k)] = value;
            if (k == 0) p.softmax[to] = float2{largest, total};
        }
    }
};

#define ATTENTION(D)                                                                                                            \
    KERNEL(attention_together_##D, AttentionParams, ATTENTION_THREADS) { Attend<D, false>::run(p); }                            \
    KERNEL(attention_split_##D, AttentionParams, ATTENTION_THREADS) { Attend<D, true>::run(p); }

ATTENTION(64)
ATTENTION(128)
ATTENTION(256)

// A block for the queries of a Merge and one KV head.
KERNEL(attention_merge, AttentionParams, ATTENTION_THREADS) {
    if (static_cast<uint32_t>(block_x()) >= p.step->list_lengths[p.list]) return;
    Merge merge = reinterpret_cast<const Merge *>(words(p.step, p.step->lists[p.list]))[block_x()];
    int kv_head = block_y(), group = p.heads / p.kv_heads;
    size_t base = static_cast<size_t>(merge.partial) + static_cast<size_t>(kv_head) * static_cast<size_t>(merge.count);
    for (int at = thread(); at < static_cast<int>(merge.count) * p.d; at += ATTENTION_THREADS) {
        int query = at / p.d, k = at % p.d;
        int f = static_cast<int>(merge.first) + query, head = kv_head * group + f % group;
        float most = -INFINITY, sum = 0.0f, value = 0.0f;
        if (p.sinks != nullptr) {
            most = p.sinks[head] * LOG2_E;
            sum = 1.0f;
        }
        for (uint32_t split = 0; split < merge.splits; split++) {
            size_t from = base + static_cast<size_t>(split) * static_cast<size_t>(merge.stride) + static_cast<size_t>(query);
            float2 softmax = p.softmax[from];
            // A split that the query does not see.
            if (softmax.x == -INFINITY) continue;
            float larger = fmaxf(most, softmax.x);
            float shrink = most == -INFINITY ? 0.0f : power_of_two(most - larger), weight = power_of_two(softmax.x - larger);
            sum = sum * shrink + weight * softmax.y;
            value = value * shrink + weight * p.partial[from * static_cast<size_t>(p.d) + static_cast<size_t>(k)];
            most = larger;
        }
        put(p.out, static_cast<size_t>(merge.row) + static_cast<size_t>(f / group), head * p.d + k, value / sum);
    }
}
