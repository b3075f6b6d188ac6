// A few rows times matrices of floats: y[r, o] = sum over d of W[o, d] x[r, d].
//
// For one or two rows, the memory's speed is the limit. Several outputs are computed side by side, each as one stream
// of weights, so that the processor prefetches several pages at once. For more rows, a tile is computed in registers:
// three outputs of four rows (eight with AVX-512). Each loaded weight is multiplied with all rows of the tile, and each
// loaded input with all its outputs. Meanwhile the weights of the next tile are prefetched.

#include "avx2.h"

namespace {

constexpr int64_t TILE_OUTPUTS = 3;
constexpr int64_t BLOCK_INPUTS = 1024;  // inputs of a pack of rows, which stay in the L1 cache
constexpr int64_t TASK_TILES = 16;      // tiles of a task that read them

// A step of the inner loop: it multiplies VECTOR_WIDTH weights by as many inputs and adds the products to an
// accumulator, which is one register or two. A tile has up to PACK_ROWS rows. For one or two rows there are STREAMS
// streams of weights. `SingleRow` is the step for one row.
template <class Number>
struct Avx2 {
    using SingleRow = Avx2;
    using Weight = typename Number::Type;
    using Input = float;
    using Acc = __m256;
    static constexpr int64_t VECTOR_WIDTH = 8, PACK_ROWS = 4, STREAMS = 4;
    static Acc zero() { return _mm256_setzero_ps(); }
    static __m256 load_weights(const Weight* at) { return Number::load(at); }
    static __m256 load_inputs(const Input* at) { return _mm256_loadu_ps(at); }
    static void convert(const float* x, Input* to) { std::copy_n(x, VECTOR_WIDTH, to); }
    static Acc multiply_add(Acc acc, __m256 weights, __m256 inputs) { return _mm256_fmadd_ps(weights, inputs, acc); }
};

#ifdef __AVX512F__
template <class Number>
struct Avx512 {
    using SingleRow = Avx512;
    using Weight = typename Number::Type;
    using Input = float;
    using Acc = __m512;
    static constexpr int64_t VECTOR_WIDTH = 16, PACK_ROWS = 8, STREAMS = 4;
    static Acc zero() { return _mm512_setzero_ps(); }
    static __m512 load_weights(const Weight* at) { return Number::load_16(at); }
    static __m512 load_inputs(const Input* at) { return _mm512_loadu_ps(at); }
    static void convert(const float* x, Input* to) { std::copy_n(x, VECTOR_WIDTH, to); }
    static Acc multiply_add(Acc acc, __m512 weights, __m512 inputs) { return _mm512_fmadd_ps(weights, inputs, acc); }
};


#endif

#ifdef __AVX512BF16__
template <>
struct Avx512<BFloat16> {  // one instruction multiplies pairs and adds both products to a float
    using SingleRow = struct Avx512Halves;
    using Weight = uint16_t;
    using Input = uint16_t;
    using Acc = __m512;
    static constexpr int64_t VECTOR_WIDTH = 32, PACK_ROWS = 8, STREAMS = 4;
    static Acc zero() { return _mm512_setzero_ps(); }
    static __m512i load_weights(const Weight* at) { return _mm512_loadu_si512(at); }
    static __m512i load_inputs(const Input* at) { return _mm512_loadu_si512(at); }
    static void convert(const float* x, Input* to) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
        _mm256_storeu_si256((__m256i*)(to + 16), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + 16)));
    }
    static Acc multiply_add(Acc acc, __m512i weights, __m512i inputs) {
        return _mm512_dpbf16_ps(acc, (__m512bh)weights, (__m512bh)inputs);
    }
};

// The step for one row: loads of 32 bytes read memory 2 % faster than loads of 64.
struct Avx512Halves : Avx512<BFloat16> {
    struct TwoRegisters {
        __m256i first, last;
    };
    struct Acc {
        __m256 first, last;
    };
    static constexpr int64_t STREAMS = 2;
    static Acc zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static TwoRegisters load_weights(const Weight* at) {
        return {_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)(at + 16))};
    }
    static TwoRegisters load_inputs(const Input* at) { return load_weights(at); }
    static Acc multiply_add(Acc acc, TwoRegisters weights, TwoRegisters inputs) {
        return {_mm256_dpbf16_ps(acc.first, (__m256bh)weights.first, (__m256bh)inputs.first),
                _mm256_dpbf16_ps(acc.last, (__m256bh)weights.last, (__m256bh)inputs.last)};
    }
};

float hsum(Avx512Halves::Acc acc) { return hsum(_mm256_add_ps(acc.first, acc.last)); }
#endif

// Adds the products of inputs `begin` to `end` to a tile of OUTPUTS outputs and ROWS rows. The rows are packed as
// "d/VECTOR_WIDTH ROWS VECTOR_WIDTH". The last of them may be padding: `rows` is ROWS or one fewer. `saved` holds the
// accumulators between calls. The last call writes their sums to y "r total". `next_weight` is prefetched.
template <class Step, int OUTPUTS, int ROWS>
void multiply_tile(const typename Step::Weight* weight, const typename Step::Weight* next_weight, int64_t d,
                   int64_t begin, int64_t end, const typename Step::Input* x, int64_t rows, typename Step::Acc* saved,
                   float* y, int64_t total) {
    constexpr int64_t VECTOR_WIDTH = Step::VECTOR_WIDTH, PER_CACHE_LINE = 64 / sizeof(*weight);
    typename Step::Acc acc[OUTPUTS][ROWS];
    UNROLLED for (int o = 0; o < OUTPUTS; o++)
        UNROLLED for (int r = 0; r < ROWS; r++) acc[o][r] = begin ? saved[o * ROWS + r] : Step::zero();
    x += begin * ROWS;
    // Unrolled, this loop is 6 % faster.
    _Pragma("GCC unroll 4") for (int64_t i = begin; i < end; i += VECTOR_WIDTH, x += VECTOR_WIDTH * ROWS) {
        decltype(Step::load_weights(weight)) weights[OUTPUTS];
        UNROLLED for (int o = 0; o < OUTPUTS; o++) weights[o] = Step::load_weights(weight + o * d + i);
        if (i % PER_CACHE_LINE == 0)
            UNROLLED for (int o = 0; o < OUTPUTS; o++)
                _mm_prefetch((const char*)(next_weight + o * d + i), _MM_HINT_T1);
        UNROLLED for (int r = 0; r < ROWS; r++) {
            auto inputs = Step::load_inputs(x + VECTOR_WIDTH * r);
            asm("" : "+v"(inputs));  // otherwise gcc loads them again for every output: 10 % slower
            UNROLLED for (int o = 0; o < OUTPUTS; o++) acc[o][r] = Step::multiply_add(acc[o][r], weights[o], inputs);
        }
    }
    if (end < d) {
        UNROLLED for (int o = 0; o < OUTPUTS; o++)
            UNROLLED for (int r = 0; r < ROWS; r++) saved[o * ROWS + r] = acc[o][r];
        return;
    }
    for (int r = 0; r < rows; r++)
        UNROLLED for (int o = 0; o < OUTPUTS; o++) y[r * total + o] = hsum(acc[o][r]);
}

// `multiply_tile` for one, two, three and four quarters of PACK_ROWS.
template <class Step, int OUTPUTS>
constexpr decltype(&multiply_tile<Step, 1, 1>) TILE_KERNELS[] = {
    multiply_tile<Step, OUTPUTS, Step::PACK_ROWS / 4>, multiply_tile<Step, OUTPUTS, Step::PACK_ROWS / 2>,
    multiply_tile<Step, OUTPUTS, Step::PACK_ROWS * 3 / 4>, multiply_tile<Step, OUTPUTS, Step::PACK_ROWS>};

// The number of outputs of a task. For at most PACK_ROWS rows, a task has many tiles, which all read the same block of
// inputs. The block stays in the L1 cache (a third faster for eight rows). For more rows, a task has one tile's
// outputs, and every pack of rows reads their weights again.
template <class Step>
int64_t task_outputs(int64_t rows) { return rows <= Step::PACK_ROWS ? TASK_TILES * TILE_OUTPUTS : TILE_OUTPUTS; }

// Computes tasks `task` to `last_task` of a matrix's outputs `begin` to `end`, for packed rows, into y "r total".
template <class Step>
void multiply_tiles(const void* values, const void* x, int64_t rows, int64_t d, float* y, int64_t total, int64_t begin,
                    int64_t end, int64_t task, int64_t last_task) {
    constexpr int64_t PACK_ROWS = Step::PACK_ROWS;
    const auto* const weight = (const typename Step::Weight*)values;
    const auto* const inputs = (const typename Step::Input*)x;
    // One more than TASK_TILES, because the last task may end with two tiles of one output.
    typename Step::Acc saved[TASK_TILES + 1][TILE_OUTPUTS * PACK_ROWS];
    const int64_t outputs = task_outputs<Step>(rows), block = rows <= PACK_ROWS ? BLOCK_INPUTS : d;
    for (; task < last_task; task++) {
        const int64_t first = begin + task * outputs, last = std::min(first + outputs, end);
        const int64_t tiled_end = first + (last - first) / TILE_OUTPUTS * TILE_OUTPUTS;
        for (int64_t r = 0; r < rows; r += PACK_ROWS) {
            const int64_t pack_rows = std::min(PACK_ROWS, rows - r);
            const int64_t quarters = (pack_rows * 4 + PACK_ROWS - 1) / PACK_ROWS;
            for (int64_t i = 0; i < d; i += block)
                for (int64_t o = first, n = 0, count; o < last; o += count, n++) {
                    count = o < tiled_end ? TILE_OUTPUTS : 1;
                    const auto kernel = count == TILE_OUTPUTS ? TILE_KERNELS<Step, TILE_OUTPUTS>[quarters - 1]
                                                              : TILE_KERNELS<Step, 1>[quarters - 1];
                    const auto* const next_weight = weight + std::min(o + count, end - count) * d;
                    kernel(weight + o * d, next_weight, d, i, std::min(i + block, d), inputs + r * d, pack_rows,
                           saved[n], y + r * total + o, total);
                }
        }
    }
}

// The same for one or two rows, packed as "d/VECTOR_WIDTH ROWS VECTOR_WIDTH". A task is one output of each stream.
template <class Step, int ROWS>
void float_streams(const void* values, const void* packed, int64_t d, float* y, int64_t total, int64_t begin,
                   int64_t end, int64_t task, int64_t last_task) {
    constexpr int64_t VECTOR_WIDTH = Step::VECTOR_WIDTH, STREAMS = Step::STREAMS;
    const auto* const x = (const typename Step::Input*)packed;
    const int64_t stream_outputs = (end - begin + STREAMS - 1) / STREAMS;
    for (; task < last_task; task++) {
        int64_t o[STREAMS];
        typename Step::Acc acc[STREAMS][ROWS];
        const typename Step::Weight* at[STREAMS];
        UNROLLED for (int s = 0; s < STREAMS; s++) {
            o[s] = std::min(begin + s * stream_outputs + task, end - 1);
            at[s] = (const typename Step::Weight*)values + o[s] * d;
            UNROLLED for (int r = 0; r < ROWS; r++) acc[s][r] = Step::zero();
        }
        _Pragma("GCC unroll 4") for (int64_t i = 0; i < d; i += VECTOR_WIDTH)
            UNROLLED for (int s = 0; s < STREAMS; s++) {
                const auto weights = Step::load_weights(at[s] + i);
                UNROLLED for (int r = 0; r < ROWS; r++)
                    acc[s][r] = Step::multiply_add(acc[s][r], weights,
                                                   Step::load_inputs(x + ROWS * i + VECTOR_WIDTH * r));
            }
        UNROLLED for (int s = 0; s < STREAMS; s++)
            if (begin + s * stream_outputs + task < end)  // otherwise o[s] was clamped: another thread may write it
                UNROLLED for (int r = 0; r < ROWS; r++) y[r * total + o[s]] = hsum(acc[s][r]);
    }
}

// Copies rows "r d" into packs of at most `pack_rows` rows, each "d/VECTOR_WIDTH r VECTOR_WIDTH". The number of rows is
// padded to a multiple of `multiple`; the added rows are zeros.
template <class Step>
void pack(const Rows& x, int64_t pack_rows, int64_t multiple, typename Step::Input* packed) {
    constexpr int64_t VECTOR_WIDTH = Step::VECTOR_WIDTH;
    const int64_t padded_rows = (x.rows + multiple - 1) / multiple * multiple;
    for (int64_t r = 0; r < padded_rows; r++) {
        const int64_t first = r / pack_rows * pack_rows, width = std::min(pack_rows, padded_rows - first);
        auto* const to = packed + first * x.d + VECTOR_WIDTH * (r - first);
        for (int64_t i = 0; i < x.d; i += VECTOR_WIDTH)
            if (r < x.rows) Step::convert(x.data + r * x.d + i, to + i * width);
            else std::fill_n(to + i * width, VECTOR_WIDTH, typename Step::Input(0));
    }
}

template <class Step, int ROWS>
void few_rows(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    const AlignedBuffer packed(ROWS * x.d);
    pack<Step>(x, ROWS, 1, (typename Step::Input*)packed.data);
    const int64_t bytes = x.d * sizeof(typename Step::Weight);
    const auto body = [&](const Matrix& matrix, float* y, auto... tasks) {
        float_streams<Step, ROWS>(matrix.values, packed.data, x.d, y, tasks...);
    };
    parallel_for_outputs(matrices, y, threads, Step::STREAMS, bytes, body);
}

template <class Step>
void many_rows(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    constexpr int64_t PACK_ROWS = Step::PACK_ROWS, QUARTER = PACK_ROWS / 4;
    const AlignedBuffer packed((x.rows + QUARTER) * x.d);
    pack<Step>(x, PACK_ROWS, QUARTER, (typename Step::Input*)packed.data);
    const int64_t size = task_outputs<Step>(x.rows), bytes = x.d * sizeof(typename Step::Weight);
    parallel_for_outputs(matrices, y, threads, size, bytes, [&](const Matrix& matrix, float* y, auto... tasks) {
        multiply_tiles<Step>(matrix.values, packed.data, x.rows, x.d, y, tasks...);
    });
}

// The products "r o" of matrices of one dtype and rows. The outputs of all matrices are concatenated. The rows are
// float32, but their numbers are exact in the matrices' dtype.
void multiply_floats(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    STD_TORCH_CHECK(0 < x.rows && 0 < x.d && x.d % 8 == 0, "linear_floats: rows of whole registers");
    const auto run = [&](auto step) {
        using Step = decltype(step);
        const auto kernel = x.rows == 1   ? few_rows<typename Step::SingleRow, 1>
                            : x.rows == 2 ? few_rows<Step, 2>
                                          : many_rows<Step>;
        kernel(matrices, x, y, threads);
    };
    dispatch(matrices[0].dtype, [&](auto number) {
        using Number = decltype(number);
#ifdef __AVX512F__
        if (x.d % Avx512<Number>::VECTOR_WIDTH == 0) return run(Avx512<Number>());
#endif
        run(Avx2<Number>());
    });
}

Tensor linear_floats(std::vector<Tensor> values, Tensor x, int64_t threads) {
    const Rows rows(x);
    Matrices matrices;
    for (const auto& value : values) matrices.emplace_back(value, nullptr, rows.d);
    auto y = torch::stable::new_empty(x, {rows.rows, total_outputs(matrices)});
    multiply_floats(matrices, rows, (float*)y.data_ptr(), threads);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("linear_floats", TORCH_BOX(&linear_floats)); }
