// A mixture of experts: which experts a row uses, rows sorted by expert, their answers summed up.
//
// Nothing here depends on the order in which blocks run: counts are whole numbers, places are in order of rows, and a row adds its experts'
// answers up in the order in which the router scored them.
#include "params.cuh"

constexpr int ROUTE_THREADS = 128;
constexpr int SORT_THREADS = 256;
constexpr int COMBINE_THREADS = 256;

struct Route {
    // [rows, experts]
    const float *scores;
    // [rows, top_k]: best first.
    int *chosen;
    float *weights;
    int rows, experts, top_k;
    // The weights are the softmax over the chosen; otherwise over all experts.
    int normalised;
};

// A warp for each row. Of equal scores the first expert is the better one, and what is not a number comes last.
KERNEL(route, Route, ROUTE_THREADS) {
    int row = block_x() * (ROUTE_THREADS / 32) + warp();
    if (row >= p.rows) return;
    const float *scores = p.scores + static_cast<size_t>(row) * static_cast<size_t>(p.experts);
    int *chosen = p.chosen + static_cast<size_t>(row) * static_cast<size_t>(p.top_k);
    float *weights = p.weights + static_cast<size_t>(row) * static_cast<size_t>(p.top_k);
    float last = INFINITY, most = 0.0f, total = 0.0f;
    int last_expert = -1;
    for (int choice = 0; choice < p.top_k; choice++) {
        // The best that comes after the last one.
        float best = -INFINITY;
        int expert = p.experts;
        for (int e = lane(); e < p.experts; e += 32) {
            float score = scores[e] == scores[e] ? scores[e] : -INFINITY;
            bool after = score < last || (score == last && e > last_expert);
            if (after && (expert == p.experts || score > best)) {
                best = score;
                expert = e;
            }
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            float other = exchange(best, mask);
            int other_expert = exchange(expert, mask);
            if (other_expert < p.experts && (expert == p.experts || other > best || (other == best && other_expert < expert))) {
                best = other;
                expert = other_expert;
            }
        }
        if (choice == 0) most = best;
        // Of a row of infinities nothing sensible is left, but it is in bounds.
        float weight = best == most ? 1.0f : expf(best - most);
        if (lane() == 0) {
            chosen[choice] = expert;
            weights[choice] = weight;
        }
        total += weight;
        last = best;
        last_expert = expert;
    }
    if (!p.normalised) {
        float sum = 0.0f;
        for (int e = lane(); e < p.experts; e += 32) sum += scores[e] == most ? 1.0f : expf(scores[e] - most);
        total = warp_sum(sum);
    }
    warp_barrier();
    for (int choice = lane(); choice < p.top_k; choice += 32) weights[choice] /= total;
}

struct Sort {
    // [choices]: `rows · top_k`.
    const int *chosen;
    // Of each choice its place, and of each place its row.
    uint32_t *places;
    uint32_t *row_of;
    Tile *tiles;
    uint32_t *tile_count;
    int choices, top_k, experts;
    // Most rows of a tile.
    int tile_rows;
};

// A block for each expert. Shared memory: [experts] counts, [warps] counts.
KERNEL(sort_by_expert, Sort, SORT_THREADS) {
    int *counts = reinterpret_cast<int *>(shared_memory());
    int *of_warps = counts + p.experts;
    int mine = block_x();
    for (int e = thread(); e < p.experts; e += SORT_THREADS) counts[e] = 0;
    block_barrier();
    for (int i = thread(); i < p.choices; i += SORT_THREADS) count_up(counts + p.chosen[i]);
    block_barrier();
    int first = 0, tile = 0, tiles = 0;
    for (int e = 0; e < p.experts; e++) {
        int of_expert = (counts[e] + p.tile_rows - 1) / p.tile_rows;
        if (e < mine) {
            first += counts[e];
            tile += of_expert;
        }
        tiles += of_expert;
    }
    if (mine == 0 && thread() == 0) *p.tile_count = static_cast<uint32_t>(tiles);
    int count = counts[mine];
    for (int i = thread() * p.tile_rows; i < count; i += SORT_THREADS * p.tile_rows) {
        Tile *to = p.tiles + tile + i / p.tile_rows;
        to->expert = static_cast<uint32_t>(mine);
        to->first = static_cast<uint32_t>(first + i);
        to->rows = static_cast<uint32_t>(count - i < p.tile_rows ? count - i : p.tile_rows);
    }
    // Places in order of choices: how many before this one are the expert's.
    int before = first;
    for (int begin = 0; begin < p.choices; begin += SORT_THREADS) {
        int i = begin + thread();
        bool is = i < p.choices && p.chosen[i] == mine;
        uint32_t votes = vote(is);
        if (lane() == 0) of_warps[warp()] = count_bits(votes);
        block_barrier();
        int place = before;
        for (int w = 0; w < SORT_THREADS / 32; w++) {
            if (w < warp()) place += of_warps[w];
            before += of_warps[w];
        }
        place += count_bits(votes & ((1u << lane()) - 1));
        if (is) {
            p.places[i] = static_cast<uint32_t>(place);
            p.row_of[place] = static_cast<uint32_t>(i / p.top_k);
        }
        block_barrier();
    }
}

struct Combine {
    // [choices, cols]
    const float *answers;
    const uint32_t *places;
    const float *weights;
    // [rows, cols]
    float *out;
    int cols, top_k;
    // Whether to what is there.
    int add;
};

KERNEL(combine_experts, Combine, COMBINE_THREADS) {
    size_t row = static_cast<size_t>(block_x()), cols = static_cast<size_t>(p.cols), top_k = static_cast<size_t>(p.top_k);
    for (int i = block_y() * COMBINE_THREADS + thread(); i < p.cols; i += blocks_y() * COMBINE_THREADS) {
        float sum = p.add ? p.out[row * cols + static_cast<size_t>(i)] : 0.0f;
        for (size_t choice = row * top_k; choice < (row + 1) * top_k; choice++) {
            sum = fmaf(p.weights[choice], p.answers[p.places[choice] * cols + static_cast<size_t>(i)], sum);
        }
        p.out[row * cols + static_cast<size_t>(i)] = sum;
    }
}
