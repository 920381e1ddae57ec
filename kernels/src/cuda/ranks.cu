// What is made of the ranks' parts once they have been exchanged.
#include "params.cuh"

constexpr int RANKS_THREADS = 256;

// out (+)= Σ parts, in the order of the ranks.
struct AddParts {
    // [ranks, count]
    const float *parts;
    // [count]
    float *out;
    long long count;
    int ranks;
    // Whether to what is there.
    int add;
};

KERNEL(add_parts, AddParts, RANKS_THREADS) {
    for (long long i = static_cast<long long>(block_x()) * RANKS_THREADS + thread(); i < p.count; i += static_cast<long long>(blocks_x()) * RANKS_THREADS) {
        float sum = 0.0f;
        for (int rank = 0; rank < p.ranks; rank++) sum += p.parts[rank * p.count + i];
        p.out[i] = p.add ? p.out[i] + sum : sum;
    }
}

// Logits of which each rank has made those of its own tokens: rows of the same length on every rank, the end of which may be unused, become rows of the
// vocabulary.
struct JoinLogits {
    // [ranks, rows, widest]
    const float *parts;
    // [rows, vocabulary]
    float *out;
    int rows, widest, vocabulary, ranks;
};

KERNEL(join_logits, JoinLogits, RANKS_THREADS) {
    // As `Rank::share`: the first ranks have one more where it does not divide.
    int even = p.vocabulary / p.ranks, more = p.vocabulary % p.ranks, larger = more * (even + 1);
    size_t row = static_cast<size_t>(block_x()), rows = static_cast<size_t>(p.rows), widest = static_cast<size_t>(p.widest);
    float *out = p.out + row * static_cast<size_t>(p.vocabulary);
    for (int token = block_y() * RANKS_THREADS + thread(); token < p.vocabulary; token += blocks_y() * RANKS_THREADS) {
        int rank = token < larger ? token / (even + 1) : more + (token - larger) / even;
        int first = rank * even + (rank < more ? rank : more);
        out[token] = p.parts[(static_cast<size_t>(rank) * rows + row) * widest + static_cast<size_t>(token - first)];
    }
}
