// From a row of logits to a token: greedy, or drawn after min-p, top-k and top-p, as `draws.rs` says and the sampler on the host does it. A block for each row.
//
// A token's weight is e^(logit - largest), as the CPU computes it, in fixed point: sums of whole numbers are the same in any order, so that they may be made
// with atomics and a row's token depends on nothing but the row and its draw. What is below the last of 44 bits (for a vocabulary of 152 k) is cut off; over
// all tokens that is less than 2^-26 of the total.
//
// Nothing is sorted but what fits a list in shared memory. To draw from tokens best first, only three places are wanted: where top-k ends, where top-p
// ends, and where the draw falls. Tokens are counted and weighed in bins by their distance from the best; the bin of a place, with all better ones if
// there are few, is put in the list and sorted. One list mostly serves for all three. Where a bin holds more than the list — thousands of
// equal logits — it is divided again, and again, into bins of the pairs (logit, id), which are all different.
//
// A row of 4 · vocabulary bytes (608 KB for 152 k) is read once if greedy; twice if nothing limits the draw; three times if it has a peak, whatever limits
// it; four or five times if it is flat; up to 25 times if all logits are equal. At 256 rows each pass is 155 MB from memory, 50 µs of an H100's; a row by
// itself is read by one multiprocessor, which takes some 10 µs for it.
#include "params.cuh"

namespace sampling {

constexpr int SAMPLE_THREADS = 1024;
// Bins, and of those best first, how many of a unit of logits. The last holds all that are 16 or more below the best.
constexpr int BINS = 2048;
constexpr float BINS_PER_UNIT = 128.0f;
// Tokens that are sorted at once; a power of two.
constexpr int LIST = 2048;
// Logits that a thread asks memory for before it looks at them.
constexpr int AHEAD = 8;

// A draw, as `plan.rs` writes it down.
struct Draw {
    // Of the logits; -1: padding.
    int row;
    // Greedy has none; a scale is what logits are multiplied with.
    uint32_t greedy;
    float scale;
    uint32_t top_k;
    float top_p, within;
    uint32_t place[2];
    // Where its changes begin, in words from `base`, and how many there are of each kind.
    uint32_t first_change, changes[4];
};

struct Sample {
    const Step *step;
    // [rows, vocabulary]: changed where draws say so.
    float *logits;
    // [draws]
    uint32_t *tokens;
    int vocabulary;
    // What a weight of 1 is in fixed point: so much that the weights of a whole vocabulary do not overflow.
    float one;
};

// So many tokens, and what they weigh.
struct Sum {
    uint64_t weight;
    uint32_t count;
};

// A place among tokens that stand in a row: the first token with which the sum of counts, or of weights, reaches so much. At least 1.
struct Place {
    uint64_t target;
    bool by_weight;
};

DEVICE uint64_t along(const Place &place, const Sum &sum) { return place.by_weight ? sum.weight : sum.count; }

// Tokens that stand together in the row: from the first pair (key, id) to the last, what stands before them, and what they are.
struct Run {
    uint64_t first, last;
    Sum before, of;
};

// The block's shared memory.
struct Desk {
    uint32_t count[BINS], low[BINS], high[BINS];
    uint64_t list[LIST];
    // Of the list's tokens and all before them.
    uint64_t through[LIST];
    Sum of_warps[SAMPLE_THREADS / 32];
    uint64_t least_of_warps[SAMPLE_THREADS / 32];
    // What one thread found for all.
    Run found;
    uint32_t listed;
};

static_assert(sizeof(Desk) == 3 * 2048 * 4 + 2 * 2048 * 8 + 32 * 16 + 32 * 8 + 48 + 8, "what sampling.rs asks for");
static_assert(sizeof(Draw) == 13 * 4, "what plan.rs writes");

// Smaller for larger floats, and the same for both zeroes; not for what is not a number.
DEVICE uint32_t key_of(float x) {
    uint32_t bits = bits_of_float(x == 0.0f ? 0.0f : x);
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
DEVICE float of_key(uint32_t key) { return float_of_bits(key >> 31 ? key : ~key & 0x7fffffffu); }

constexpr uint32_t KEY_OF_MINUS_INFINITY = 0xff800000u;

// A row as a draw sees it.
struct Row {
    const float *logits;
    int vocabulary;
    float scale, largest, one;
    // The key of the least token that may be drawn.
    uint32_t last_key;
    // Tokens stand best first, or in order of their ids.
    bool best_first;
};

DEVICE float logit(const Row &row, int id) { return product(row.logits[id], row.scale); }

// e^x for x <= 0: the formula of `cpu/simd`, Cephes' polynomial.
DEVICE float exponential(float x) {
    x = fmaxf(x, -87.33f);
    float n = rintf(product(x, 1.44269504f));
    float r = fmaf(n, -0.6933594f, x);
    r = fmaf(n, 2.1219444e-4f, r);
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3981999e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, product(r, r), r + 1.0f);
    return product(p, float_of_bits(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23));
}

DEVICE uint64_t weight(const Row &row, float x) { return static_cast<uint64_t>(product(exponential(x - row.largest), row.one)); }

// What orders tokens: pairs, all different.
DEVICE uint64_t pair(const Row &row, uint32_t key, int id) {
    return static_cast<uint64_t>(row.best_first ? key : 0) << 32 | static_cast<uint32_t>(id);
}

// The bin of a token; never an earlier one for a token that is worse.
DEVICE int bin_of(const Row &row, float x) {
    float steps = product(row.largest - x, BINS_PER_UNIT);
    return steps < static_cast<float>(BINS - 1) ? static_cast<int>(steps) : BINS - 1;
}

// Calls `each` with the logit and the id of every token from `first` on and before `end`.
template <class Each> DEVICE void for_tokens(const Row &row, int first, int end, Each each) {
    for (int begin = first + thread(); begin < end; begin += AHEAD * SAMPLE_THREADS) {
        float x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int id = begin + i * SAMPLE_THREADS;
            x[i] = id < end ? logit(row, id) : NAN;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            // What is not a number is no token.
            if (x[i] == x[i]) each(x[i], begin + i * SAMPLE_THREADS);
        }
    }
}

// The least over a block; every thread gets it.
DEVICE uint64_t block_least(uint64_t x, Desk &desk) {
    for (int mask = 16; mask > 0; mask /= 2) {
        uint64_t other = exchange(x, mask);
        if (other < x) x = other;
    }
    if (lane() == 0) desk.least_of_warps[warp()] = x;
    block_barrier();
    for (int i = 0; i < SAMPLE_THREADS / 32; i++) {
        if (desk.least_of_warps[i] < x) x = desk.least_of_warps[i];
    }
    block_barrier();
    return x;
}

// The sum of all earlier threads' x, without this one's.
DEVICE Sum block_before(Sum x, Desk &desk) {
    Sum before = {0, 0}, all = x;
    for (int mask = 1; mask < 32; mask *= 2) {
        Sum other = {exchange(all.weight, mask), static_cast<uint32_t>(exchange(static_cast<int>(all.count), mask))};
        if (lane() & mask) {
            before.weight += other.weight;
            before.count += other.count;
        }
        all.weight += other.weight;
        all.count += other.count;
    }
    if (lane() == 0) desk.of_warps[warp()] = all;
    block_barrier();
    for (int i = 0; i < warp(); i++) {
        before.weight += desk.of_warps[i].weight;
        before.count += desk.of_warps[i].count;
    }
    block_barrier();
    return before;
}

DEVICE Sum in_bin(const Desk &desk, int bin) {
    return {static_cast<uint64_t>(desk.high[bin]) << 32 | desk.low[bin], desk.count[bin]};
}

// Adds to a bin. Two halves with a carry: additions of 32 bits are what shared memory does by itself.
DEVICE void put_in_bin(Desk &desk, int bin, const Sum &sum) {
    if (sum.count == 0) return;
    add_up(&desk.count[bin], sum.count);
    uint32_t low = static_cast<uint32_t>(sum.weight);
    uint32_t carry = add_up(&desk.low[bin], low) + low < low ? 1 : 0;
    uint32_t high = static_cast<uint32_t>(sum.weight >> 32) + carry;
    if (high > 0) add_up(&desk.high[bin], high);
}

// What a thread has for the bins. Most tokens of a row with a peak are in the last one, and all tokens of a row without one are in the same: many threads
// that add to one place would wait for each other, so a thread adds up what goes to the last bin, and what goes to the same bin one after the other.
struct Hand {
    Sum last, latest;
    int bin;
};

DEVICE void take(Hand &hand, Desk &desk, int bin, uint64_t weight) {
    if (bin == BINS - 1) {
        hand.last.weight += weight;
        hand.last.count++;
        return;
    }
    if (bin != hand.bin) {
        put_in_bin(desk, hand.bin, hand.latest);
        hand.latest = {0, 0};
        hand.bin = bin;
    }
    hand.latest.weight += weight;
    hand.latest.count++;
}

DEVICE void put_down(const Hand &hand, Desk &desk) {
    put_in_bin(desk, hand.bin, hand.latest);
    // A warp's together.
    Sum last = hand.last;
    for (int mask = 16; mask > 0; mask /= 2) {
        last.weight += exchange(last.weight, mask);
        last.count += static_cast<uint32_t>(exchange(static_cast<int>(last.count), mask));
    }
    if (lane() == 0) put_in_bin(desk, BINS - 1, last);
    block_barrier();
}

DEVICE void empty_bins(Desk &desk) {
    for (int bin = thread(); bin < BINS; bin += SAMPLE_THREADS) desk.count[bin] = desk.low[bin] = desk.high[bin] = 0;
    block_barrier();
}

// Ids in a bin, in order of ids: 128, or as many more as it takes.
DEVICE int ids_of_bin(int vocabulary) {
    int ids = 128;
    while (static_cast<long long>(ids) * BINS < vocabulary) ids *= 2;
    return ids;
}

// All tokens that may be drawn, in bins.
DEVICE void fill_bins(const Row &row, Desk &desk) {
    empty_bins(desk);
    if (row.best_first) {
        Hand hand = {{0, 0}, {0, 0}, 0};
        for_tokens(row, 0, row.vocabulary, [&](float x, int) {
            if (key_of(x) <= row.last_key) take(hand, desk, bin_of(row, x), weight(row, x));
        });
        put_down(hand, desk);
        return;
    }
    // A warp for a bin.
    int ids = ids_of_bin(row.vocabulary);
    for (int bin = warp(); bin < BINS && bin * ids < row.vocabulary; bin += SAMPLE_THREADS / 32) {
        Sum sum = {0, 0};
        for (int id = bin * ids + lane(); id < (bin + 1) * ids && id < row.vocabulary; id += 32) {
            float x = logit(row, id);
            if (x == x && key_of(x) <= row.last_key) {
                sum.weight += weight(row, x);
                sum.count++;
            }
        }
        for (int mask = 16; mask > 0; mask /= 2) {
            sum.weight += exchange(sum.weight, mask);
            sum.count += static_cast<uint32_t>(exchange(static_cast<int>(sum.count), mask));
        }
        if (lane() == 0) put_in_bin(desk, bin, sum);
    }
    block_barrier();
}

// Everything in the bins.
DEVICE Sum all_bins(Desk &desk) {
    Sum mine = {0, 0};
    for (int bin = 2 * thread(); bin < 2 * thread() + 2; bin++) {
        mine.weight += in_bin(desk, bin).weight;
        mine.count += in_bin(desk, bin).count;
    }
    Sum before = block_before(mine, desk);
    if (thread() == SAMPLE_THREADS - 1) desk.found.of = {before.weight + mine.weight, before.count + mine.count};
    block_barrier();
    Sum all = desk.found.of;
    block_barrier();
    return all;
}

// The bin that a place is in, `before` being what stands before all bins: its number as `first`, and the sums.
DEVICE Run bin_with(const Place &place, const Sum &before, Desk &desk) {
    int bin = 2 * thread();
    Sum two[2] = {in_bin(desk, bin), in_bin(desk, bin + 1)};
    Sum at = block_before({two[0].weight + two[1].weight, two[0].count + two[1].count}, desk);
    at.weight += before.weight;
    at.count += before.count;
    for (int i = 0; i < 2; i++) {
        Sum next = {at.weight + two[i].weight, at.count + two[i].count};
        if (along(place, at) < place.target && place.target <= along(place, next)) desk.found = {static_cast<uint64_t>(bin + i), 0, at, two[i]};
        at = next;
    }
    block_barrier();
    Run found = desk.found;
    block_barrier();
    return found;
}

// The first key from `from` on whose bin is `bin` or a later one, of those up to the last.
DEVICE uint32_t first_key_in(const Row &row, int bin) {
    uint32_t from = key_of(row.largest), end = row.last_key + 1;
    while (from < end) {
        uint32_t middle = from + (end - from) / 2;
        if (bin_of(row, of_key(middle)) < bin) {
            from = middle + 1;
        } else {
            end = middle;
        }
    }
    return from;
}

// Puts the tokens of a run into the list, sorted, with their sums. There is room for them.
DEVICE void list_run(const Row &row, const Run &run, Desk &desk) {
    int room = 32;
    while (room < static_cast<int>(run.of.count)) room *= 2;
    if (thread() == 0) desk.listed = 0;
    for (int i = thread(); i < room; i += SAMPLE_THREADS) desk.list[i] = ~0ull;
    block_barrier();
    // In order of ids, the run says which to read.
    int first = row.best_first ? 0 : static_cast<int>(run.first);
    int end = row.best_first || run.last >= static_cast<uint64_t>(row.vocabulary) ? row.vocabulary : static_cast<int>(run.last) + 1;
    for_tokens(row, first, end, [&](float x, int id) {
        uint32_t key = key_of(x);
        uint64_t place = pair(row, key, id);
        if (key <= row.last_key && place >= run.first && place <= run.last) desk.list[add_up(&desk.listed, 1)] = place;
    });
    block_barrier();
    // Bitonic: Batcher 1968. In order of ids there is an order already, but not in the list.
    for (int size = 2; size <= room; size *= 2) {
        for (int step = size / 2; step > 0; step /= 2) {
            for (int i = thread(); i < room / 2; i += SAMPLE_THREADS) {
                int low = i / step * 2 * step + i % step, high = low + step;
                uint64_t a = desk.list[low], b = desk.list[high];
                if ((a > b) == ((low & size) == 0)) {
                    desk.list[low] = b;
                    desk.list[high] = a;
                }
            }
            block_barrier();
        }
    }
    // Two a thread.
    uint64_t mine[2];
    for (int i = 0; i < 2; i++) {
        int at = 2 * thread() + i;
        bool there = at < static_cast<int>(run.of.count);
        uint64_t token = there ? desk.list[at] : 0;
        float x = row.best_first ? of_key(static_cast<uint32_t>(token >> 32)) : there ? logit(row, static_cast<int>(token)) : 0.0f;
        mine[i] = there ? weight(row, x) : 0;
    }
    uint64_t through = run.before.weight + block_before({mine[0] + mine[1], 0}, desk).weight;
    for (int i = 0; i < 2; i++) {
        through += mine[i];
        desk.through[2 * thread() + i] = through;
    }
    block_barrier();
}

// What the finding of places leaves behind for the next one.
struct Found {
    // The bins hold all tokens, and not those of a run.
    bool bins;
    // What is in the list.
    Run listed;
};

// The token at a place, and the sum of all up to it. The bins hold all tokens.
DEVICE uint64_t token_at(const Row &row, const Place &place, Found &found, Desk &desk, Sum &through) {
    const Run &listed = found.listed;
    Sum end = {listed.before.weight + listed.of.weight, listed.before.count + listed.of.count};
    if (!(along(place, listed.before) < place.target && place.target <= along(place, end))) {
        Run run = bin_with(place, {0, 0}, desk);
        int bin = static_cast<int>(run.first);
        Sum head = {run.before.weight + run.of.weight, run.before.count + run.of.count};
        bool few = head.count <= LIST;
        if (row.best_first) {
            // All better ones go with it, if there is room: the next place is among them.
            run.first = few ? 0 : static_cast<uint64_t>(first_key_in(row, bin)) << 32;
            run.last = (static_cast<uint64_t>(first_key_in(row, bin + 1)) << 32) - 1;
            if (few) {
                run.before = {0, 0};
                run.of = head;
            }
        } else {
            int ids = ids_of_bin(row.vocabulary);
            run.first = static_cast<uint64_t>(bin) * static_cast<uint64_t>(ids);
            run.last = run.first + static_cast<uint64_t>(ids) - 1;
        }
        while (run.of.count > LIST) {
            int shift = 0;
            while ((run.last - run.first) >> shift >= BINS) shift++;
            empty_bins(desk);
            found.bins = false;
            Hand hand = {{0, 0}, {0, 0}, 0};
            for_tokens(row, 0, row.vocabulary, [&](float x, int id) {
                uint32_t key = key_of(x);
                uint64_t at = pair(row, key, id);
                if (key <= row.last_key && at >= run.first && at <= run.last) {
                    take(hand, desk, static_cast<int>((at - run.first) >> shift), weight(row, x));
                }
            });
            put_down(hand, desk);
            Run part = bin_with(place, run.before, desk);
            part.first = run.first + (part.first << shift);
            part.last = part.first + (1ull << shift) - 1;
            if (part.last > run.last) part.last = run.last;
            run = part;
        }
        list_run(row, run, desk);
        found.listed = run;
    }
    for (int i = 0; i < 2; i++) {
        int at = 2 * thread() + i;
        if (at >= static_cast<int>(found.listed.of.count)) break;
        uint32_t count = found.listed.before.count + static_cast<uint32_t>(at);
        Sum before = {at == 0 ? found.listed.before.weight : desk.through[at - 1], count}, up_to = {desk.through[at], count + 1};
        if (along(place, before) < place.target && place.target <= along(place, up_to)) {
            desk.found.first = desk.list[at];
            desk.found.of = up_to;
        }
    }
    block_barrier();
    uint64_t token = desk.found.first;
    through = desk.found.of;
    block_barrier();
    return token;
}

// Does what a draw says to the logits of its row. No token twice in one kind (but forbidden), so that the order of threads is of no importance.
DEVICE void change(const Step *step, const Draw &draw, float *logits, int vocabulary) {
    const uint32_t *changes = words(step, draw.first_change);
    for (int kind = 0; kind < 4; kind++) {
        uint32_t count = draw.changes[kind];
        if (count == 0) continue;
        for (uint32_t i = static_cast<uint32_t>(thread()); i < count; i += SAMPLE_THREADS) {
            uint32_t token = changes[2 * i];
            float amount = float_of_bits(changes[2 * i + 1]);
            if (token >= static_cast<uint32_t>(vocabulary)) continue;
            float x = logits[token];
            if (kind == 0) x = x > 0.0f ? x / amount : product(x, amount);
            if (kind == 1) x = x - amount;
            if (kind == 2) x = x + amount;
            if (kind == 3) x = -INFINITY;
            logits[token] = x;
        }
        changes += 2 * count;
        block_barrier();
    }
}

KERNEL(sample, Sample, SAMPLE_THREADS) {
    Desk &desk = *reinterpret_cast<Desk *>(shared_memory());
    const Draw draw = reinterpret_cast<const Draw *>(words(p.step, p.step->draws))[block_x()];
    if (draw.row < 0) return;
    float *logits = p.logits + static_cast<size_t>(draw.row) * static_cast<size_t>(p.vocabulary);
    change(p.step, draw, logits, p.vocabulary);
    Row row = {logits, p.vocabulary, draw.scale, 0.0f, p.one, 0, draw.top_k > 0 || draw.top_p < 1.0f || draw.within < INFINITY};

    // The largest, of equals the first; a row that has none, being not a number anywhere, gives token 0.
    uint64_t best = ~0ull;
    for_tokens(row, 0, row.vocabulary, [&](float x, int id) {
        uint64_t at = static_cast<uint64_t>(key_of(x)) << 32 | static_cast<uint32_t>(id);
        if (at < best) best = at;
    });
    best = block_least(best, desk);
    row.largest = of_key(static_cast<uint32_t>(best >> 32));
    if (best == ~0ull || draw.greedy || !(fabs(row.largest) < INFINITY)) {
        if (thread() == 0) p.tokens[block_x()] = best == ~0ull ? 0 : static_cast<uint32_t>(best);
        return;
    }
    row.last_key = key_of(row.largest - draw.within);
    if (row.last_key >= KEY_OF_MINUS_INFINITY) row.last_key = KEY_OF_MINUS_INFINITY - 1;

    // Where top-k ends, where top-p ends, where the draw falls.
    double place;
    memcpy(&place, draw.place, sizeof place);
    Found found = {false, {0, 0, {0, 0}, {0, 0}}};
    Sum kept = {0, 0};
    uint64_t token = 0;
#pragma unroll 1
    for (int stage = 0; stage < 3; stage++) {
        if (!found.bins) fill_bins(row, desk);
        found.bins = true;
        if (stage == 0) kept = all_bins(desk);
        Place wanted = {draw.top_k, false};
        if (stage == 0 && (draw.top_k == 0 || draw.top_k >= kept.count)) continue;
        if (stage == 1) {
            if (draw.top_p >= 1.0f) continue;
            // As much as is enough.
            wanted = {static_cast<uint64_t>(ceil(static_cast<double>(kept.weight) * static_cast<double>(draw.top_p))), true};
        }
        if (stage == 2) {
            // More than the place: rounding may take it to the end, but not beyond.
            wanted = {static_cast<uint64_t>(place * static_cast<double>(kept.weight)) + 1, true};
            if (wanted.target > kept.weight) wanted.target = kept.weight;
        }
        token = token_at(row, wanted, found, desk, kept);
    }
    if (thread() == 0) p.tokens[block_x()] = static_cast<uint32_t>(token);
}

} // namespace sampling
