// What the kernels for a processor with AVX2 or AVX-512 have in common.
//
// Several kernels are compiled as one file, because torch's headers take half of the compiler's time. So no two files
// may define the same name.

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

// The three dtypes. Each loads 8 (or 16) numbers as floats, and stores 8 floats.
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
    static __m512 load_16(const Type* at) {
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
    static __m512 load_16(const Type* at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at)); }
#endif
};

struct Float32 {
    using Type = float;
    static __m256 load(const Type* at) { return _mm256_loadu_ps(at); }
    static void store(Type* to, __m256 x) { _mm256_storeu_ps(to, x); }
#ifdef __AVX512F__
    static __m512 load_16(const Type* at) { return _mm512_loadu_ps(at); }
#endif
};

// Calls `body` with the struct of this dtype.
template <class Body>
auto dispatch(ScalarType dtype, const Body& body) {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
                    "bfloat16, float16 or float32");
    return dtype == ScalarType::BFloat16 ? body(BFloat16())
           : dtype == ScalarType::Half   ? body(Float16())
                                        : body(Float32());
}

// Uninitialized memory for floats. It is aligned to a cache line, because a load across two lines has half the speed.
class AlignedBuffer {
    const std::unique_ptr<float[]> memory;

public:
    float* const data;
    explicit AlignedBuffer(int64_t count)
        : memory(new float[count + 16]), data((float*)(((uintptr_t)memory.get() + 63) & ~uintptr_t(63))) {}
    AlignedBuffer(const AlignedBuffer&) = delete;
};

// Rows "r d" in float32.
struct Rows {
    const float* data;
    int64_t rows, d;

    Rows(const float* data, int64_t rows, int64_t d) : data(data), rows(rows), d(d) {}
    explicit Rows(const Tensor& x) : Rows((const float*)x.data_ptr(), x.size(0), x.size(1)) {}
};

// A weight "outputs d": floats, 8 bits with a scale per output, or 4 bits with a scale and a minimum per group.
// It copies what the kernels need from the tensors, because each access to a tensor's fields takes 50 ns or more.
struct Matrix {
    const void *values, *scales;
    ScalarType dtype;
    int64_t outputs;

    Matrix(const Tensor& values, const Tensor* scales, int64_t d)
        : values(values.data_ptr()), scales(scales ? scales->data_ptr() : nullptr), dtype(values.scalar_type()),
          outputs(values.numel() * (dtype == ScalarType::Byte ? 2 : 1) / d) {}
};

using Matrices = std::vector<Matrix>;

int64_t total_outputs(const Matrices& matrices) {
    int64_t total = 0;
    for (const auto& matrix : matrices) total += matrix.outputs;
    return total;
}

// The horizontal sum of a register.
float hsum(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#ifdef __AVX512F__
float hsum(__m512 v) { return _mm512_reduce_add_ps(v); }
#endif

// The next task of one thread's part. Each counter has a cache line of its own, so that threads do not slow each other.
struct alignas(64) TaskCounter {
    std::atomic<int64_t> next{0};
};

constexpr int64_t CLAIM_BYTES = 128 << 10;  // a thread claims tasks that read so many bytes; half as many is 1 % slower

// Computes y "r total", the outputs of all matrices, in several threads. Each thread has a part of every matrix's
// outputs. A part consists of tasks of `size` outputs, each of which reads `size` * `bytes` bytes of weights. `body`
// computes some tasks of the part that goes from `begin` to `end`. When a thread has finished its own part, it claims
// tasks of other parts (work stealing): one of two cores is often 7 % slower, and OpenMP may start fewer threads than
// requested.
template <class Body>
void parallel_for_outputs(const Matrices& matrices, float* y, int64_t threads, int64_t size, int64_t bytes,
                          const Body& body) {
    const int64_t total = total_outputs(matrices), count = std::max(int64_t(1), CLAIM_BYTES / (size * bytes));
    std::vector<TaskCounter> counters(matrices.size() * threads);
#pragma omp parallel num_threads(threads)
    {
        for (int64_t n = 0; n < threads; n++) {
            const int64_t part = (omp_get_thread_num() + n) % threads;
            float* out = y;
            for (size_t m = 0; m < matrices.size(); out += matrices[m++].outputs) {
                const int64_t outputs = matrices[m].outputs, begin = outputs * part / threads;
                const int64_t end = outputs * (part + 1) / threads, tasks = (end - begin + size - 1) / size;
                auto& next = counters[m * threads + part].next;
                while (next.load(std::memory_order_relaxed) < tasks) {  // reading is cheap; only a claim writes
                    const int64_t task = next.fetch_add(count, std::memory_order_relaxed);
                    if (task < tasks)
                        body(matrices[m], out, total, begin, end, task, std::min(task + count, tasks));
                }
            }
        }
    }
}

constexpr float LOWEST = std::numeric_limits<float>::lowest();  // the maximum before any score

// The cache's keys or values "b k s h", and the strides of their first three axes.
struct CacheView {
    const void* data;
    int64_t row_stride, head_stride, slot_stride;

    CacheView(const void* data, int64_t k, int64_t capacity, int64_t h)
        : data(data), row_stride(k * capacity * h), head_stride(capacity * h), slot_stride(h) {}
    explicit CacheView(const Tensor& x)
        : data(x.data_ptr()), row_stride(x.stride(0)), head_stride(x.stride(1)), slot_stride(x.stride(2)) {}
};

}  // namespace
