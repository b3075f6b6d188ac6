// Products of words of 32 bits, which are floats, or pairs of bfloat16 where one instruction takes them. Of one factor
// a register holds words side by side; a word of the other is in all places of a register.

#pragma once

#include "avx2.h"

namespace {

// A register of floats, and of how many rows numbers are multiplied with it at once.
#ifdef __AVX512F__
using Vector = __m512;
constexpr int64_t LANES = 16, AT_ONCE = 8;
Vector all_of(float x) { return _mm512_set1_ps(x); }
Vector multiplied_and_added(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }  // the second, if one of them is NaN
#else
using Vector = __m256;
constexpr int64_t LANES = 8, AT_ONCE = 4;
Vector all_of(float x) { return _mm256_set1_ps(x); }
Vector multiplied_and_added(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
#endif
using Integers = int32_t __attribute__((vector_size(sizeof(Vector))));
constexpr int64_t VECTORS = 3;  // side by side: with `AT_ONCE` times as many sums, what the registers hold
constexpr int64_t WIDTH = VECTORS * LANES;

Vector& vector_at(float* at) { return *(Vector*)at; }
const Vector& vector_at(const float* at) { return *(const Vector*)at; }

// 2^x of x <= 0, to 2e-7; below -126 it is 0, and of NaN it is NaN.
Vector power_of_two(Vector x) {
    const Vector large = all_of(12582912 + 127);  // 1.5 * 2^23: a sum with it is whole, and its lowest bits an exponent
    const Vector shifted = x + large, r = x - (shifted - large);
    Vector y = all_of(1.54035304e-4f);
    for (const float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
        y = multiplied_and_added(y, r, all_of(factor));
    return x < -126.f ? Vector{} : y * (Vector)((Integers)shifted << 23);
}

// Eight words of each of eight registers, so that the first of all lie in the first.
void transpose(__m256 v[8]) {
    __m256 two[8], four[8];
    UNROLLED for (int i = 0; i < 8; i += 2)
        two[i] = _mm256_unpacklo_ps(v[i], v[i + 1]), two[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    UNROLLED for (int i = 0; i < 8; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0x44);
            four[i + 2 * j + 1] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0xee);
        }
    UNROLLED for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
    }
}

// How numbers are words: each is one, as a float.
template <class Number>
struct Singles {
    using Type = typename Number::Type;
    static constexpr int64_t COUNT = 1;
    static __m256 eight(const Type* at) { return Number::load(at); }
    static Vector add(Vector sums, Vector a, Vector b) { return multiplied_and_added(a, b, sums); }
    static Vector joined(const Vector* floats) { return *floats; }
    // Of as many rows as words have numbers, the words that have one of each.
    static void across(const Type* const* rows, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += 8) _mm256_store_ps(to + i, Number::load(*rows + i));
    }
};

#ifdef __AVX512BF16__
struct Pairs {  // two neighbors, the first below
    using Type = uint16_t;
    static constexpr int64_t COUNT = 2;
    static __m256 eight(const Type* at) { return _mm256_loadu_ps((const float*)at); }
    static Vector add(Vector sums, Vector a, Vector b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
    static Vector joined(const Vector* floats) {
        return interleaved((__m512i)_mm512_cvtne2ps_pbh(floats[1], floats[0]));
    }
    static void across(const Type* const* rows, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += 16) {
            const __m256i first = _mm256_loadu_si256((const __m256i*)(rows[0] + i));
            const __m256i second = _mm256_loadu_si256((const __m256i*)(rows[1] + i));
            vector_at(to + i) = interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
        }
    }

private:
    static Vector interleaved(__m512i halves) {
        using Order = uint16_t __attribute__((vector_size(64)));
        constexpr Order order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (Vector)_mm512_permutexvar_epi16((__m512i)order, halves);
    }
};
#endif

// c "AT_ONCE WIDTH" = c * factors + a "AT_ONCE words" times b "words WIDTH", where a's rows and words lie so far from
// each other; without factors, c is not read.
template <class Words>
void multiply(const float* a, int64_t row, int64_t word, const float* b, int64_t words, const float* factors,
              float* c) {
    Vector sums[AT_ONCE][VECTORS];
    UNROLLED for (int r = 0; r < AT_ONCE; r++)
        UNROLLED for (int v = 0; v < VECTORS; v++)
            sums[r][v] = factors ? vector_at(c + r * WIDTH + v * LANES) * vector_at(factors + v * LANES) : Vector{};
    for (int64_t w = 0; w < words; w++, a += word, b += WIDTH) {
        Vector right[VECTORS];
        UNROLLED for (int v = 0; v < VECTORS; v++) right[v] = vector_at(b + v * LANES);
        UNROLLED for (int r = 0; r < AT_ONCE; r++) {
            const Vector left = all_of(a[r * row]);
            UNROLLED for (int v = 0; v < VECTORS; v++) sums[r][v] = Words::add(sums[r][v], left, right[v]);
        }
    }
    UNROLLED for (int r = 0; r < AT_ONCE; r++)
        UNROLLED for (int v = 0; v < VECTORS; v++) vector_at(c + r * WIDTH + v * LANES) = sums[r][v];
}

}  // namespace
