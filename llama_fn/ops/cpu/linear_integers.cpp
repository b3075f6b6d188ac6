// A few rows times matrices of 8 or 4 bits: y[r, o] = sum over d of W[o, d] x[r, d].
//
// Inputs are rounded to integers of 16 bits, so that the largest of each group of 64 becomes 32767. Then one
// instruction multiplies sixteen numbers (thirty-two with AVX-512) and adds the products in pairs. Floats
// take one for eight, and more to convert bytes. Weights are read once, in several streams, so that several pages are
// prefetched at once.

#include "avx2.h"

namespace {

constexpr int64_t GROUP = 64;  // inputs that are rounded together; of 4-bit weights they share a scale and a minimum

// Registers of sixteen integers, or of eight floats.
struct Narrow {
    using Words = __m256i;
    using Sums = __m256;
    static constexpr int64_t LANES = 8;

    static Words bytes(const uint8_t* at) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at)); }
    static void nibbles(const uint8_t* at, Words n[4]) {  // the first of each word, the second, ...
        const Words words = _mm256_loadu_si256((const __m256i*)at), low = _mm256_set1_epi16(15);
        n[0] = _mm256_and_si256(words, low);
        n[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
        n[2] = _mm256_and_si256(_mm256_srli_epi16(words, 8), low);
        n[3] = _mm256_srli_epi16(words, 12);
    }
    template <int COUNT>
    static Words products(const Words* n, const Words* x) {
        Words sums[COUNT];
        UNROLLED for (int i = 0; i < COUNT; i++) sums[i] = _mm256_madd_epi16(n[i], x[i]);
        return _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3]));
    }

    static Words at(const int16_t* x) { return _mm256_loadu_si256((const __m256i*)x); }

    static Sums none() { return _mm256_setzero_ps(); }
    static Sums at(const float* x) { return _mm256_loadu_ps(x); }
    static Words first(int) { return _mm256_setzero_si256(); }
    template <int GROUPS>
    static Words next(Words which) { return _mm256_add_epi32(which, _mm256_set1_epi32(1)); }
    static Sums of(Sums steps, Words which) { return _mm256_permutevar8x32_ps(steps, which); }
    static Sums times(Sums a, Sums b) { return _mm256_mul_ps(a, b); }
    static Sums floats(Words n) { return _mm256_cvtepi32_ps(n); }
    static Sums add(Sums sums, Sums a, Sums b) { return _mm256_fmadd_ps(a, b, sums); }
    static void scales(const uint16_t* pairs, Sums& scale, Sums& minimum) {  // a bfloat16 is the upper half of a float
        const __m256i both = _mm256_loadu_si256((const __m256i*)pairs);
        scale = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        minimum = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
    }
};

// W = n: integers of 8 bits, a group at once.
template <class Register>
struct Bytes : Register {
    static constexpr bool SCALED = false;
    static constexpr int64_t GROUPS = 1, COUNT = GROUP / (2 * Register::LANES), SIZE = GROUP;

    static void load(const uint8_t* at, typename Register::Words n[COUNT]) {
        UNROLLED for (int i = 0; i < COUNT; i++) n[i] = Register::bytes(at + 2 * Register::LANES * i);
    }
    static int64_t place(int64_t i) { return i; }
};

// W = scale * n + minimum: two integers of 4 bits a byte, and of each group a scale and a minimum in bfloat16; a
// register of them at once, which is of one group or of two.
template <class Register>
struct Nibbles : Register {
    static constexpr bool SCALED = true;
    static constexpr int64_t GROUPS = Register::LANES / 8, COUNT = 4, SIZE = GROUPS * GROUP / 2;

    static void load(const uint8_t* at, typename Register::Words n[COUNT]) { Register::nibbles(at, n); }
    static int64_t place(int64_t i) { return i % 4 * 16 * GROUPS + i / 4; }  // nibble i of word j meets input 4 j + i
};

#ifdef __AVX512VNNI__
// Of thirty-two, or sixteen.
struct Wide {
    using Words = __m512i;
    using Sums = __m512;
    static constexpr int64_t LANES = 16;

    static Words bytes(const uint8_t* at) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)at)); }
    static void nibbles(const uint8_t* at, Words n[4]) {
        Words words = _mm512_loadu_si512(at);
        const Words low = _mm512_set1_epi16(15);
        asm("" : "+v"(words));  // otherwise gcc loads it four times
        n[0] = _mm512_and_si512(words, low);
        n[1] = _mm512_and_si512(_mm512_srli_epi16(words, 4), low);
        n[2] = _mm512_and_si512(_mm512_srli_epi16(words, 8), low);
        n[3] = _mm512_srli_epi16(words, 12);
    }
    template <int COUNT>
    static Words products(const Words* n, const Words* x) {
        Words sum = _mm512_madd_epi16(n[0], x[0]);
        UNROLLED for (int i = 1; i < COUNT; i++) sum = _mm512_dpwssd_epi32(sum, n[i], x[i]);
        return sum;
    }

    static Words at(const int16_t* x) { return _mm512_loadu_si512(x); }

    static Sums none() { return _mm512_setzero_ps(); }
    static Sums at(const float* x) { return _mm512_loadu_ps(x); }
    static Words first(int groups) {
        return groups == 1 ? _mm512_setzero_si512() : _mm512_mask_set1_epi32(_mm512_setzero_si512(), 0xff00, 1);
    }
    template <int GROUPS>
    static Words next(Words which) { return _mm512_add_epi32(which, _mm512_set1_epi32(GROUPS)); }
    static Sums of(Sums steps, Words which) { return _mm512_permutexvar_ps(which, steps); }
    static Sums times(Sums a, Sums b) { return _mm512_mul_ps(a, b); }
    static Sums floats(Words n) { return _mm512_cvtepi32_ps(n); }
    static Sums add(Sums sums, Sums a, Sums b) { return _mm512_fmadd_ps(a, b, sums); }
    static void scales(const uint16_t* pairs, Sums& scale, Sums& minimum) {
        const __m512i both = _mm512_loadu_si512(pairs);
        scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        minimum = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
    }
};
#endif

struct Inputs {
    int64_t d, groups, padded;
    Floats memory, step, sum;  // of each group, "r g": what the numbers count in, and the sum of the inputs

    Inputs(int64_t rows, int64_t d)
        : d(d), groups(d / GROUP), padded((groups + 15) / 16 * 16), memory(rows * d / 2), step(rows * padded),
          sum(rows * padded) {}
    int16_t* numbers() const { return (int16_t*)memory.at; }  // "r d"
};

template <class Weight>
void take(const float* x, int64_t rows, const Inputs& to) {
    for (int64_t r = 0; r < rows; r++) {
        for (auto* each : {to.step.at, to.sum.at})
            std::fill(each + r * to.padded + to.groups, each + (r + 1) * to.padded, 0.f);
        for (int64_t g = 0; g < to.groups; g++, x += GROUP) {
            __m256 most = _mm256_setzero_ps(), all = most;
            UNROLLED for (int i = 0; i < GROUP; i += 8) {
                const __m256 eight = _mm256_loadu_ps(x + i);
                most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.f), eight));
                all = _mm256_add_ps(all, eight);
            }
            float lanes[8];
            _mm256_storeu_ps(lanes, most);
            const float largest = *std::max_element(lanes, lanes + 8), total = sum_of(all);
            const __m256 inverse = _mm256_set1_ps(largest > 0 ? 32767 / largest : 0);
            alignas(32) int32_t whole[GROUP];
            for (int i = 0; i < GROUP; i += 8)
                _mm256_store_si256((__m256i*)(whole + i),
                                   _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse)));
            // The groups that are taken at once have their halves of every register.
            const int64_t first = g / Weight::GROUPS * Weight::GROUPS, half = g % Weight::GROUPS * 16;
            int16_t* const numbers = to.numbers() + r * to.d + first * GROUP + half;
            UNROLLED for (int i = 0; i < GROUP; i++) numbers[Weight::place(i)] = int16_t(whole[i]);
            // An infinite or NaN input makes the group's sum infinite or NaN, since integers cannot be either.
            to.step.at[r * to.padded + g] = largest / 32767 + 0 * total, to.sum.at[r * to.padded + g] = total;
        }
    }
}

// Of a matrix's outputs from `begin` to `end`, in as many streams, some pieces, to y "r total": each an output of every
// stream.
template <class Weight, int ROWS, int STREAMS>
void outputs(const uint8_t* values, const void* scale, const Inputs& x, float* y, int64_t total, int64_t begin,
             int64_t end, int64_t piece, int64_t last_piece) {
    constexpr int64_t BLOCK = Weight::LANES;  // groups whose scales fill a register
    constexpr int COUNT = Weight::COUNT, GROUPS = Weight::GROUPS;
    using Sums = typename Weight::Sums;
    using Words = typename Weight::Words;
    const int64_t each = (end - begin + STREAMS - 1) / STREAMS, d = x.d, groups = x.groups, padded = x.padded;
    const int16_t* const numbers = x.numbers();
    for (; piece < last_piece; piece++) {
        int64_t o[STREAMS];
        const uint8_t* at[STREAMS];
        Sums sums[STREAMS][ROWS];
        UNROLLED for (int s = 0; s < STREAMS; s++) {
            o[s] = std::min(begin + s * each + piece, end - 1);
            at[s] = values + o[s] * groups / Weight::GROUPS * Weight::SIZE;
            UNROLLED for (int r = 0; r < ROWS; r++) sums[s][r] = Weight::none();
        }
        for (int64_t g = 0; g < groups; g += BLOCK) {
            const int64_t count = std::min(BLOCK, groups - g);
            Sums steps[STREAMS][ROWS];
            UNROLLED for (int s = 0; s < STREAMS; s++) {
                Sums scales, minima;
                if constexpr (Weight::SCALED) {
                    uint16_t last[2 * BLOCK] = {};
                    const uint16_t* pairs = (const uint16_t*)scale + 2 * (o[s] * groups + g);
                    if (count < BLOCK) std::copy(pairs, pairs + 2 * count, last), pairs = last;
                    Weight::scales(pairs, scales, minima);
                }
                UNROLLED for (int r = 0; r < ROWS; r++) {
                    const int64_t place = r * padded + g;
                    steps[s][r] = Weight::at(x.step.at + place);
                    if constexpr (Weight::SCALED) {
                        steps[s][r] = Weight::times(scales, steps[s][r]);
                        sums[s][r] = Weight::add(sums[s][r], minima, Weight::at(x.sum.at + place));
                    }
                }
            }
            auto which = Weight::first(GROUPS);
            for (int64_t k = 0; k < count; k += GROUPS, which = Weight::template next<GROUPS>(which)) {
                Words inputs[ROWS][COUNT];
                UNROLLED for (int r = 0; r < ROWS; r++)
                    UNROLLED for (int i = 0; i < COUNT; i++) {
                        Words some = Weight::at(numbers + r * d + (g + k) * GROUP + 2 * Weight::LANES * i);
                        if (STREAMS > 1) asm("" : "+v"(some));  // otherwise gcc loads them for every stream
                        inputs[r][i] = some;
                    }
                UNROLLED for (int s = 0; s < STREAMS; s++, at[s - 1] += Weight::SIZE) {
                    Words n[COUNT];
                    Weight::load(at[s], n);
                    _mm_prefetch((const char*)at[s] + 1024, _MM_HINT_T0);
                    UNROLLED for (int r = 0; r < ROWS; r++) {
                        const Sums whole = Weight::floats(Weight::template products<COUNT>(n, inputs[r]));
                        sums[s][r] = Weight::add(sums[s][r], whole, Weight::of(steps[s][r], which));
                    }
                }
            }
        }
        UNROLLED for (int s = 0; s < STREAMS; s++) {
            if (begin + s * each + piece >= end) break;  // another thread may write this output
            UNROLLED for (int r = 0; r < ROWS; r++) {
                const float sum = sum_of(sums[s][r]);
                y[r * total + o[s]] = Weight::SCALED ? sum : sum * ((const float*)scale)[o[s]];
            }
        }
    }
}

// For 1 to 8 rows, the fastest number of streams (for one row in four bits, 3 are 8 % faster than 4).
constexpr int STREAMS_OF[] = {3, 2, 2, 1, 1, 1, 1, 1};

template <class Weight, size_t... ROWS>
constexpr auto of_rows(std::index_sequence<ROWS...>) {
    return std::array{outputs<Weight, ROWS + 1, STREAMS_OF[ROWS]>...};
}

template <class Weight>
void integers_by(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    const Inputs inputs(x.rows, x.d);
    take<Weight>(x.at, x.rows, inputs);
    const auto some = of_rows<Weight>(std::make_index_sequence<8>())[x.rows - 1];
    const int64_t size = STREAMS_OF[x.rows - 1], bytes = x.d / GROUP * Weight::SIZE / Weight::GROUPS;
    shared(matrices, y, threads, size, bytes, [&](const Matrix& matrix, float* y, auto... pieces) {
        some((const uint8_t*)matrix.values, matrix.scales, inputs, y, pieces...);
    });
}

// The product of matrices, side by side, with 1 to 8 rows: "r o".
void integers_times(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    STD_TORCH_CHECK(0 < x.rows && x.rows <= 8 && 0 < x.d && x.d % GROUP == 0, "integers: 1 to 8 rows of whole groups");
    const auto by = [&](auto lanes) {
        using Register = decltype(lanes);
        const bool bytes = matrices[0].kind == ScalarType::Char;
        (bytes ? integers_by<Bytes<Register>> : integers_by<Nibbles<Register>>)(matrices, x, y, threads);
    };
#ifdef __AVX512VNNI__
    if (x.d % (2 * GROUP) == 0) return by(Wide());
#endif
    by(Narrow());
}

Tensor integers(std::vector<Tensor> values, std::vector<Tensor> scales, Tensor x, int64_t threads) {
    const Rows rows(x);
    Matrices matrices;
    for (size_t m = 0; m < values.size(); m++)
        matrices.emplace_back(values[m], &scales[m], rows.d);
    auto y = torch::stable::new_empty(x, {rows.rows, outputs_of(matrices)});
    integers_times(matrices, rows, (float*)y.data_ptr(), threads);
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("integers", TORCH_BOX(&integers)); }
