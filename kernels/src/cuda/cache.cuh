// How keys and values lie in a page, and how they become what tensor cores multiply.
//
// A KV head's part of a block is its keys, `[block_size][d]`, and then its values. Of FP8 follow the scales, bf16: one of each key, then one of
// each value, `[2][block_size]`. Every head's part is a multiple of 16 bytes.
//
// A scale belongs to one position of one head because such a row is what is stored at once and never again: a scale of more rows would have to
// be known before they are, or rows be rounded twice. It is a factor of a score, or of a value's weight: a multiplication for d elements.
#pragma once
#include "formats.cuh"

// `KvDtype` of the host, as `buffers.rs` numbers it.
enum class CacheDtype : int { F16 = 0, F32 = 1, BF16 = 2, FP8 = 3 };

// Bytes of an element.
DEVICE int cache_width(CacheDtype dtype) { return dtype == CacheDtype::F32 ? 4 : dtype == CacheDtype::FP8 ? 1 : 2; }

// A KV head's part of a block, in bytes.
struct HeadPart {
    // Of one row; of all keys, where the values begin; of keys and values, where scales begin.
    size_t row, keys, both;
    size_t bytes;
};

DEVICE HeadPart head_part(CacheDtype dtype, int block_size, int d) {
    HeadPart part;
    part.row = static_cast<size_t>(d * cache_width(dtype));
    part.keys = static_cast<size_t>(block_size) * part.row;
    part.both = 2 * part.keys;
    part.bytes = part.both + (dtype == CacheDtype::FP8 ? 4 * static_cast<size_t>(block_size) : 0);
    return part;
}

// Largest E4M3 float.
constexpr float E4M3_MOST = 448.0f;

// The nearest E4M3 float of a number within ±448, ties to even. In integers, so that GPUs with and without an instruction for it agree.
DEVICE uint8_t to_e4m3(float x) {
    uint32_t bits = bits_of_float(x), sign = bits >> 24 & 0x80u;
    float magnitude = fabsf(x);
    // Below the least normal number, in units of 2^-9: added to 1.5 · 2^23 they are the last bits, rounded.
    if (magnitude < 0.015625f) return static_cast<uint8_t>(sign | (bits_of_float(fmaf(magnitude, 512.0f, 12582912.0f)) & 0xfu));
    bits = (bits & 0x7fffffffu) + 0x7ffffu + (bits >> 20 & 1u);
    // The exponent's bias is 7 and not 127.
    return static_cast<uint8_t>(sign | ((bits >> 20) - (120u << 3)));
}

// The bf16 scale, rounded up, under which the largest of some numbers is at most 448, and its inverse; 0 where all are nearly nothing.
// Scales are finite whatever the numbers are: a masked position's is multiplied with.
DEVICE uint16_t e4m3_scale(float most, float &inverse) {
    uint32_t scale = (bits_of_float(fminf(most, 3.0e38f) / E4M3_MOST) + 0xffffu) >> 16;
    inverse = 1.0f / bf16_value(static_cast<uint16_t>(scale));
    // The inverse of what is nearly nothing is too much for a float.
    if (inverse <= 3.0e38f) return static_cast<uint16_t>(scale);
    inverse = 0.0f;
    return 0;
}

// An element of a cache, its scale left out.
DEVICE float cache_element(CacheDtype dtype, const uint8_t *row, int k) {
    if (dtype == CacheDtype::F32) return reinterpret_cast<const float *>(row)[k];
    if (dtype == CacheDtype::FP8) return Fp8::value(row[k], 0);
    uint16_t bits = reinterpret_cast<const uint16_t *>(row)[k];
    return dtype == CacheDtype::BF16 ? bf16_value(bits) : f16_value(bits);
}

// What the tensor-core kernels are compiled for. `WIDTH`: bytes of an element. `STEPS`: products of 16 columns in 32 bytes of a row.
// `element`: which column stands at `place` of the `eight`th eight of queries and of sums. (Queries and keys may have their columns in any
// order, if it is the same.) `INTERLEAVED`: neighbours are in two eights, at the same place, and not in one. `b` is what ldmatrix brings of
// 16 positions × 32 bytes.
struct SixteenBits {
    static constexpr int WIDTH = 2, STEPS = 1;
    static constexpr bool SCALED = false, INTERLEAVED = false;
    static DEVICE int element(int eight, int place) { return 8 * eight + place; }
};
template <class Multiplies> struct CacheOf : SixteenBits {
    static DEVICE uint32_t pack(float low, float high) { return Multiplies::pack(low, high); }
    // Scores of positions 0-7 and 8-15.
    static DEVICE void scores(float (&low)[4], float (&high)[4], const uint32_t (&a)[STEPS][4], const uint32_t (&b)[4]) {
        uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        Multiplies::mma(low, a[0], first);
        Multiplies::mma(high, a[0], second);
    }
    // Sums of values, two eights.
    static DEVICE void weigh(float (*out)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
        uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        Multiplies::mma(out[0], a, first);
        Multiplies::mma(out[1], a, second);
    }
};
using F16Cache = CacheOf<MultipliesF16>;
using Bf16Cache = CacheOf<MultipliesBf16>;
// E4M3 is widened to bf16 and not to f16, which is exact either way: a value's weight is multiplied with its scale, and f16 has no room for that.
struct Fp8Cache {
    static constexpr int WIDTH = 1, STEPS = 2;
    static constexpr bool SCALED = true, INTERLEAVED = true;
    // Of sixteen columns those of even number come first: so two bytes of each word become a pair with no more than masks and shifts.
    static DEVICE int element(int eight, int place) { return 16 * (eight / 2) + 2 * place + eight % 2; }
    static DEVICE uint32_t pack(float low, float high) { return pack_bf16(low, high); }
    // Bytes 0 and 2 of a word, and bytes 1 and 3. 0x7b80 is 2^120, 0x8000 is -0: the product is exact.
    static DEVICE void widen(uint32_t word, uint32_t &even, uint32_t &odd) {
        even = fma_bf16((word << 8 & 0x80008000u) | (word << 4 & 0x07f007f0u), 0x7b807b80u, 0x80008000u);
        odd = fma_bf16((word & 0x80008000u) | (word >> 4 & 0x07f007f0u), 0x7b807b80u, 0x80008000u);
    }
    // Scores of positions 0-7 and 8-15: two products each.
    static DEVICE void scores(float (&low)[4], float (&high)[4], const uint32_t (&a)[STEPS][4], const uint32_t (&b)[4]) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t first[2], second[2];
            widen(b[step], first[0], first[1]);
            widen(b[step + 2], second[0], second[1]);
            mma_bf16(low, a[step], first);
            mma_bf16(high, a[step], second);
        }
    }
    // Sums of values, four eights: of each sixteen the even columns, then the odd ones.
    static DEVICE void weigh(float (*out)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
#pragma unroll
        for (int sixteen = 0; sixteen < 2; sixteen++) {
            uint32_t even[2], odd[2];
            widen(b[2 * sixteen], even[0], odd[0]);
            widen(b[2 * sixteen + 1], even[1], odd[1]);
            mma_bf16(out[2 * sixteen], a, even);
            mma_bf16(out[2 * sixteen + 1], a, odd);
        }
    }
};
