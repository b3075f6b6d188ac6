// Few rows times matrices of 8 or 4 bits on a processor with AVX2: y[r, o] = sum over d of W[o, d] x[r, d].
//
// Inputs are made integers of 16 bits, of each group of 64 the largest 32767. So one instruction multiplies sixteen
// numbers and adds what it gets in pairs, where eight floats take one, and more to be made of bytes. Weights are read
// once, in streams side by side, so that pages are on their way at once.

#include "avx2.h"

namespace {

constexpr int64_t GROUP = 64;  // inputs that share a step, and in four bits a scale and a minimum
constexpr int64_t BLOCK = 8;   // groups whose scales fill a register

struct Inputs {
    std::vector<int16_t> numbers;  // "r d"
    std::vector<float> step, sum;  // of each group, "r g": what the numbers count in, and the sum of the inputs
    int64_t d, groups, padded;

    Inputs(const float* x, int64_t rows, int64_t d, bool nibbles)
        : numbers(rows * d), d(d), groups(d / GROUP), padded((groups + BLOCK - 1) / BLOCK * BLOCK) {
        step.resize(rows * padded), sum.resize(rows * padded);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < groups; g++) {
                const float* from = x + r * d + g * GROUP;
                int16_t* to = &numbers[r * d + g * GROUP];
                float most[8] = {}, all[8] = {};  // the lanes of a register
                for (int i = 0; i < GROUP; i += 8)
                    for (int l = 0; l < 8; l++)
                        most[l] = std::max(most[l], std::fabs(from[i + l])), all[l] += from[i + l];
                const float largest = *std::max_element(most, most + 8), total = std::accumulate(all, all + 8, 0.0f);
                const float inverse = largest > 0 ? 32767 / largest : 0;
                int32_t whole[GROUP];
                for (int i = 0; i < GROUP; i++) whole[i] = int32_t(std::nearbyint(from[i] * inverse));
                if (nibbles)  // of sixteen bits j, nibble i meets input 4 j + i
                    for (int i = 0; i < 4; i++)
                        for (int j = 0; j < 16; j++) to[16 * i + j] = int16_t(whole[4 * j + i]);
                else
                    for (int i = 0; i < GROUP; i++) to[i] = int16_t(whole[i]);
                // An infinite or NaN input makes that of its sum; integers cannot say it.
                step[r * padded + g] = largest / 32767 + 0 * total, sum[r * padded + g] = total;
            }
    }
};

// W = n: integers of 8 bits.
struct Bytes {
    static constexpr bool SCALED = false;
    static constexpr int64_t BYTES = GROUP;

    static void load(const uint8_t* group, __m256i n[4]) {
        for (int i = 0; i < 4; i++) n[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)group + i));
    }
};

// W = scale * n + minimum: two integers of 4 bits a byte, and of each group a scale and a minimum in bfloat16.
struct Nibbles {
    static constexpr bool SCALED = true;
    static constexpr int64_t BYTES = GROUP / 2;

    static void load(const uint8_t* group, __m256i n[4]) {
        const __m256i words = _mm256_loadu_si256((const __m256i*)group), low = _mm256_set1_epi16(15);
        n[0] = _mm256_and_si256(words, low);
        n[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
        n[2] = _mm256_and_si256(_mm256_srli_epi16(words, 8), low);
        n[3] = _mm256_srli_epi16(words, 12);
    }
};

// The outputs from `begin` to `end` of a matrix, in as many streams, to y "r total".
template <class Weight, int ROWS, int STREAMS>
void outputs(const uint8_t* values, const uint16_t* scale, const Inputs& x, float* y, int64_t total, int64_t begin,
             int64_t end) {
    const int64_t each = (end - begin + STREAMS - 1) / STREAMS, d = x.d, groups = x.groups, padded = x.padded;
    const int16_t* const numbers = x.numbers.data();
    for (int64_t i = 0; i < each; i++) {
        int64_t o[STREAMS];
        const uint8_t* at[STREAMS];
        __m256 sums[STREAMS][ROWS];
        UNROLLED for (int s = 0; s < STREAMS; s++) {
            o[s] = std::min(begin + s * each + i, end - 1), at[s] = values + o[s] * groups * Weight::BYTES;
            UNROLLED for (int r = 0; r < ROWS; r++) sums[s][r] = _mm256_setzero_ps();
        }
        for (int64_t g = 0; g < groups; g += BLOCK) {
            const int64_t count = std::min(BLOCK, groups - g);
            float steps[STREAMS][ROWS][BLOCK];
            if constexpr (Weight::SCALED)
                UNROLLED for (int s = 0; s < STREAMS; s++) {
                    uint16_t last[2 * BLOCK] = {};
                    const uint16_t* pairs = scale + 2 * (o[s] * groups + g);
                    if (count < BLOCK) std::copy(pairs, pairs + 2 * count, last), pairs = last;
                    const __m256i both = _mm256_loadu_si256((const __m256i*)pairs);  // a bfloat16 is half a float
                    const __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
                    const __m256 minima = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
                    UNROLLED for (int r = 0; r < ROWS; r++) {
                        const int64_t place = r * padded + g;
                        _mm256_storeu_ps(steps[s][r], _mm256_mul_ps(scales, _mm256_loadu_ps(&x.step[place])));
                        sums[s][r] = _mm256_fmadd_ps(minima, _mm256_loadu_ps(&x.sum[place]), sums[s][r]);
                    }
                }
            for (int64_t k = 0; k < count; k++) {
                const int16_t* const inputs = numbers + (g + k) * GROUP;
                UNROLLED for (int s = 0; s < STREAMS; s++, at[s - 1] += Weight::BYTES) {
                    __m256i n[4];
                    Weight::load(at[s], n);
                    UNROLLED for (int r = 0; r < ROWS; r++) {
                        const __m256i* const row = (const __m256i*)(inputs + r * d);
                        __m256i p[4];
                        for (int i = 0; i < 4; i++) p[i] = _mm256_madd_epi16(n[i], _mm256_loadu_si256(row + i));
                        p[0] = _mm256_add_epi32(_mm256_add_epi32(p[0], p[1]), _mm256_add_epi32(p[2], p[3]));
                        const float* step = Weight::SCALED ? &steps[s][r][k] : &x.step[r * padded + g + k];
                        sums[s][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(p[0]), _mm256_broadcast_ss(step), sums[s][r]);
                    }
                }
            }
        }
        UNROLLED for (int s = 0; s < STREAMS; s++)
            UNROLLED for (int r = 0; r < ROWS; r++) y[r * total + o[s]] = sum_of(sums[s][r]);
    }
}

// Of 1 to 8 rows: as many streams as are fastest (of one row, 3 are 8 % faster than 4 in four bits).
template <class Weight>
constexpr decltype(&outputs<Weight, 1, 1>) OF_ROWS[] = {
    outputs<Weight, 1, 3>, outputs<Weight, 2, 2>, outputs<Weight, 3, 2>, outputs<Weight, 4, 1>,
    outputs<Weight, 5, 1>, outputs<Weight, 6, 1>, outputs<Weight, 7, 1>, outputs<Weight, 8, 1>};

// Of matrices "... d" side by side, and 1 to 8 rows "r d" in float32: "r o". Four bits have scales, "... g 2".
Tensor integers(std::vector<Tensor> values, std::vector<Tensor> scales, Tensor x, int64_t threads) {
    const bool nibbles = !scales.empty();
    const int64_t rows = x.size(0), d = x.size(1);
    STD_TORCH_CHECK(0 < rows && rows <= 8 && 0 < d && d % GROUP == 0, "integers: 1 to 8 rows of whole groups");
    const Inputs inputs((const float*)x.data_ptr(), rows, d, nibbles);
    const auto some = nibbles ? OF_ROWS<Nibbles>[rows - 1] : OF_ROWS<Bytes>[rows - 1];
    return shared(values, nibbles ? d / 2 : d, x, threads,
                  [&](int64_t m, float* y, int64_t total, int64_t begin, int64_t end) {
                      some((const uint8_t*)values[m].data_ptr(),
                           nibbles ? (const uint16_t*)scales[m].data_ptr() : nullptr, inputs, y, total, begin, end);
                  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("integers", TORCH_BOX(&integers)); }
