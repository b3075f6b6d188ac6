// Few rows times matrices of floats: y[r, o] = sum over d of W[o, d] x[r, d].
//
// Of one row and of two a weight is read at the memory's speed in streams side by side, so that pages are on their way
// at once. Of more, three outputs of four rows are summed at once (with AVX-512 of eight), which is what the registers
// hold: a register of weights meets the inputs of these rows, one of inputs the weights of three outputs. The next
// three are on their way meanwhile.

#include "avx2.h"

namespace {

constexpr int64_t TILE = 3;     // outputs that are summed at once
constexpr int64_t STREAMS = 4;
constexpr int64_t BLOCK = 1024, TILES = 16;  // inputs that stay in the nearest cache, and for how many tiles

// How a register of sums takes `COUNT` weights and inputs, and how many rows are summed at once.
template <class Number>
struct Eight {
    using Weight = typename Number::Type;
    using Input = float;
    using Sums = __m256;
    static constexpr int64_t COUNT = 8, PACK = 4;
    static Sums none() { return _mm256_setzero_ps(); }
    static __m256 weights(const Weight* at) { return Number::load(at); }
    static __m256 inputs(const Input* at) { return _mm256_loadu_ps(at); }
    static void take(const float* x, Input* to) { std::copy_n(x, COUNT, to); }
    static Sums add(Sums sums, __m256 weights, __m256 inputs) { return _mm256_fmadd_ps(weights, inputs, sums); }
};

#ifdef __AVX512F__
template <class Number>
struct Sixteen {
    using Weight = typename Number::Type;
    using Input = float;
    using Sums = __m512;
    static constexpr int64_t COUNT = 16, PACK = 8;
    static Sums none() { return _mm512_setzero_ps(); }
    static __m512 weights(const Weight* at) { return Number::sixteen(at); }
    static __m512 inputs(const Input* at) { return _mm512_loadu_ps(at); }
    static void take(const float* x, Input* to) { std::copy_n(x, COUNT, to); }
    static Sums add(Sums sums, __m512 weights, __m512 inputs) { return _mm512_fmadd_ps(weights, inputs, sums); }
};


#endif

#ifdef __AVX512BF16__
template <>
struct Sixteen<BFloat16> {  // of pairs
    using Weight = uint16_t;
    using Input = uint16_t;
    using Sums = __m512;
    static constexpr int64_t COUNT = 32, PACK = 8;
    static Sums none() { return _mm512_setzero_ps(); }
    static __m512i weights(const Weight* at) { return _mm512_loadu_si512(at); }
    static __m512i inputs(const Input* at) { return _mm512_loadu_si512(at); }
    static void take(const float* x, Input* to) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
        _mm256_storeu_si256((__m256i*)(to + 16), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + 16)));
    }
    static Sums add(Sums sums, __m512i weights, __m512i inputs) {
        return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)inputs);
    }
};
#endif

// Some outputs of `rows` rows, or one fewer, whose inputs lie as "d/COUNT ROWS COUNT", of the inputs from `begin` to
// `end`: what is summed so far is kept from call to call, and the last writes to y "r total". `next` are the weights
// that come next.
template <class Step, int OUTPUTS, int ROWS>
void tile(const typename Step::Weight* weight, const typename Step::Weight* next, int64_t d, int64_t begin, int64_t end,
          const typename Step::Input* x, int64_t rows, typename Step::Sums* kept, float* y, int64_t total) {
    constexpr int64_t COUNT = Step::COUNT, LINE = 64 / sizeof(*weight);
    typename Step::Sums sums[OUTPUTS][ROWS];
    UNROLLED for (int o = 0; o < OUTPUTS; o++)
        UNROLLED for (int r = 0; r < ROWS; r++) sums[o][r] = begin ? kept[o * ROWS + r] : Step::none();
    x += begin * ROWS;
    _Pragma("GCC unroll 4") for (int64_t i = begin; i < end; i += COUNT, x += COUNT * ROWS) {  // 6 % faster
        decltype(Step::weights(weight)) weights[OUTPUTS];
        UNROLLED for (int o = 0; o < OUTPUTS; o++) weights[o] = Step::weights(weight + o * d + i);
        if (i % LINE == 0)
            UNROLLED for (int o = 0; o < OUTPUTS; o++) _mm_prefetch((const char*)(next + o * d + i), _MM_HINT_T1);
        UNROLLED for (int r = 0; r < ROWS; r++) {
            auto inputs = Step::inputs(x + COUNT * r);
            asm("" : "+v"(inputs));  // else gcc loads them for every output: a tenth slower
            UNROLLED for (int o = 0; o < OUTPUTS; o++) sums[o][r] = Step::add(sums[o][r], weights[o], inputs);
        }
    }
    if (end < d) {
        UNROLLED for (int o = 0; o < OUTPUTS; o++)
            UNROLLED for (int r = 0; r < ROWS; r++) kept[o * ROWS + r] = sums[o][r];
        return;
    }
    for (int r = 0; r < rows; r++)
        UNROLLED for (int o = 0; o < OUTPUTS; o++) y[r * total + o] = sum_of(sums[o][r]);
}

// Of a quarter of a pack's rows, of two quarters, of three, of all.
template <class Step, int OUTPUTS>
constexpr decltype(&tile<Step, 1, 1>) TILE_OF[] = {
    tile<Step, OUTPUTS, Step::PACK / 4>, tile<Step, OUTPUTS, Step::PACK / 2>, tile<Step, OUTPUTS, Step::PACK * 3 / 4>,
    tile<Step, OUTPUTS, Step::PACK>};

// The outputs from `begin` to `end` of a matrix, of rows that are packed, to y "r total". Some tiles take a block of
// inputs one after the other, so that it stays in the nearest cache: of eight rows a third faster.
template <class Step>
void tiles(const void* values, const void* x, int64_t rows, int64_t d, float* y, int64_t total, int64_t begin,
           int64_t end) {
    constexpr int64_t PACK = Step::PACK;
    const auto* const weight = (const typename Step::Weight*)values;
    const auto* const inputs = (const typename Step::Input*)x;
    typename Step::Sums kept[TILES + 1][TILE * PACK];  // of the last, two may be of one output
    const bool once = rows <= PACK;  // else a tile's weights are what comes again
    const int64_t block = once ? BLOCK : d, outputs = once ? TILES * TILE : TILE;
    for (int64_t first = begin; first < end; first += outputs) {
        const int64_t last = std::min(first + outputs, end), whole = first + (last - first) / TILE * TILE;
        for (int64_t r = 0; r < rows; r += PACK) {
            const int64_t some = std::min(PACK, rows - r), quarters = (some * 4 + PACK - 1) / PACK;
            for (int64_t i = 0; i < d; i += block)
                for (int64_t o = first, n = 0, count; o < last; o += count, n++) {
                    count = o < whole ? TILE : 1;
                    const auto sum = count == TILE ? TILE_OF<Step, TILE>[quarters - 1] : TILE_OF<Step, 1>[quarters - 1];
                    const auto* const next = weight + std::min(o + count, end - count) * d;
                    sum(weight + o * d, next, d, i, std::min(i + block, d), inputs + r * d, some, kept[n],
                        y + r * total + o, total);
                }
        }
    }
}

// The same of one row or two.
template <class Step, int ROWS>
void streams(const void* values, const void* packed, int64_t, int64_t d, float* y, int64_t total, int64_t begin,
             int64_t end) {
    constexpr int64_t COUNT = Step::COUNT;
    const auto* const x = (const typename Step::Input*)packed;
    const int64_t each = (end - begin + STREAMS - 1) / STREAMS;
    for (int64_t k = 0; k < each; k++) {
        int64_t o[STREAMS];
        typename Step::Sums sums[STREAMS][ROWS];
        const typename Step::Weight* at[STREAMS];
        UNROLLED for (int s = 0; s < STREAMS; s++) {
            o[s] = std::min(begin + s * each + k, end - 1), at[s] = (const typename Step::Weight*)values + o[s] * d;
            UNROLLED for (int r = 0; r < ROWS; r++) sums[s][r] = Step::none();
        }
        _Pragma("GCC unroll 4") for (int64_t i = 0; i < d; i += COUNT)
            UNROLLED for (int s = 0; s < STREAMS; s++) {
                const auto weights = Step::weights(at[s] + i);
                UNROLLED for (int r = 0; r < ROWS; r++)
                    sums[s][r] = Step::add(sums[s][r], weights, Step::inputs(x + ROWS * i + COUNT * r));
            }
        UNROLLED for (int s = 0; s < STREAMS; s++)
            UNROLLED for (int r = 0; r < ROWS; r++) y[r * total + o[s]] = sum_of(sums[s][r]);
    }
}

// Rows "r d" in packs, each "d/COUNT r COUNT", where the last may have room for more.
template <class Step>
void pack(const float* x, int64_t rows, int64_t d, void* packed) {
    constexpr int64_t COUNT = Step::COUNT, PACK = Step::PACK, QUARTER = PACK / 4;
    using Input = typename Step::Input;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = r / PACK * PACK, some = std::min(PACK, rows - first);
        const int64_t width = rows <= 2 ? rows : (some + QUARTER - 1) / QUARTER * QUARTER;
        Input* const to = (Input*)packed + first * d + COUNT * (r - first);
        for (int64_t i = 0; i < d; i += COUNT) Step::take(x + r * d + i, to + i * width);
    }
}

template <class Step>
void floats_by(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    const Floats packed((x.rows + Step::PACK) * x.d);
    pack<Step>(x.at, x.rows, x.d, packed.at);
    const auto of_rows = x.rows == 1 ? streams<Step, 1> : x.rows == 2 ? streams<Step, 2> : tiles<Step>;
    shared(matrices, y, threads, [&](const Matrix& matrix, float* y, int64_t total, int64_t begin, int64_t end) {
        of_rows(matrix.values, packed.at, x.rows, x.d, y, total, begin, end);
    });
}

// Of matrices of one dtype side by side, and rows of the same numbers: "r o".
void floats_times(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    STD_TORCH_CHECK(0 < x.rows && 0 < x.d && x.d % 8 == 0, "floats: rows of whole registers");
    of_kind(matrices[0].kind, [&](auto number) {
        using Number = decltype(number);
#ifdef __AVX512F__
        if (x.d % Sixteen<Number>::COUNT == 0) return floats_by<Sixteen<Number>>(matrices, x, y, threads);
#endif
        floats_by<Eight<Number>>(matrices, x, y, threads);
    });
}

Tensor floats(std::vector<Tensor> values, Tensor x, int64_t threads) {
    const Rows rows(x);
    Matrices matrices;
    for (const auto& value : values) matrices.emplace_back(value, nullptr, rows.d);
    auto y = torch::stable::new_empty(x, {rows.rows, outputs_of(matrices)});
    floats_times(matrices, rows, (float*)y.data_ptr(), threads);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("floats", TORCH_BOX(&floats)); }
