// A few rows times matrices of 8 or 4 bits: y[r, o] = sum over d of W[o, d] x[r, d].
//
// Inputs are quantized to 16-bit integers: the largest of each group of 64 becomes 32767. Then one instruction
// multiplies 16 integers (32 with AVX-512) and adds the products in pairs. A float instruction would multiply 8, after
// others that convert the weights. Weights are read once. Several outputs are computed side by side, each as one stream
// of weights, so that the processor prefetches several pages at once.

#include "avx2.h"

namespace {

constexpr int64_t GROUP = 64;  // inputs with one scale; a group of 4-bit weights has a scale and a minimum

// Registers of 16 integers of 16 bits, or of 8 floats.
struct Avx2Integers {
    using IntVector = __m256i;
    using FloatVector = __m256;
    static constexpr int64_t LANES = 8;

    static IntVector load_bytes(const uint8_t* at) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at)); }
    static void load_nibbles(const uint8_t* at, IntVector n[4]) {  // n[i]: nibble i of each 16-bit word
        const IntVector words = _mm256_loadu_si256((const __m256i*)at), low = _mm256_set1_epi16(15);
        n[0] = _mm256_and_si256(words, low);
        n[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
        n[2] = _mm256_and_si256(_mm256_srli_epi16(words, 8), low);
        n[3] = _mm256_srli_epi16(words, 12);
    }
    template <int VECTORS>
    static IntVector dot(const IntVector* n, const IntVector* x) {
        IntVector acc[VECTORS];
        UNROLLED for (int i = 0; i < VECTORS; i++) acc[i] = _mm256_madd_epi16(n[i], x[i]);
        return _mm256_add_epi32(_mm256_add_epi32(acc[0], acc[1]), _mm256_add_epi32(acc[2], acc[3]));
    }

    static IntVector load_vector(const int16_t* x) { return _mm256_loadu_si256((const __m256i*)x); }

    static FloatVector zero() { return _mm256_setzero_ps(); }
    static FloatVector load_vector(const float* x) { return _mm256_loadu_ps(x); }
    static IntVector first_groups(int) { return _mm256_setzero_si256(); }
    template <int GROUPS>
    static IntVector next_groups(IntVector which) { return _mm256_add_epi32(which, _mm256_set1_epi32(1)); }
    static FloatVector select(FloatVector scales, IntVector which) { return _mm256_permutevar8x32_ps(scales, which); }
    static FloatVector multiply(FloatVector a, FloatVector b) { return _mm256_mul_ps(a, b); }
    static FloatVector to_float(IntVector n) { return _mm256_cvtepi32_ps(n); }
    static FloatVector multiply_add(FloatVector acc, FloatVector a, FloatVector b) {
        return _mm256_fmadd_ps(a, b, acc);
    }
    // Splits pairs of bfloat16 numbers. A bfloat16 is the upper half of a float.
    static void load_scales(const uint16_t* pairs, FloatVector& scale, FloatVector& minimum) {
        const __m256i both = _mm256_loadu_si256((const __m256i*)pairs);
        scale = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        minimum = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
    }
};

// W = n: 8-bit integers, loaded one group at a time.
template <class Register>
struct Int8Weight : Register {
    static constexpr bool GROUP_SCALES = false;
    static constexpr int64_t GROUPS = 1, VECTORS = GROUP / (2 * Register::LANES), BYTES = GROUP;

    static void load(const uint8_t* at, typename Register::IntVector n[VECTORS]) {
        UNROLLED for (int i = 0; i < VECTORS; i++) n[i] = Register::load_bytes(at + 2 * Register::LANES * i);
    }
    static int64_t input_offset(int64_t i) { return i; }
};

// W = scale * n + minimum: two 4-bit integers a byte, and for each group a scale and a minimum in bfloat16. They are
// loaded one register at a time, which holds one group or two.
template <class Register>
struct Int4Weight : Register {
    static constexpr bool GROUP_SCALES = true;
    static constexpr int64_t GROUPS = Register::LANES / 8, VECTORS = 4, BYTES = GROUPS * GROUP / 2;

    static void load(const uint8_t* at, typename Register::IntVector n[VECTORS]) { Register::load_nibbles(at, n); }
    // Where input i is stored, so that nibble i of word j is multiplied with input 4 j + i.
    static int64_t input_offset(int64_t i) { return i % 4 * 16 * GROUPS + i / 4; }
};

#ifdef __AVX512VNNI__
// Registers of 32 integers of 16 bits, or of 16 floats.
struct Avx512Integers {
    using IntVector = __m512i;
    using FloatVector = __m512;
    static constexpr int64_t LANES = 16;

    static IntVector load_bytes(const uint8_t* at) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)at));
    }
    static void load_nibbles(const uint8_t* at, IntVector n[4]) {
        IntVector words = _mm512_loadu_si512(at);
        const IntVector low = _mm512_set1_epi16(15);
        asm("" : "+v"(words));  // otherwise gcc loads it four times
        n[0] = _mm512_and_si512(words, low);
        n[1] = _mm512_and_si512(_mm512_srli_epi16(words, 4), low);
        n[2] = _mm512_and_si512(_mm512_srli_epi16(words, 8), low);
        n[3] = _mm512_srli_epi16(words, 12);
    }
    template <int VECTORS>
    static IntVector dot(const IntVector* n, const IntVector* x) {
        IntVector sum = _mm512_madd_epi16(n[0], x[0]);
        UNROLLED for (int i = 1; i < VECTORS; i++) sum = _mm512_dpwssd_epi32(sum, n[i], x[i]);
        return sum;
    }

    static IntVector load_vector(const int16_t* x) { return _mm512_loadu_si512(x); }

    static FloatVector zero() { return _mm512_setzero_ps(); }
    static FloatVector load_vector(const float* x) { return _mm512_loadu_ps(x); }
    static IntVector first_groups(int groups) {
        return groups == 1 ? _mm512_setzero_si512() : _mm512_mask_set1_epi32(_mm512_setzero_si512(), 0xff00, 1);
    }
    template <int GROUPS>
    static IntVector next_groups(IntVector which) { return _mm512_add_epi32(which, _mm512_set1_epi32(GROUPS)); }
    static FloatVector select(FloatVector scales, IntVector which) { return _mm512_permutexvar_ps(which, scales); }
    static FloatVector multiply(FloatVector a, FloatVector b) { return _mm512_mul_ps(a, b); }
    static FloatVector to_float(IntVector n) { return _mm512_cvtepi32_ps(n); }
    static FloatVector multiply_add(FloatVector acc, FloatVector a, FloatVector b) {
        return _mm512_fmadd_ps(a, b, acc);
    }
    static void load_scales(const uint16_t* pairs, FloatVector& scale, FloatVector& minimum) {
        const __m512i both = _mm512_loadu_si512(pairs);
        scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        minimum = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
    }
};
#endif

// Inputs as 16-bit integers "r d", and for each group "r g" their scale and the sum of the inputs before rounding. (The
// sum is multiplied with the group's minimum.) Groups are padded to a multiple of 16.
struct QuantizedInputs {
    int64_t d, groups, padded;
    AlignedBuffer memory, scale, sum;

    QuantizedInputs(int64_t rows, int64_t d)
        : d(d), groups(d / GROUP), padded((groups + 15) / 16 * 16), memory(rows * d / 2), scale(rows * padded),
          sum(rows * padded) {}
    int16_t* numbers() const { return (int16_t*)memory.data; }
};

template <class Weight>
void quantize(const float* x, int64_t rows, const QuantizedInputs& to) {
    for (int64_t r = 0; r < rows; r++) {
        for (auto* each : {to.scale.data, to.sum.data})
            std::fill(each + r * to.padded + to.groups, each + (r + 1) * to.padded, 0.f);
        for (int64_t g = 0; g < to.groups; g++, x += GROUP) {
            __m256 max_abs = _mm256_setzero_ps(), sum = max_abs;
            UNROLLED for (int i = 0; i < GROUP; i += 8) {
                const __m256 eight = _mm256_loadu_ps(x + i);
                max_abs = _mm256_max_ps(max_abs, _mm256_andnot_ps(_mm256_set1_ps(-0.f), eight));
                sum = _mm256_add_ps(sum, eight);
            }
            float lanes[8];
            _mm256_storeu_ps(lanes, max_abs);
            const float largest = *std::max_element(lanes, lanes + 8), total = hsum(sum);
            const __m256 inverse = _mm256_set1_ps(largest > 0 ? 32767 / largest : 0);
            alignas(32) int32_t rounded[GROUP];
            for (int i = 0; i < GROUP; i += 8)
                _mm256_store_si256((__m256i*)(rounded + i),
                                   _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse)));
            // Where two groups are loaded at a time, each has one half of every register.
            const int64_t first = g / Weight::GROUPS * Weight::GROUPS, half = g % Weight::GROUPS * 16;
            int16_t* const numbers = to.numbers() + r * to.d + first * GROUP + half;
            UNROLLED for (int i = 0; i < GROUP; i++) numbers[Weight::input_offset(i)] = int16_t(rounded[i]);
            // 0 * total makes the scale NaN where an input is infinite or NaN, since an integer cannot be either.
            to.scale.data[r * to.padded + g] = largest / 32767 + 0 * total, to.sum.data[r * to.padded + g] = total;
        }
    }
}

// Computes tasks `task` to `last_task` of a matrix's outputs `begin` to `end` into y "r total". A task is one output of
// each stream.
template <class Weight, int ROWS, int STREAMS>
void integer_streams(const uint8_t* values, const void* scale, const QuantizedInputs& x, float* y, int64_t total,
                     int64_t begin, int64_t end, int64_t task, int64_t last_task) {
    constexpr int64_t BLOCK_GROUPS = Weight::LANES;  // groups whose scales fill a register
    constexpr int VECTORS = Weight::VECTORS, GROUPS = Weight::GROUPS;
    using FloatVector = typename Weight::FloatVector;
    using IntVector = typename Weight::IntVector;
    const int64_t stream_outputs = (end - begin + STREAMS - 1) / STREAMS, d = x.d, groups = x.groups, padded = x.padded;
    const int16_t* const numbers = x.numbers();
    for (; task < last_task; task++) {
        int64_t o[STREAMS];
        const uint8_t* at[STREAMS];
        FloatVector acc[STREAMS][ROWS];
        UNROLLED for (int s = 0; s < STREAMS; s++) {
            o[s] = std::min(begin + s * stream_outputs + task, end - 1);
            at[s] = values + o[s] * groups / Weight::GROUPS * Weight::BYTES;
            UNROLLED for (int r = 0; r < ROWS; r++) acc[s][r] = Weight::zero();
        }
        for (int64_t g = 0; g < groups; g += BLOCK_GROUPS) {
            const int64_t count = std::min(BLOCK_GROUPS, groups - g);
            FloatVector group_scales[STREAMS][ROWS];
            UNROLLED for (int s = 0; s < STREAMS; s++) {
                FloatVector scales, minima;
                if constexpr (Weight::GROUP_SCALES) {
                    uint16_t last[2 * BLOCK_GROUPS] = {};
                    const uint16_t* pairs = (const uint16_t*)scale + 2 * (o[s] * groups + g);
                    if (count < BLOCK_GROUPS) std::copy(pairs, pairs + 2 * count, last), pairs = last;
                    Weight::load_scales(pairs, scales, minima);
                }
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    const int64_t offset = r * padded + g;
                    group_scales[s][r] = Weight::load_vector(x.scale.data + offset);
                    if constexpr (Weight::GROUP_SCALES) {
                        group_scales[s][r] = Weight::multiply(scales, group_scales[s][r]);
                        acc[s][r] = Weight::multiply_add(acc[s][r], minima, Weight::load_vector(x.sum.data + offset));
                    }
                }
            }
            auto which = Weight::first_groups(GROUPS);
            for (int64_t k = 0; k < count; k += GROUPS, which = Weight::template next_groups<GROUPS>(which)) {
                IntVector inputs[ROWS][VECTORS];
                UNROLLED for (int r = 0; r < ROWS; r++)
                    UNROLLED for (int i = 0; i < VECTORS; i++) {
                        IntVector input =
                            Weight::load_vector(numbers + r * d + (g + k) * GROUP + 2 * Weight::LANES * i);
                        if (STREAMS > 1) asm("" : "+v"(input));  // otherwise gcc loads them for every stream
                        inputs[r][i] = input;
                    }
                UNROLLED for (int s = 0; s < STREAMS; s++, at[s - 1] += Weight::BYTES) {
                    IntVector n[VECTORS];
                    Weight::load(at[s], n);
                    _mm_prefetch((const char*)at[s] + 1024, _MM_HINT_T0);
                    UNROLLED for (int r = 0; r < ROWS; r++) {
                        const FloatVector product = Weight::to_float(Weight::template dot<VECTORS>(n, inputs[r]));
                        acc[s][r] = Weight::multiply_add(acc[s][r], product, Weight::select(group_scales[s][r], which));
                    }
                }
            }
        }
        UNROLLED for (int s = 0; s < STREAMS; s++) {
            if (begin + s * stream_outputs + task >= end) break;  // another thread may write this output
            UNROLLED for (int r = 0; r < ROWS; r++) {
                const float sum = hsum(acc[s][r]);
                y[r * total + o[s]] = Weight::GROUP_SCALES ? sum : sum * ((const float*)scale)[o[s]];
            }
        }
    }
}

// The fastest number of streams for 1 to 8 rows. (For one row and 4-bit weights, 3 are 8 % faster than 4.)
constexpr int STREAMS_FOR_ROWS[] = {3, 2, 2, 1, 1, 1, 1, 1};

template <class Weight, size_t... ROWS>
constexpr auto kernels_for_rows(std::index_sequence<ROWS...>) {
    return std::array{integer_streams<Weight, ROWS + 1, STREAMS_FOR_ROWS[ROWS]>...};
}

template <class Weight>
void multiply_integers_as(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    const QuantizedInputs inputs(x.rows, x.d);
    quantize<Weight>(x.data, x.rows, inputs);
    const auto kernel = kernels_for_rows<Weight>(std::make_index_sequence<8>())[x.rows - 1];
    const int64_t size = STREAMS_FOR_ROWS[x.rows - 1], bytes = x.d / GROUP * Weight::BYTES / Weight::GROUPS;
    parallel_for_outputs(matrices, y, threads, size, bytes, [&](const Matrix& matrix, float* y, auto... tasks) {
        kernel((const uint8_t*)matrix.values, matrix.scales, inputs, y, tasks...);
    });
}

// The products "r o" of matrices of one dtype and 1 to 8 rows. The outputs of all matrices are concatenated.
void multiply_integers(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    STD_TORCH_CHECK(0 < x.rows && x.rows <= 8 && 0 < x.d && x.d % GROUP == 0,
                    "linear_integers: 1 to 8 rows of whole groups");
    const auto run = [&](auto registers) {
        using Register = decltype(registers);
        const auto kernel = matrices[0].dtype == ScalarType::Char ? multiply_integers_as<Int8Weight<Register>>
                                                                  : multiply_integers_as<Int4Weight<Register>>;
        kernel(matrices, x, y, threads);
    };
#ifdef __AVX512VNNI__
    if (x.d % (2 * GROUP) == 0) return run(Avx512Integers());
#endif
    run(Avx2Integers());
}

Tensor linear_integers(std::vector<Tensor> values, std::vector<Tensor> scales, Tensor x, int64_t threads) {
    const Rows rows(x);
    Matrices matrices;
    for (size_t m = 0; m < values.size(); m++)
        matrices.emplace_back(values[m], &scales[m], rows.d);
    auto y = torch::stable::new_empty(x, {rows.rows, total_outputs(matrices)});
    multiply_integers(matrices, rows, (float*)y.data_ptr(), threads);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("linear_integers", TORCH_BOX(&linear_integers)); }
