// How weights lie in device memory, and how they become the bf16 pairs that tensor cores multiply.
//
// A format is read in *runs*: as many elements of a row as lie in 16 bytes of its first plane (`quants`). A run never crosses a scale
// group, and its elements come out as pairs in order of k. `matrix.rs` writes these layouts; the formulas are those of `quantize/`.
//
// | format | quants | scales | more | a weight |
// |---|---|---|---|---|
// | Bf16, F16 | 16-bit floats | | | the float |
// | Q4_0 | nibbles, see below | f16 a block of 32 | | d · (q - 8) |
// | Q5_1 | nibbles | two f16 a block of 32 | a word of fifth bits a block | d · q + m |
// | Q4_K | nibbles | two bytes (scale, minimum) a block of 32 | two f16 for 256 | d · s · q - dmin · m |
// | Q8_0 | bytes, plus 128 | f16 a block of 32 | | d · (q - 128) |
// | Int4 | nibbles | two f32 (scale, minimum) a group | | s · q + m |
// | Int8 | bytes | two f32 a group | | s · q + m |
// | Fp8 | E4M3 | f32 a group | | s · value |
//
// Nibbles: a word holds eight elements; nibble i is element 2i and nibble i + 4 is element 2i + 1, so that one mask takes a pair out.
#pragma once
#include "params.cuh"

// Which floats tensor cores multiply.
struct MultipliesBf16 {
    static DEVICE uint32_t pack(float low, float high) { return pack_bf16(low, high); }
    static DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(c, a, b); }
    static DEVICE uint32_t activations(uint32_t pair) { return pair; }
    static DEVICE float low(uint32_t pair) { return low_bf16(pair); }
    static DEVICE float high(uint32_t pair) { return high_bf16(pair); }
};
struct MultipliesF16 {
    static DEVICE uint32_t pack(float low, float high) { return pack_f16(low, high); }
    static DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(c, a, b); }
    // A bf16 pair as f16, within its range.
    static DEVICE float clamp(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }
    static DEVICE uint32_t activations(uint32_t pair) { return pack_f16(clamp(low_bf16(pair)), clamp(high_bf16(pair))); }
    static DEVICE float low(uint32_t pair) { return f16_value(static_cast<uint16_t>(pair)); }
    static DEVICE float high(uint32_t pair) { return f16_value(static_cast<uint16_t>(pair >> 16)); }
};

// What is loaded for a run, so that loads can go ahead of the arithmetic.
struct Run {
    uint4 quants;
    float scale, minimum;
    uint32_t more;
};

DEVICE void words_of(const uint4 &q, uint32_t (&w)[4]) {
    w[0] = q.x;
    w[1] = q.y;
    w[2] = q.z;
    w[3] = q.w;
}

DEVICE uint32_t twice_bf16(float x) { return pack_bf16(x, x); }

// Nibbles (and what is above them, from `above`) as bf16: 0x4300 is 128 in bf16, whose last seven bits count in ones.
DEVICE uint32_t small_integers(uint32_t bits) { return fma_bf16(bits | 0x43004300u, 0x3f803f80u, 0xc300c300u); }

struct Bf16 : MultipliesBf16 {
    static constexpr int RUN = 8;
    static DEVICE void load(const Weights &w, size_t row, int k, Run &run) {
        run.quants = load16(w.quants + (row * static_cast<size_t>(w.cols) + static_cast<size_t>(k)) * 2);
    }
    static DEVICE void expand(const Run &run, uint32_t (&pairs)[RUN / 2]) { words_of(run.quants, pairs); }
};

struct F16 : MultipliesF16 {
    static constexpr int RUN = 8;
    static DEVICE void load(const Weights &w, size_t row, int k, Run &run) { Bf16::load(w, row, k, run); }
    static DEVICE void expand(const Run &run, uint32_t (&pairs)[RUN / 2]) { words_of(run.quants, pairs); }
};

struct Nibbles : MultipliesBf16 {
    static constexpr int RUN = 32;
    static DEVICE size_t block(const Weights &w, size_t row, int k) {
        return row * static_cast<size_t>(w.cols / 32) + static_cast<size_t>(k / 32);
    }
    static DEVICE void expand(const Run &run, uint32_t (&pairs)[RUN / 2]) {
        uint32_t w[4];
        words_of(run.quants, w);
        uint32_t scale = twice_bf16(run.scale), minimum = twice_bf16(run.minimum);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            pairs[i] = fma_bf16(small_integers(w[i / 4] >> (4 * (i % 4)) & 0x000f000fu), scale, minimum);
        }
    }
};

struct Q4_0 : Nibbles {
    static DEVICE void load(const Weights &w, size_t row, int k, Run &run) {
        size_t at = block(w, row, k);
        run.quants = load16(w.quants + at * 16);
        run.scale = f16_value(reinterpret_cast<const uint16_t *>(w.scales)[at]);
    }
    static DEVICE void expand(const Run &run, uint32_t (&pairs)[RUN / 2]) {
        uint32_t w[4];
        words_of(run.quants, w);
        uint32_t scale = twice_bf16(run.scale);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            // 136 is 128 and Q4_0's 8: the difference is exact, and then rounded once.
            uint32_t q = fma_bf16((w[i / 4] >> (4 * (i % 4)) & 0x000f000fu) | 0x43004300u, 0x3f803f80u, 0xc308c308u);
            pairs[i] = fma_bf16(q, scale, 0x80008000u);
        }
    }
};

struct Q4_K : Nibbles {
    static DEVICE void load(const Weights &w, size_t row, int k, Run &run) {
        size_t at = block(w, row, k);
        run.quants = load16(w.quants + at * 16);
        uint32_t smalls = reinterpret_cast<const uint16_t *>(w.scales)[at];
        uint32_t halves = load4(w.more + (at / 8) * 4);
        run.scale = f16_value(static_cast<uint16_t>(halves)) * static_cast<float>(smalls & 0xff);
        run.minimum = -f16_value(static_cast<uint16_t>(halves >> 16)) * static_cast<float>(smalls >> 8);
    }
};

struct Int4 : Nibbles {
    static DEVICE void load(const Weights &w, size_t row, int k, Run &run) {
        run.quants = load16(w.quants + block(w, row, k) * 16);
        const float *side = reinterpret_cast<const float *>(w.scales) + 2 * group_of(w, row, k);
        run.scale = side[0];
        run.minimum = side[1];
    }
};

struct Q5_1 : Nibbles {
    static DEVICE void load(const Weights &w, size_t row, int k, Run &run) {
        size_t at = block(w, row, k);
        run.quants = load16(w.quants + at * 16);
        uint32_t halves = load4(w.scales + at * 4);
        run.scale = f16_value(static_cast<uint16_t>(halves));
        run.minimum = f16_value(static_cast<uint16_t>(halves >> 16));
        run.more = load4(w.more + at * 4);
    }
    // Pair i's fifth bits are bits i and i + 16 of the word.
    static DEVICE void expand(const Run &run, uint32_t (&pairs)[RUN / 2]) {
        uint32_t w[4];
        words_of(run.quants, w);
        uint32_t scale = twice_bf16(run.scale), minimum = twice_bf16(run.minimum);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            uint32_t q = (w[i / 4] >> (4 * (i % 4)) & 0x000f000fu) | (run.more >> i & 0x00010001u) << 4;
            pairs[i] = fma_bf16(small_integers(q), scale, minimum);
        }
    }
};

struct Bytes : MultipliesBf16 {
    static constexpr int RUN = 16;
    static DEVICE uint4 quants(const Weights &w, size_t row, int k) {
        return load16(w.quants + row * static_cast<size_t>(w.cols) + static_cast<size_t>(k));
    }
    // Byte `i` of a word, less `zero`, as a float: 0x4b000000 is 2^23, whose last bits count in ones.
    static DEVICE float byte(uint32_t word, uint32_t i, float zero) {
        return float_of_bits(permute_bytes(word, 0x4b000000u, 0x7440u | i)) - (8388608.0f + zero);
    }
};

struct Q8_0 : Bytes {
    static DEVICE void load(const Weights &w, size_t row, int k, Run &run) {
        run.quants = quants(w, row, k);
        size_t at = row * static_cast<size_t>(w.cols / 32) + static_cast<size_t>(k / 32);
        run.scale = f16_value(reinterpret_cast<const uint16_t *>(w.scales)[at]);
    }
    static DEVICE void expand(const Run &run, uint32_t (&pairs)[RUN / 2]) {
        uint32_t w[4];
        words_of(run.quants, w);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t word = w[i / 2], at = 2 * (i % 2);
            pairs[i] = pack_bf16(byte(word, at, 128.0f) * run.scale, byte(word, at + 1, 128.0f) * run.scale);
        }
    }
};

struct Int8 : Bytes {
    static DEVICE void load(const Weights &w, size_t row, int k, Run &run) {
        run.quants = quants(w, row, k);
        const float *side = reinterpret_cast<const float *>(w.scales) + 2 * group_of(w, row, k);
        run.scale = side[0];
        run.minimum = side[1];
    }
    static DEVICE void expand(const Run &run, uint32_t (&pairs)[RUN / 2]) {
        uint32_t w[4];
        words_of(run.quants, w);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t word = w[i / 2], at = 2 * (i % 2);
            float low = fmaf(byte(word, at, 0.0f), run.scale, run.minimum);
            float high = fmaf(byte(word, at + 1, 0.0f), run.scale, run.minimum);
            pairs[i] = pack_bf16(low, high);
        }
    }
};

struct Fp8 : Bytes {
    static DEVICE void load(const Weights &w, size_t row, int k, Run &run) {
        run.quants = quants(w, row, k);
        run.scale = reinterpret_cast<const float *>(w.scales)[group_of(w, row, k)];
    }
    // The fields of E4M3 at the places of f32's, whose exponent has another bias: off by 2^120. The files hold no NaN (it is refused).
    static DEVICE float value(uint32_t word, int byte) {
        uint32_t bits = word >> (8 * byte);
        float small = float_of_bits((bits & 0x80u) << 24 | (bits & 0x7fu) << 20);
        return small * 1.329227995784916e36f;
    }
    static DEVICE void expand(const Run &run, uint32_t (&pairs)[RUN / 2]) {
        uint32_t w[4];
        words_of(run.quants, w);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t word = w[i / 2];
            int at = 2 * (i % 2);
            pairs[i] = pack_bf16(value(word, at) * run.scale, value(word, at + 1) * run.scale);
        }
    }
};
