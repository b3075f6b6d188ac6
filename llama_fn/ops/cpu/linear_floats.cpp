// A few rows times matrices of floats: y[r, o] = sum over d of W[o, d] x[r, d].
//
// For one or two rows, a weight is read at the memory's speed in several streams, so that several pages are prefetched
// at once. For more rows, the registers hold the accumulators of three outputs and four rows (eight with AVX-512): each
// loaded weight is multiplied with all of these rows, each loaded input with all three outputs. Meanwhile the weights
// of the next three outputs are prefetched.

#include "avx2.h"

namespace {

constexpr int64_t TILE = 3;  // outputs whose accumulators are in registers
constexpr int64_t BLOCK = 1024, TILES = 16;  // BLOCK inputs of a pack stay in the L1 cache while TILES tiles read them

// A step of the inner loop multiplies COUNT weights by COUNT inputs and adds the products to one register (or two) of
// accumulators. PACK rows are accumulated at once. For one or two rows, weights are read in STREAMS streams. `One` is
// the step for a single row.
template <class Number>
struct Eight {
    using One = Eight;
    using Weight = typename Number::Type;
    using Input = float;
    using Sums = __m256;
    static constexpr int64_t COUNT = 8, PACK = 4, STREAMS = 4;
    static Sums none() { return _mm256_setzero_ps(); }
    static __m256 weights(const Weight* at) { return Number::load(at); }
    static __m256 inputs(const Input* at) { return _mm256_loadu_ps(at); }
    static void take(const float* x, Input* to) { std::copy_n(x, COUNT, to); }
    static Sums add(Sums sums, __m256 weights, __m256 inputs) { return _mm256_fmadd_ps(weights, inputs, sums); }
};

#ifdef __AVX512F__
template <class Number>
struct Sixteen {
    using One = Sixteen;
    using Weight = typename Number::Type;
    using Input = float;
    using Sums = __m512;
    static constexpr int64_t COUNT = 16, PACK = 8, STREAMS = 4;
    static Sums none() { return _mm512_setzero_ps(); }
    static __m512 weights(const Weight* at) { return Number::sixteen(at); }
    static __m512 inputs(const Input* at) { return _mm512_loadu_ps(at); }
    static void take(const float* x, Input* to) { std::copy_n(x, COUNT, to); }
    static Sums add(Sums sums, __m512 weights, __m512 inputs) { return _mm512_fmadd_ps(weights, inputs, sums); }
};


#endif

#ifdef __AVX512BF16__
template <>
struct Sixteen<BFloat16> {  // each accumulator adds up products of pairs
    using One = struct Halves;
    using Weight = uint16_t;
    using Input = uint16_t;
    using Sums = __m512;
    static constexpr int64_t COUNT = 32, PACK = 8, STREAMS = 4;
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

// The step for one row: loads of 32 bytes read memory 2 % faster than loads of 64.
struct Halves : Sixteen<BFloat16> {
    struct Words {
        __m256i first, last;
    };
    struct Sums {
        __m256 first, last;
    };
    static constexpr int64_t STREAMS = 2;
    static Sums none() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Words weights(const Weight* at) {
        return {_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)(at + 16))};
    }
    static Words inputs(const Input* at) { return weights(at); }
    static Sums add(Sums sums, Words weights, Words inputs) {
        return {_mm256_dpbf16_ps(sums.first, (__m256bh)weights.first, (__m256bh)inputs.first),
                _mm256_dpbf16_ps(sums.last, (__m256bh)weights.last, (__m256bh)inputs.last)};
    }
};

float sum_of(Halves::Sums sums) { return sum_of(_mm256_add_ps(sums.first, sums.last)); }
#endif

// Accumulates inputs `begin` to `end` for OUTPUTS outputs of ROWS rows, whose inputs lie in memory as
// "d/COUNT ROWS COUNT". Only the first `rows` rows are real: ROWS, or one fewer. `kept` holds the accumulators between
// calls; the last call writes their sums to y "r total". `next` are the weights to prefetch.
template <class Step, int OUTPUTS, int ROWS>
void tile(const typename Step::Weight* weight, const typename Step::Weight* next, int64_t d, int64_t begin, int64_t end,
          const typename Step::Input* x, int64_t rows, typename Step::Sums* kept, float* y, int64_t total) {
    constexpr int64_t COUNT = Step::COUNT, LINE = 64 / sizeof(*weight);
    typename Step::Sums sums[OUTPUTS][ROWS];
    UNROLLED for (int o = 0; o < OUTPUTS; o++)
        UNROLLED for (int r = 0; r < ROWS; r++) sums[o][r] = begin ? kept[o * ROWS + r] : Step::none();
    x += begin * ROWS;
    _Pragma("GCC unroll 4") for (int64_t i = begin; i < end; i += COUNT, x += COUNT * ROWS) {  // unrolled: 6 % faster
        decltype(Step::weights(weight)) weights[OUTPUTS];
        UNROLLED for (int o = 0; o < OUTPUTS; o++) weights[o] = Step::weights(weight + o * d + i);
        if (i % LINE == 0)
            UNROLLED for (int o = 0; o < OUTPUTS; o++) _mm_prefetch((const char*)(next + o * d + i), _MM_HINT_T1);
        UNROLLED for (int r = 0; r < ROWS; r++) {
            auto inputs = Step::inputs(x + COUNT * r);
            asm("" : "+v"(inputs));  // otherwise gcc loads them again for every output: 10 % slower
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

// `tile` for one, two, three and four quarters of a pack's rows.
template <class Step, int OUTPUTS>
constexpr decltype(&tile<Step, 1, 1>) TILE_OF[] = {
    tile<Step, OUTPUTS, Step::PACK / 4>, tile<Step, OUTPUTS, Step::PACK / 2>, tile<Step, OUTPUTS, Step::PACK * 3 / 4>,
    tile<Step, OUTPUTS, Step::PACK>};

// How many outputs a piece has. For at most PACK rows, a piece is many tiles, which all read the same block of inputs.
// The block stays in the L1 cache (a third faster for eight rows). For more rows, a piece is one tile, and every pack
// of rows reads its weights again.
template <class Step>
int64_t outputs_of_rows(int64_t rows) { return rows <= Step::PACK ? TILES * TILE : TILE; }

// Computes pieces `piece` to `last_piece` of a matrix's outputs `begin` to `end`, for packed rows, into y "r total".
template <class Step>
void tiles(const void* values, const void* x, int64_t rows, int64_t d, float* y, int64_t total, int64_t begin,
           int64_t end, int64_t piece, int64_t last_piece) {
    constexpr int64_t PACK = Step::PACK;
    const auto* const weight = (const typename Step::Weight*)values;
    const auto* const inputs = (const typename Step::Input*)x;
    typename Step::Sums kept[TILES + 1][TILE * PACK];  // the last piece may end with two tiles of one output
    const int64_t outputs = outputs_of_rows<Step>(rows), block = rows <= PACK ? BLOCK : d;
    for (; piece < last_piece; piece++) {
        const int64_t first = begin + piece * outputs, last = std::min(first + outputs, end);
        const int64_t whole = first + (last - first) / TILE * TILE;
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

// The same for one or two rows, packed as "d/COUNT ROWS COUNT". A piece is one output of each stream.
template <class Step, int ROWS>
void streams(const void* values, const void* packed, int64_t d, float* y, int64_t total, int64_t begin, int64_t end,
             int64_t piece, int64_t last_piece) {
    constexpr int64_t COUNT = Step::COUNT, STREAMS = Step::STREAMS;
    const auto* const x = (const typename Step::Input*)packed;
    const int64_t each = (end - begin + STREAMS - 1) / STREAMS;
    for (; piece < last_piece; piece++) {
        int64_t o[STREAMS];
        typename Step::Sums sums[STREAMS][ROWS];
        const typename Step::Weight* at[STREAMS];
        UNROLLED for (int s = 0; s < STREAMS; s++) {
            o[s] = std::min(begin + s * each + piece, end - 1);
            at[s] = (const typename Step::Weight*)values + o[s] * d;
            UNROLLED for (int r = 0; r < ROWS; r++) sums[s][r] = Step::none();
        }
        _Pragma("GCC unroll 4") for (int64_t i = 0; i < d; i += COUNT)
            UNROLLED for (int s = 0; s < STREAMS; s++) {
                const auto weights = Step::weights(at[s] + i);
                UNROLLED for (int r = 0; r < ROWS; r++)
                    sums[s][r] = Step::add(sums[s][r], weights, Step::inputs(x + ROWS * i + COUNT * r));
            }
        UNROLLED for (int s = 0; s < STREAMS; s++)
            if (begin + s * each + piece < end)  // otherwise o[s] was clamped, and another thread may write that output
                UNROLLED for (int r = 0; r < ROWS; r++) y[r * total + o[s]] = sum_of(sums[s][r]);
    }
}

// Copies rows "r d" into packs of at most `most` rows, each "d/COUNT r COUNT". The number of rows is rounded up to a
// multiple of `some`; the added rows are zeros.
template <class Step>
void pack(const Rows& x, int64_t most, int64_t some, typename Step::Input* packed) {
    constexpr int64_t COUNT = Step::COUNT;
    const int64_t whole = (x.rows + some - 1) / some * some;
    for (int64_t r = 0; r < whole; r++) {
        const int64_t first = r / most * most, width = std::min(most, whole - first);
        auto* const to = packed + first * x.d + COUNT * (r - first);
        for (int64_t i = 0; i < x.d; i += COUNT)
            if (r < x.rows) Step::take(x.at + r * x.d + i, to + i * width);
            else std::fill_n(to + i * width, COUNT, typename Step::Input(0));
    }
}

template <class Step, int ROWS>
void few_by(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    const Floats packed(ROWS * x.d);
    pack<Step>(x, ROWS, 1, (typename Step::Input*)packed.at);
    const int64_t bytes = x.d * sizeof(typename Step::Weight);
    shared(matrices, y, threads, Step::STREAMS, bytes, [&](const Matrix& matrix, float* y, auto... pieces) {
        streams<Step, ROWS>(matrix.values, packed.at, x.d, y, pieces...);
    });
}

template <class Step>
void many_by(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    constexpr int64_t PACK = Step::PACK, QUARTER = PACK / 4;
    const Floats packed((x.rows + QUARTER) * x.d);
    pack<Step>(x, PACK, QUARTER, (typename Step::Input*)packed.at);
    const int64_t size = outputs_of_rows<Step>(x.rows), bytes = x.d * sizeof(typename Step::Weight);
    shared(matrices, y, threads, size, bytes, [&](const Matrix& matrix, float* y, auto... pieces) {
        tiles<Step>(matrix.values, packed.at, x.rows, x.d, y, pieces...);
    });
}

// The products "r o" of matrices of one dtype and rows; the outputs of all matrices are concatenated. The rows are
// float32, but hold numbers of the matrices' dtype.
void floats_times(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    STD_TORCH_CHECK(0 < x.rows && 0 < x.d && x.d % 8 == 0, "floats: rows of whole registers");
    const auto by = [&](auto step) {
        using Step = decltype(step);
        const auto some = x.rows == 1 ? few_by<typename Step::One, 1> : x.rows == 2 ? few_by<Step, 2> : many_by<Step>;
        some(matrices, x, y, threads);
    };
    of_kind(matrices[0].kind, [&](auto number) {
        using Number = decltype(number);
#ifdef __AVX512F__
        if (x.d % Sixteen<Number>::COUNT == 0) return by(Sixteen<Number>());
#endif
        by(Eight<Number>());
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
