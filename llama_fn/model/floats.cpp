// Few rows times matrices of floats on a processor with AVX2: y[r, o] = sum over d of W[o, d] x[r, d].
//
// Of one row and of two a weight is read at the memory's speed in streams side by side, so that pages are on their way
// at once. Of more, three outputs of four rows are summed at once, which is what sixteen registers hold: eight weights
// are made floats and meet the inputs of four rows, eight inputs the weights of three outputs. The next three are on
// their way meanwhile.

#include "avx2.h"

namespace {

constexpr int64_t TILE = 3, PACK = 4;  // outputs, and rows, that are summed at once
constexpr int64_t STREAMS = 4;

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
constexpr decltype(&tile<Weight, 1, 1>) TILE_OF[] = {
    tile<Weight, OUTPUTS, 1>, tile<Weight, OUTPUTS, 2>, tile<Weight, OUTPUTS, 3>, tile<Weight, OUTPUTS, 4>};

// The outputs from `begin` to `end` of a matrix, of rows that are packed four by four, to y "r total".
template <class Weight>
void tiles(const void* values, const float* x, int64_t rows, int64_t d, float* y, int64_t total, int64_t begin,
           int64_t end) {
    const auto* const weight = (const typename Weight::Type*)values;
    for (int64_t o = begin, count; o < end; o += count) {
        count = end - o < TILE ? 1 : TILE;
        const auto* const next = weight + std::min(o + count, end - count) * d;
        for (int64_t r = 0; r < rows; r += PACK) {
            const int64_t some = std::min(PACK, rows - r) - 1;
            const auto sum = count == TILE ? TILE_OF<Weight, TILE>[some] : TILE_OF<Weight, 1>[some];
            sum(weight + o * d, next, d, x + r * d, y + r * total + o, total);
        }
    }
}

// The same of one row or two.
template <class Weight, int ROWS>
void streams(const void* values, const float* x, int64_t, int64_t d, float* y, int64_t total, int64_t begin,
             int64_t end) {
    const int64_t each = (end - begin + STREAMS - 1) / STREAMS;
    for (int64_t k = 0; k < each; k++) {
        int64_t o[STREAMS];
        __m256 sums[STREAMS][ROWS];
        const typename Weight::Type* at[STREAMS];
        UNROLLED for (int s = 0; s < STREAMS; s++) {
            o[s] = std::min(begin + s * each + k, end - 1), at[s] = (const typename Weight::Type*)values + o[s] * d;
            UNROLLED for (int r = 0; r < ROWS; r++) sums[s][r] = _mm256_setzero_ps();
        }
        _Pragma("GCC unroll 4") for (int64_t i = 0; i < d; i += 8)
            UNROLLED for (int s = 0; s < STREAMS; s++) {
                const __m256 weights = Weight::load(at[s] + i);
                UNROLLED for (int r = 0; r < ROWS; r++)
                    sums[s][r] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + ROWS * i + 8 * r), sums[s][r]);
            }
        UNROLLED for (int s = 0; s < STREAMS; s++)
            UNROLLED for (int r = 0; r < ROWS; r++) y[r * total + o[s]] = sum_of(sums[s][r]);
    }
}

template <class Weight>
auto outputs_of(int64_t rows) {
    return rows == 1 ? streams<Weight, 1> : rows == 2 ? streams<Weight, 2> : tiles<Weight>;
}

// Of matrices "... d" of one dtype side by side, and rows "r d" in float32: "r o".
Tensor floats(std::vector<Tensor> values, Tensor x, int64_t threads) {
    const int64_t rows = x.size(0), d = x.size(1);
    STD_TORCH_CHECK(0 < rows && 0 < d && d % 8 == 0, "floats: rows of whole registers");
    const Floats packed(rows * d);
    const float* const from = (const float*)x.data_ptr();
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = r / PACK * PACK, width = std::min(PACK, rows - first);
        for (int64_t i = 0; i < d; i += 8)
            std::copy_n(from + r * d + i, 8, packed.at + first * d + i * width + 8 * (r - first));
    }
    const auto some = of_kind(values[0].scalar_type(), [&](auto number) { return outputs_of<decltype(number)>(rows); });
    return shared(values, d, x, threads, [&](int64_t m, float* y, int64_t total, int64_t begin, int64_t end) {
        some(values[m].data_ptr(), packed.at, rows, d, y, total, begin, end);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("floats", TORCH_BOX(&floats)); }
