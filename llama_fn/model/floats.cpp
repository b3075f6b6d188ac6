// Few rows times matrices of floats on a processor with AVX2: y[r, o] = sum over d of W[o, d] x[r, d].
//
// Three outputs of four rows are summed at once, which is what sixteen registers hold: eight weights are made floats and
// meet the inputs of four rows, eight inputs the weights of three outputs. The next three are on their way meanwhile.

#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

#define UNROLLED _Pragma("GCC unroll 8")  // so that sums stay in registers

constexpr int64_t TILE = 3, GROUP = 4;  // outputs, and rows, that are summed at once

struct BFloat16 {
    using Type = uint16_t;
    static __m256 load(const Type* at) {  // the upper half of a float
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
};

struct Float16 {
    using Type = uint16_t;
    static __m256 load(const Type* at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)); }
};

struct Float32 {
    using Type = float;
    static __m256 load(const Type* at) { return _mm256_loadu_ps(at); }
};

// The next place where a line of the cache begins: half of what lies across two is read at half the speed.
float* aligned(float* at) { return (float*)(((uintptr_t)at + 63) & ~uintptr_t(63)); }

float sum_of(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Some outputs of some rows, whose inputs lie as "d/8 r 8", to y "r total". `next` are the weights that come next.
template <class Weight, int OUTPUTS, int ROWS>
void tile(const typename Weight::Type* weight, const typename Weight::Type* next, int64_t d, const float* x, float* y,
          int64_t total) {
    constexpr int64_t LINE = 64 / sizeof(typename Weight::Type);
    __m256 sums[OUTPUTS][ROWS];
    UNROLLED for (int o = 0; o < OUTPUTS; o++)
        UNROLLED for (int r = 0; r < ROWS; r++) sums[o][r] = _mm256_setzero_ps();
    _Pragma("GCC unroll 4") for (int64_t i = 0; i < d; i += 8, x += 8 * ROWS) {  // 6 % faster
        __m256 weights[OUTPUTS];
        UNROLLED for (int o = 0; o < OUTPUTS; o++) weights[o] = Weight::load(weight + o * d + i);
        if (i % LINE == 0)
            UNROLLED for (int o = 0; o < OUTPUTS; o++) _mm_prefetch((const char*)(next + o * d + i), _MM_HINT_T1);
        UNROLLED for (int r = 0; r < ROWS; r++) {
            __m256 inputs = _mm256_loadu_ps(x + 8 * r);
            asm("" : "+x"(inputs));  // else gcc loads them for every output: a tenth slower
            UNROLLED for (int o = 0; o < OUTPUTS; o++) sums[o][r] = _mm256_fmadd_ps(weights[o], inputs, sums[o][r]);
        }
    }
    UNROLLED for (int r = 0; r < ROWS; r++)
        UNROLLED for (int o = 0; o < OUTPUTS; o++) y[r * total + o] = sum_of(sums[o][r]);
}

template <class Weight, int OUTPUTS>
constexpr decltype(&tile<Weight, 1, 1>) OF_ROWS[] = {
    tile<Weight, OUTPUTS, 1>, tile<Weight, OUTPUTS, 2>, tile<Weight, OUTPUTS, 3>, tile<Weight, OUTPUTS, 4>};

// The outputs from `begin` to `end` of a matrix, of rows that are packed four by four.
template <class Weight>
void outputs(const void* values, const float* x, int64_t rows, int64_t d, float* y, int64_t total, int64_t begin,
             int64_t end) {
    const auto* const weight = (const typename Weight::Type*)values;
    for (int64_t o = begin, count; o < end; o += count) {
        count = end - o < TILE ? 1 : TILE;
        const auto* const next = weight + std::min(o + count, end - count) * d;
        for (int64_t r = 0; r < rows; r += GROUP) {
            const int64_t some = std::min(GROUP, rows - r) - 1;
            const auto sum = count == TILE ? OF_ROWS<Weight, TILE>[some] : OF_ROWS<Weight, 1>[some];
            sum(weight + o * d, next, d, x + r * d, y + r * total + o, total);
        }
    }
}

// Of matrices "... d" of one dtype side by side, and rows "r d" in float32: "r o".
torch::stable::Tensor floats(std::vector<torch::stable::Tensor> values, torch::stable::Tensor x, int64_t threads) {
    using torch::headeronly::ScalarType;
    const int64_t rows = x.size(0), d = x.size(1), count = values.size();
    STD_TORCH_CHECK(0 < rows && 0 < d && d % 8 == 0, "floats: rows of whole registers");
    std::vector<int64_t> sizes;
    for (const auto& value : values) sizes.push_back(value.numel() / d);
    const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t(0));
    auto y = torch::stable::new_empty(x, {rows, total});

    std::vector<float> memory(rows * d + 16);
    float* const packed = aligned(memory.data());
    const float* const from = (const float*)x.data_ptr();
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = r / GROUP * GROUP, width = std::min(GROUP, rows - first);
        for (int64_t i = 0; i < d; i += 8)
            std::copy_n(from + r * d + i, 8, packed + first * d + i * width + 8 * (r - first));
    }
    const auto kind = values[0].scalar_type();
    const auto some = kind == ScalarType::BFloat16 ? outputs<BFloat16>
                      : kind == ScalarType::Half   ? outputs<Float16>
                                                   : outputs<Float32>;
    std::vector<const void*> value(count);
    std::transform(values.begin(), values.end(), value.begin(), [](const auto& t) { return t.data_ptr(); });
    float* const to = (float*)y.data_ptr();
#pragma omp parallel num_threads(threads)
    {
        const int64_t all = omp_get_num_threads(), mine = omp_get_thread_num();
        for (int64_t m = 0, first = 0; m < count; first += sizes[m++])
            some(value[m], packed, rows, d, to + first, total, sizes[m] * mine / all, sizes[m] * (mine + 1) / all);
    }
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("floats", TORCH_BOX(&floats)); }
