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
//
// Keys and values come to shared memory as they are in the cache. Of 16 bits they are what tensor cores multiply; FP8 is widened in the
// registers of the warp that multiplies it, and its scales are factors of scores and of weights (`cache.cuh`).
#include "attention.cuh"

constexpr int ATTENTION_THREADS = 128;
constexpr int ATTENTION_WARPS = ATTENTION_THREADS / 32;
constexpr float LOG2_E = 1.4426950408889634f;

// Where 16 bytes, the `chunk`th of a row of ROW bytes, are: chunks change places so that eight rows' are in different banks.
template <int ROW> DEVICE int place_of(int row, int chunk) { return row * ROW + 16 * (chunk ^ (ROW < 128 ? row / 2 & 3 : row & 7)); }

// `D`: the head's size, rounded up to what is compiled; elements from `d` on are zero. `Cache`: what keys and values are kept as.
template <int D, bool SPLIT, class Cache> struct Attend {
    // Bytes of a row of keys, or values, and of queries.
    static constexpr int ROW = D * Cache::WIDTH;
    static constexpr int QUERY = 2 * D;
    // Larger heads leave room for fewer positions.
    static constexpr int POSITIONS = !SPLIT && D > 128 ? 32 : 64;
    static constexpr int STAGES = SPLIT && ROW > 256 ? 1 : 2;
    static constexpr int QUERIES = SPLIT ? 16 : 16 * ATTENTION_WARPS;
    // Positions of a tile that one warp looks at, in eights.
    static constexpr int EIGHTS = (SPLIT ? POSITIONS / ATTENTION_WARPS : POSITIONS) / 8;
    static constexpr int CHUNKS = ROW / 16;
    static constexpr int TILE = POSITIONS * ROW;
    // Scales of a tile: of keys, then of values.
    static constexpr int SCALES = Cache::SCALED ? 2 * POSITIONS : 0;

    // A block's shared memory: queries as pairs, then of each stage keys, values and scales.
    struct Shared {
        char *queries, *keys, *values;
        uint16_t *scales;
    };

    struct State {
        // Of rows `group` and `group + 8`: the maximum so far and, of this lane's columns, the sum.
        float most[2], sum[2];
        float out[D / 8][4];
    };

    static DEVICE Shared memory(int stage) {
        char *queries = shared_memory(), *keys = queries + QUERIES * QUERY, *values = keys + STAGES * TILE;
        uint16_t *scales = reinterpret_cast<uint16_t *>(values + STAGES * TILE);
        return Shared{queries, keys + stage * TILE, values + stage * TILE, scales + stage * SCALES};
    }

    static DEVICE void load_queries(const AttentionParams &p, const Item &item, int kv_head, char *shared) {
        int group = p.heads / p.kv_heads;
        for (int at = thread(); at < QUERIES * (D / 8); at += ATTENTION_THREADS) {
            int query = at / (D / 8), eight = at % (D / 8);
            uint32_t pairs[4] = {0, 0, 0, 0};
            if (query < static_cast<int>(item.count) && Cache::element(eight, 0) < p.d) {
                int f = static_cast<int>(item.first) + query;
                const float *q = query_of(p, static_cast<int>(item.row) + f / group, kv_head * group + f % group);
                for (int i = 0; i < 4; i++) pairs[i] = Cache::pack(q[Cache::element(eight, 2 * i)], q[Cache::element(eight, 2 * i + 1)]);
            }
            *reinterpret_cast<uint4 *>(shared + place_of<QUERY>(query, eight)) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }

    // Where a KV head's part of a sequence's `at`th block begins.
    static DEVICE const uint8_t *part_of(const AttentionParams &p, const Item &item, int kv_head, const HeadPart &part, int at) {
        const uint32_t *table = words(p.step, p.step->tables) + item.table;
        size_t block = table[at * p.page_groups + p.page_group];
        return static_cast<const uint8_t *>(p.cache) + (block * static_cast<size_t>(p.kv_heads) + static_cast<size_t>(kv_head)) * part.bytes;
    }

    // Asks for a tile's keys and values; zeroes stand where there is nothing to see.
    static DEVICE void load_tile(const AttentionParams &p, const Item &item, int kv_head, int begin, int oldest, const Shared &to) {
        HeadPart part = head_part(static_cast<CacheDtype>(p.dtype), p.block_size, p.d);
        const uint8_t *cache = static_cast<const uint8_t *>(p.cache);
        for (int at = thread(); at < POSITIONS * CHUNKS; at += ATTENTION_THREADS) {
            int row = at / CHUNKS, chunk = at % CHUNKS, position = begin + row;
            bool there = position >= oldest && position < static_cast<int>(item.end) && 16 * chunk < static_cast<int>(part.row);
            const uint8_t *from = cache;
            if (there) {
                int block = block_of(p, position), in = position - block * p.block_size;
                from = part_of(p, item, kv_head, part, block) + static_cast<size_t>(in) * part.row + static_cast<size_t>(16 * chunk);
            }
            copy_async(to.keys + place_of<ROW>(row, chunk), from, there);
            copy_async(to.values + place_of<ROW>(row, chunk), there ? from + part.keys : cache, there);
        }
        if (Cache::SCALED) {
            // Eight positions' scales at a time: those of positions that nobody sees are numbers, too.
            for (int at = thread(); at < SCALES / 8; at += ATTENTION_THREADS) {
                bool value = at >= POSITIONS / 8;
                int position = begin + at % (POSITIONS / 8) * 8;
                bool there = position + 8 > oldest && position < static_cast<int>(item.end);
                const uint8_t *from = cache;
                if (there) {
                    int block = block_of(p, position), in = position - block * p.block_size;
                    from = part_of(p, item, kv_head, part, block) + part.both + static_cast<size_t>(2 * (value ? p.block_size + in : in));
                }
                copy_async(to.scales + 8 * at, from, there);
            }
        }
        copy_async_commit();
    }

    // Multiplies what belongs to positions by their scales.
    static DEVICE void scale(const uint16_t *scales, float (&scores)[EIGHTS][4]) {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
            uint32_t pair = *reinterpret_cast<const uint32_t *>(scales + 8 * n + lane() % 4 * 2);
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] *= i % 2 == 0 ? low_bf16(pair) : high_bf16(pair);
        }
    }

    // One tile: `first` is the first of the warp's positions in it, `first_query` of its sixteen queries.
    static DEVICE void attend(const AttentionParams &p, const Item &item, const Shared &at, int begin, int first, int first_query, State &state) {
        int which = lane() / 8, in = lane() % 8;
        float scores[EIGHTS][4] = {};
        // 32 bytes of a row of keys at a time.
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            uint32_t a[Cache::STEPS][4];
#pragma unroll
            for (int step = 0; step < Cache::STEPS; step++) {
                int eight = 2 * (chunk / 2 * Cache::STEPS + step);
                load_matrices(a[step], at.queries + place_of<QUERY>(first_query + in + which % 2 * 8, eight + which / 2));
            }
#pragma unroll
            for (int n = 0; n < EIGHTS; n += 2) {
                // Matrices: the first 16 bytes of positions 0-7, then the next; and of positions 8-15.
                uint32_t b[4];
                load_matrices(b, at.keys + place_of<ROW>(first + 8 * n + in + which / 2 * 8, chunk + which % 2));
                Cache::scores(scores[n], scores[n + 1], a, b);
            }
        }
        if (Cache::SCALED) scale(at.scales + first, scores);
        soften(p, item, begin + first, first_query, scores, state);
        if (Cache::SCALED) scale(at.scales + POSITIONS + first, scores);
        // Scores stand in the registers as the left operand wants them.
#pragma unroll
        for (int n = 0; n < EIGHTS; n += 2) {
            uint32_t a[4] = {Cache::pack(scores[n][0], scores[n][1]), Cache::pack(scores[n][2], scores[n][3]),
                             Cache::pack(scores[n + 1][0], scores[n + 1][1]), Cache::pack(scores[n + 1][2], scores[n + 1][3])};
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
                // Matrices: positions 0-7 and 8-15 of the first 16 bytes, then of the next.
                uint32_t b[4];
                load_matrices_transposed(b, at.values + place_of<ROW>(first + 8 * n + in + which % 2 * 8, chunk + which / 2));
                Cache::weigh(&state.out[chunk * Cache::STEPS], a, b);
            }
        }
    }

    // Scores become weights under the running maximum; what was summed up before shrinks to it.
    static DEVICE void soften(const AttentionParams &p, const Item &item, int begin, int first_query, float (&scores)[EIGHTS][4], State &state) {
        int group = p.heads / p.kv_heads;
        // Scores are powers of two from here on. Those that are not capped are scaled in the same multiplication.
        float to_log2 = p.scale * LOG2_E;
        if (p.softcap > 0.0f) {
            to_log2 = LOG2_E;
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) scores[n][i] = capped(p, scores[n][i]);
            }
        }
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
                for (int i = 0; i < 2; i++) scores[n][2 * half + i] *= to_log2;
            }
            // Most tiles lie wholly before the queries that look at them. Queries that are not there see whatever others see.
            bool whole = query >= static_cast<int>(item.count) || (begin >= oldest && begin + 8 * EIGHTS - 1 <= last);
            if (vote(whole) != 0xffffffffu) {
#pragma unroll
                for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int at = begin + 8 * n + lane() % 4 * 2 + i;
                        float &score = scores[n][2 * half + i];
                        score = at >= oldest && at <= last ? score : -INFINITY;
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) most = fmaxf(most, scores[n][2 * half + i]);
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
            for (int eight = 0; eight < D / 8; eight++) {
                state.out[eight][2 * half] *= shrink;
                state.out[eight][2 * half + 1] *= shrink;
            }
            state.most[half] = most;
            state.sum[half] = sum;
        }
    }

    static DEVICE void run(const AttentionParams &p) {
        uint32_t at = static_cast<uint32_t>(block_x() + p.first);
        if (at >= p.step->list_lengths[p.list]) return;
        Item item = items(p)[at];
        int kv_head = block_y(), group = p.heads / p.kv_heads;
        // The oldest position that any of the queries sees, and the end of what any of them sees.
        int oldest = oldest_seen(p, static_cast<int>(item.start + item.first / static_cast<uint32_t>(group)));
        if (oldest < static_cast<int>(item.begin)) oldest = static_cast<int>(item.begin);
        int begin = oldest / POSITIONS * POSITIONS, end = static_cast<int>(item.end);
        if (SPLIT && oldest >= end) {
            // The window has passed: nobody reads values of a split without a maximum.
            size_t base = partial_of(item, kv_head);
            if (thread() < static_cast<int>(item.count)) p.softmax[base + static_cast<size_t>(thread())] = float2{-INFINITY, 0.0f};
            return;
        }
        load_queries(p, item, kv_head, shared_memory());
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
        if (begin < end) load_tile(p, item, kv_head, begin, oldest, memory(0));
        for (int stage = 0; begin < end; begin += POSITIONS) {
            bool more = begin + POSITIONS < end;
            if (more && STAGES == 2) {
                load_tile(p, item, kv_head, begin + POSITIONS, oldest, memory(stage ^ 1));
                copy_async_wait<1>();
            } else {
                copy_async_wait<0>();
            }
            block_barrier();
            int first = SPLIT ? warp() * (POSITIONS / ATTENTION_WARPS) : 0;
            attend(p, item, memory(stage), begin, first, first_query, state);
            // Nobody overwrites what others still read.
            block_barrier();
            if (more && STAGES == 1) load_tile(p, item, kv_head, begin + POSITIONS, oldest, memory(0));
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
            for (int eight = 0; eight < D / 8; eight++) {
                for (int i = 0; i < 2; i++) {
                    int k = Cache::element(eight, lane() % 4 * 2 + i);
                    if (k < p.d) put(p.out, row, head * p.d + k, state.out[eight][2 * half + i] * inverse);
                }
            }
        }
    }

    // Where an item's partial results for a KV head begin.
    static DEVICE size_t partial_of(const Item &item, int kv_head) {
        return static_cast<size_t>(item.partial) + static_cast<size_t>(kv_head) * static_cast<size_t>(item.count);
    }

    // From a query's values to the next's in shared memory: four queries' pairs are in different banks.
    static constexpr int VALUES = D + 8;

    // The warps' sums, added up in their order. Shared memory: [warps][16] maxima, [warps][16] sums, [warps][16][VALUES] values.
    static DEVICE void store_partial(const AttentionParams &p, const Item &item, int kv_head, const State &state) {
        float *most = reinterpret_cast<float *>(shared_memory());
        float *sums = most + ATTENTION_WARPS * 16, *out = sums + ATTENTION_WARPS * 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int query = lane() / 4 + 8 * half;
            // Generation has few queries: a group's.
            if (query >= static_cast<int>(item.count)) continue;
            if (lane() % 4 == 0) {
                most[warp() * 16 + query] = state.most[half];
                sums[warp() * 16 + query] = state.sum[half];
            }
            float *to = out + (warp() * 16 + query) * VALUES;
#pragma unroll
            for (int eight = 0; eight < D / 8; eight += 2) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    // Two columns that are neighbours.
                    float2 pair;
                    pair.x = Cache::INTERLEAVED ? state.out[eight][2 * half + i] : state.out[eight + i][2 * half];
                    pair.y = Cache::INTERLEAVED ? state.out[eight + 1][2 * half + i] : state.out[eight + i][2 * half + 1];
                    int k = Cache::INTERLEAVED ? Cache::element(eight, lane() % 4 * 2 + i) : Cache::element(eight + i, lane() % 4 * 2);
                    *reinterpret_cast<float2 *>(to + k) = pair;
                }
            }
        }
        block_barrier();
        size_t base = partial_of(item, kv_head);
        for (int at = thread(); at < static_cast<int>(item.count) * p.d; at += ATTENTION_THREADS) {
            int query = at / p.d, k = at % p.d;
            float largest = -INFINITY;
            for (int w = 0; w < ATTENTION_WARPS; w++) largest = fmaxf(largest, most[w * 16 + query]);
            float total = 0.0f, value = 0.0f;
            for (int w = 0; w < ATTENTION_WARPS && largest > -INFINITY; w++) {
                float weight = power_of_two(most[w * 16 + query] - largest);
                total = fmaf(weight, sums[w * 16 + query], total);
                value = fmaf(weight, out[(w * 16 + query) * VALUES + k], value);
            }
            size_t to = base + static_cast<size_t>(query);
            p.partial[to * static_cast<size_t>(p.d) + static_cast<size_t>(k)] = value;
            if (k == 0) p.softmax[to] = float2{largest, total};
        }
    }
};

#define SPLIT(D, name, Cache)                                                                                                   \
    KERNEL(attention_split_##D##_##name, AttentionParams, ATTENTION_THREADS) { Attend<D, true, Cache>::run(p); }
#define TOGETHER(D, name, Cache)                                                                                                \
    KERNEL(attention_together_##D##_##name, AttentionParams, ATTENTION_THREADS) { Attend<D, false, Cache>::run(p); }
// By shared memory there is room for two.
#define TOGETHER_TWO(D, name, Cache)                                                                                            \
    KERNEL_OF_BLOCKS(attention_together_##D##_##name, AttentionParams, ATTENTION_THREADS, 2) { Attend<D, false, Cache>::run(p); }
#define ATTENTION(name, Cache)                                                                                                  \
    SPLIT(64, name, Cache)                                                                                                      \
    SPLIT(128, name, Cache)                                                                                                     \
    SPLIT(256, name, Cache)                                                                                                     \
    TOGETHER(64, name, Cache)                                                                                                   \
    TOGETHER(256, name, Cache)

ATTENTION(f16, F16Cache)
ATTENTION(bf16, Bf16Cache)
ATTENTION(fp8, Fp8Cache)
TOGETHER_TWO(128, f16, F16Cache)
TOGETHER_TWO(128, bf16, Bf16Cache)
TOGETHER(128, fp8, Fp8Cache)

// Columns that a lane of attention_merge adds up.
constexpr int MERGE_COLUMNS = 4;

// A block for the queries of a Merge and one KV head, a warp for a query at a time. No load waits for another's result: what all splits say of the softmax
// comes first, then their values follow each other. A split that the query does not see has no weight: its maximum is -infinity, its sum 0, and its values are nobody's
// business.
KERNEL(attention_merge, AttentionParams, ATTENTION_THREADS) {
    uint32_t at = static_cast<uint32_t>(block_x() + p.first);
    if (at >= p.step->list_lengths[p.list]) return;
    Merge merge = reinterpret_cast<const Merge *>(words(p.step, p.step->lists[p.list]))[at];
    int kv_head = block_y(), group = p.heads / p.kv_heads;
    size_t base = static_cast<size_t>(merge.partial) + static_cast<size_t>(kv_head) * static_cast<size_t>(merge.count);
    for (int query = warp(); query < static_cast<int>(merge.count); query += ATTENTION_WARPS) {
        int f = static_cast<int>(merge.first) + query, head = kv_head * group + f % group;
        size_t first = base + static_cast<size_t>(query), stride = merge.stride, d = static_cast<size_t>(p.d);
        float sink = p.sinks != nullptr ? p.sinks[head] * LOG2_E : -INFINITY, most = -INFINITY, sum = 0.0f;
        for (uint32_t split = lane(); split < merge.splits; split += 32) most = fmaxf(most, p.softmax[first + split * stride].x);
        // Finite: a query sees its own position.
        most = fmaxf(warp_max(most), sink);
        for (uint32_t split = lane(); split < merge.splits; split += 32) {
            float2 softmax = p.softmax[first + split * stride];
            sum = fmaf(power_of_two(softmax.x - most), softmax.y, sum);
        }
        sum = warp_sum(sum) + power_of_two(sink - most);
        for (int k0 = lane(); k0 < p.d; k0 += 32 * MERGE_COLUMNS) {
            float value[MERGE_COLUMNS] = {};
#pragma unroll 4
            for (uint32_t split = 0; split < merge.splits; split++) {
                size_t from = first + split * stride;
                float of_split = p.softmax[from].x;
                if (of_split == -INFINITY) continue;
                float weight = power_of_two(of_split - most);
#pragma unroll
                for (int i = 0; i < MERGE_COLUMNS; i++) {
                    int k = k0 + 32 * i;
                    if (k < p.d) value[i] = fmaf(weight, p.partial[from * d + static_cast<size_t>(k)], value[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < MERGE_COLUMNS; i++) {
                int k = k0 + 32 * i;
                if (k < p.d) put(p.out, static_cast<size_t>(merge.row) + static_cast<size_t>(f / group), head * p.d + k, value[i] / sum);
            }
        }
    }
}
