// What the kernels for a processor with AVX2 or AVX-512 have in common. They are compiled as one file, since half of
// the time goes to torch's headers. So no two files may define the same name.

#pragma once

#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace {

#define UNROLLED _Pragma("GCC unroll 8")  // so that accumulators stay in registers

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How numbers lie in memory, eight of them as floats, and floats as eight of them.
struct BFloat16 {
    using Type = uint16_t;
    static __m256 load(const Type* at) {  // the upper half of a float
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static void store(Type* to, __m256 x) {  // to nearest, ties to even; a NaN must not become infinite
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i high = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        high = _mm256_srli_epi32(_mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc00000), nan), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000);
        _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(packed));
    }
#ifdef __AVX512F__
    static __m512 sixteen(const Type* at) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
#endif
};

struct Float16 {
    using Type = uint16_t;
    static __m256 load(const Type* at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)); }
    static void store(Type* to, __m256 x) { _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(x, 0)); }
#ifdef __AVX512F__
    static __m512 sixteen(const Type* at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at)); }
#endif
};

struct Float32 {
    using Type = float;
    static __m256 load(const Type* at) { return _mm256_loadu_ps(at); }
    static void store(Type* to, __m256 x) { _mm256_storeu_ps(to, x); }
#ifdef __AVX512F__
    static __m512 sixteen(const Type* at) { return _mm512_loadu_ps(at); }
#endif
};

// What `some` says of the numbers that a dtype has.
template <class Some>
auto of_kind(ScalarType kind, const Some& some) {
    STD_TORCH_CHECK(kind == ScalarType::BFloat16 || kind == ScalarType::Half || kind == ScalarType::Float,
                    "bfloat16, float16 or float32");
    return kind == ScalarType::BFloat16 ? some(BFloat16())
           : kind == ScalarType::Half   ? some(Float16())
                                        : some(Float32());
}

// Uninitialized memory for floats, aligned to a cache line: loads across two lines have half the speed. It is allocated
// at every call of a product.
class Floats {
    const std::unique_ptr<float[]> memory;

public:
    float* const at;
    explicit Floats(int64_t count)
        : memory(new float[count + 16]), at((float*)(((uintptr_t)memory.get() + 63) & ~uintptr_t(63))) {}
    Floats(const Floats&) = delete;
};

// Rows "r d" in float32.
struct Rows {
    const float* at;
    int64_t rows, d;

    Rows(const float* at, int64_t rows, int64_t d) : at(at), rows(rows), d(d) {}
    explicit Rows(const Tensor& x) : Rows((const float*)x.data_ptr(), x.size(0), x.size(1)) {}
};

// A matrix "outputs d" of floats; of 8 bits, with a scale an output; or of 4 bits, with two numbers a group.
// A question to a tensor takes 50 ns, and more where the tensor has left the processor's cache.
struct Matrix {
    const void *values, *scales;
    ScalarType kind;
    int64_t outputs;

    Matrix(const Tensor& values, const Tensor* scales, int64_t d)
        : values(values.data_ptr()), scales(scales ? scales->data_ptr() : nullptr), kind(values.scalar_type()),
          outputs(values.numel() * (kind == ScalarType::Byte ? 2 : 1) / d) {}
};

using Matrices = std::vector<Matrix>;

int64_t outputs_of(const Matrices& matrices) {
    int64_t total = 0;
    for (const auto& matrix : matrices) total += matrix.outputs;
    return total;
}

float sum_of(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#ifdef __AVX512F__
float sum_of(__m512 v) { return _mm512_reduce_add_ps(v); }
#endif

// How many pieces of one thread's part are done, on a cache line of its own.
struct alignas(64) Taken {
    std::atomic<int64_t> pieces{0};
};

constexpr int64_t CLAIM = 128 << 10;  // bytes of weights in a piece; with half of that a product is 1 % slower

// Divides the outputs of matrices among the threads, and computes y "r total". `some` computes pieces of `size` outputs
// from `begin` to `end`. A thread computes its own part piece by piece, then helps with what is left of other parts: of
// two cores one is 7 % slower at a time, and OpenMP may start fewer threads than requested.
template <class Some>
void shared(const Matrices& matrices, float* y, int64_t threads, int64_t size, int64_t bytes, const Some& some) {
    const int64_t total = outputs_of(matrices), count = std::max(int64_t(1), CLAIM / (size * bytes));
    std::vector<Taken> taken(matrices.size() * threads);
#pragma omp parallel num_threads(threads)
    {
        for (int64_t n = 0; n < threads; n++) {
            const int64_t share = (omp_get_thread_num() + n) % threads;
            float* to = y;
            for (size_t m = 0; m < matrices.size(); to += matrices[m++].outputs) {
                const int64_t outputs = matrices[m].outputs, begin = outputs * share / threads;
                const int64_t end = outputs * (share + 1) / threads, pieces = (end - begin + size - 1) / size;
                auto& next = taken[m * threads + share].pieces;
                while (next.load(std::memory_order_relaxed) < pieces) {  // many threads look, few write
                    const int64_t piece = next.fetch_add(count, std::memory_order_relaxed);
                    if (piece < pieces)
                        some(matrices[m], to, total, begin, end, piece, std::min(piece + count, pieces));
                }
            }
        }
    }
}

constexpr float LEAST = std::numeric_limits<float>::lowest();  // of no score, or of scores that are all -inf

// Keys or values "b k s h".
struct Leaf {
    const void* data;
    int64_t row, head, slot;  // strides

    Leaf(const void* data, int64_t k, int64_t room, int64_t h)
        : data(data), row(k * room * h), head(room * h), slot(h) {}
    explicit Leaf(const Tensor& leaf)
        : data(leaf.data_ptr()), row(leaf.stride(0)), head(leaf.stride(1)), slot(leaf.stride(2)) {}
};

}  // namespace
