// A matrix product whose accumulators stay in registers: TILE_ROWS rows of `WIDTH` columns.
//
// A lane of 32 bits holds one float, or a pair of bfloat16 numbers where one instruction multiplies pairs and adds both
// products. The right factor is loaded vector by vector. Each lane of the left factor is broadcast to a whole register.

#pragma once

#include "avx2.h"

namespace {

// A register of floats, its lanes, and the rows of a tile.
#ifdef __AVX512F__
using Vector = __m512;
constexpr int64_t LANES = 16, TILE_ROWS = 8;
Vector broadcast(float x) { return _mm512_set1_ps(x); }
Vector fmadd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
Vector vector_max(Vector a, Vector b) { return _mm512_max_ps(a, b); }  // b if one of them is NaN
#else
using Vector = __m256;
constexpr int64_t LANES = 8, TILE_ROWS = 4;
Vector broadcast(float x) { return _mm256_set1_ps(x); }
Vector fmadd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
Vector vector_max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
#endif
using IntVector = int32_t __attribute__((vector_size(sizeof(Vector))));
constexpr int64_t VECTORS = 3;  // in a row of a tile; TILE_ROWS rows of them and the factors fill the registers
constexpr int64_t WIDTH = VECTORS * LANES;  // columns of a tile

Vector& vector_at(float* at) { return *(Vector*)at; }
const Vector& vector_at(const float* at) { return *(const Vector*)at; }

// 2^x for x <= 0, with a relative error of 2e-7. It is 0 below -126, and NaN for NaN.
Vector vector_exp2(Vector x) {
    // 1.5 * 2^23 + 127: adding it rounds x to an integer, and leaves that integer's exponent bits lowest.
    const Vector magic = broadcast(12582912 + 127);
    const Vector shifted = x + magic, r = x - (shifted - magic);
    Vector y = broadcast(1.54035304e-4f);
    for (const float term : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
        y = fmadd(y, r, broadcast(term));
    return x < -126.f ? Vector{} : y * (Vector)((IntVector)shifted << 23);
}

// Transposes a matrix of 8 x 8 lanes, one register per row.
void transpose_8x8(__m256 v[8]) {
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

// One number per lane, as a float.
template <class Number>
struct Unpacked {
    using Type = typename Number::Type;
    static constexpr int64_t PER_LANE = 1;
    static __m256 load_8_lanes(const Type* at) { return Number::load(at); }
    static Vector multiply_add(Vector acc, Vector a, Vector b) { return fmadd(a, b, acc); }
    static Vector pack(const Vector* floats) { return *floats; }
    // The lanes that hold one number of each of PER_LANE rows.
    static void interleave_rows(const Type* const* rows, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += 8) _mm256_store_ps(to + i, Number::load(*rows + i));
    }
};

#ifdef __AVX512BF16__
// Two bfloat16 numbers per lane, the first in the lower half.
struct PackedPairs {
    using Type = uint16_t;
    static constexpr int64_t PER_LANE = 2;
    static __m256 load_8_lanes(const Type* at) { return _mm256_loadu_ps((const float*)at); }
    static Vector multiply_add(Vector acc, Vector a, Vector b) {
        return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
    }
    static Vector pack(const Vector* floats) {
        return interleave((__m512i)_mm512_cvtne2ps_pbh(floats[1], floats[0]));
    }
    static void interleave_rows(const Type* const* rows, int64_t count, float* to) {
        for (int64_t i = 0; i < count; i += 16) {
            const __m256i first = _mm256_loadu_si256((const __m256i*)(rows[0] + i));
            const __m256i second = _mm256_loadu_si256((const __m256i*)(rows[1] + i));
            vector_at(to + i) = interleave(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
        }
    }

private:
    static Vector interleave(__m512i both) {
        using Order = uint16_t __attribute__((vector_size(64)));
        constexpr Order order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (Vector)_mm512_permutexvar_epi16((__m512i)order, both);
    }
};
#endif

// c "TILE_ROWS WIDTH" = c * rescale + a "TILE_ROWS depth" times b "depth WIDTH". Depth counts lanes. `row_stride` and
// `depth_stride` are a's strides. Without `rescale`, c is not read.
template <class Packing>
void multiply_tile(const float* a, int64_t row_stride, int64_t depth_stride, const float* b, int64_t depth,
                   const float* rescale, float* c) {
    Vector acc[TILE_ROWS][VECTORS];
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        UNROLLED for (int v = 0; v < VECTORS; v++)
            acc[r][v] = rescale ? vector_at(c + r * WIDTH + v * LANES) * vector_at(rescale + v * LANES) : Vector{};
    for (int64_t k = 0; k < depth; k++, a += depth_stride, b += WIDTH) {
        Vector right[VECTORS];
        UNROLLED for (int v = 0; v < VECTORS; v++) right[v] = vector_at(b + v * LANES);
        UNROLLED for (int r = 0; r < TILE_ROWS; r++) {
            const Vector left = broadcast(a[r * row_stride]);
            UNROLLED for (int v = 0; v < VECTORS; v++) acc[r][v] = Packing::multiply_add(acc[r][v], left, right[v]);
        }
    }
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        UNROLLED for (int v = 0; v < VECTORS; v++) vector_at(c + r * WIDTH + v * LANES) = acc[r][v];
}

}  // namespace
