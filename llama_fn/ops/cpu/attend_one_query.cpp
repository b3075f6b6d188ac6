// Attention of one query a row on a processor with AVX2: softmax(q k) v over the slots up to the row's position.
//
// Slots are added in blocks, whose scores stay in the L1 cache (flash attention: Dao et al. 2022). Where there are more
// threads than rows and kv heads, each row's slots are split (flash decoding: Dao et al. 2023). A register holds eight
// scores, slot by slot: of HEADS heads of one group and 8 / HEADS slots.

#include "avx2.h"

namespace {

constexpr int64_t DECODE_BLOCK = 16;  // slots

// The partial result of one split, for the heads of a group: each head's largest score "g", its sum of
// exp(score - largest) "g", and its sum of exp(score - largest) * value "g h".
struct Partial {
    float *max, *sum, *acc;

    static Partial at(float* memory, int64_t g) { return {memory, memory + g, memory + 2 * g}; }
    static int64_t size(int64_t g, int64_t h) { return g * (h + 2); }
};

// exp(x) for x <= 0, with a relative error of 2e-7. Below -87 it is exp(-87) = 1e-38, and NaN for NaN.
__m256 vector_exp(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87), x);  // x if it is NaN
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // log 2 in two parts (Cody and Waite 1980)
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.f / 720);
    for (const float term : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(term));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

// The horizontal sums of eight registers, in their order.
__m256 hsum_8(const __m256 v[8]) {
    const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 last = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(first, last, 0x20), _mm256_permute2f128_ps(first, last, 0x31));
}

// Reduces the lanes of each head with `op`. Lane i belongs to head i % HEADS, and gets that head's result.
template <int HEADS, class Op>
__m256 reduce_per_head(__m256 v, const Op& op) {
    if constexpr (HEADS < 8) v = op(v, _mm256_permute2f128_ps(v, v, 1));
    if constexpr (HEADS < 4) v = op(v, _mm256_permute_ps(v, 0b01001110));
    if constexpr (HEADS < 2) v = op(v, _mm256_permute_ps(v, 0b10110001));
    return v;
}

// Prefetches `count` numbers, one cache line at a time.
template <class Type>
void prefetch(const Type* at, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(Type)) _mm_prefetch((const char*)(at + i), _MM_HINT_T0);
}

// The scores "s HEADS" of `count` slots. It returns the larger of `max` and each head's largest score. It prefetches
// what is read next: the values of these slots, and the keys of the next block.
template <class Number, int HEADS>
__m256 score_block(const float* queries, const typename Number::Type* keys, int64_t key_stride, int64_t count,
                   int64_t h, float* scores, __m256 max, const typename Number::Type* values, int64_t value_stride) {
    constexpr int SLOTS = 8 / HEADS;
    for (int64_t s = 0; s < count; s += SLOTS) {
        const typename Number::Type* at[SLOTS];  // entries after the last slot repeat it
        UNROLLED for (int j = 0; j < SLOTS; j++) at[j] = keys + std::min(s + j, count - 1) * key_stride;
        UNROLLED for (int j = 0; j < SLOTS; j++)
            prefetch(values + (s + j) * value_stride, h), prefetch(keys + (DECODE_BLOCK + s + j) * key_stride, h);
        __m256 acc[8];
        UNROLLED for (int i = 0; i < 8; i++) acc[i] = _mm256_setzero_ps();
        for (int64_t i = 0; i < h; i += 8)
            UNROLLED for (int j = 0; j < SLOTS; j++) {
                const __m256 key = Number::load(at[j] + i);
                UNROLLED for (int n = 0; n < HEADS; n++) {
                    __m256& dot = acc[j * HEADS + n];
                    dot = _mm256_fmadd_ps(key, _mm256_loadu_ps(queries + n * h + i), dot);
                }
            }
        const __m256 dots = hsum_8(acc);
        _mm256_store_ps(scores + s * HEADS, dots);
        max = _mm256_max_ps(max, dots);
    }
    return reduce_per_head<HEADS>(max, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
}

// Replaces each score by exp(score - max), and returns each head's sum of them.
template <int HEADS>
__m256 exp_block(float* scores, int64_t count, __m256 max) {
    alignas(32) float slots[8];
    for (int i = 0; i < 8; i++) slots[i] = i / HEADS;
    __m256 sum = _mm256_setzero_ps();
    for (int64_t s = 0; s < count; s += 8 / HEADS) {
        const __m256 valid = _mm256_cmp_ps(_mm256_load_ps(slots), _mm256_set1_ps(count - s), _CMP_LT_OQ);
        const __m256 weight = _mm256_and_ps(vector_exp(_mm256_sub_ps(_mm256_load_ps(scores + s * HEADS), max)), valid);
        _mm256_store_ps(scores + s * HEADS, weight);
        sum = _mm256_add_ps(sum, weight);
    }
    return reduce_per_head<HEADS>(sum, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
}

// out = out * rescale + the sum over the slots of weight * value, for HEADS heads and `VECTORS` registers of each.
template <class Number, int HEADS, int VECTORS>
void accumulate_values(const float* weights, const typename Number::Type* values, int64_t slot_stride, int64_t count,
                       int64_t h, const float* rescale, float* out) {
    __m256 acc[HEADS][VECTORS];
    UNROLLED for (int n = 0; n < HEADS; n++)
        UNROLLED for (int w = 0; w < VECTORS; w++)
            acc[n][w] = _mm256_mul_ps(_mm256_loadu_ps(out + n * h + 8 * w), _mm256_set1_ps(rescale[n]));
    for (int64_t s = 0; s < count; s++, weights += HEADS, values += slot_stride) {
        __m256 value[VECTORS];
        UNROLLED for (int w = 0; w < VECTORS; w++) value[w] = Number::load(values + 8 * w);
        UNROLLED for (int n = 0; n < HEADS; n++) {
            const __m256 weight = _mm256_broadcast_ss(weights + n);
            UNROLLED for (int w = 0; w < VECTORS; w++) acc[n][w] = _mm256_fmadd_ps(weight, value[w], acc[n][w]);
        }
    }
    UNROLLED for (int n = 0; n < HEADS; n++)
        UNROLLED for (int w = 0; w < VECTORS; w++) _mm256_storeu_ps(out + n * h + 8 * w, acc[n][w]);
}

// Adds a block of slots to the partial result of HEADS heads.
template <class Number, int HEADS>
void attend_block(const float* queries, const typename Number::Type* keys, int64_t key_stride,
                  const typename Number::Type* values, int64_t value_stride, int64_t count, int64_t h,
                  Partial partial) {
    constexpr int VECTORS = 8 / HEADS;
    alignas(32) float scores[DECODE_BLOCK * HEADS], old_max[8], new_max[8], rescale[8], block_sum[8];
    for (int i = 0; i < 8; i++) old_max[i] = partial.max[i % HEADS];
    const __m256 largest = score_block<Number, HEADS>(queries, keys, key_stride, count, h, scores,
                                                      _mm256_load_ps(old_max), values, value_stride);
    _mm256_store_ps(new_max, largest);
    _mm256_store_ps(rescale, vector_exp(_mm256_sub_ps(_mm256_load_ps(old_max), largest)));
    _mm256_store_ps(block_sum, exp_block<HEADS>(scores, count, largest));
    for (int n = 0; n < HEADS; n++)
        partial.max[n] = new_max[n], partial.sum[n] = partial.sum[n] * rescale[n] + block_sum[n];
    for (int64_t i = 0; i < h;) {
        const bool wide = i + 8 * VECTORS <= h;
        const auto kernel = wide ? accumulate_values<Number, HEADS, VECTORS> : accumulate_values<Number, HEADS, 1>;
        kernel(scores, values + i, value_stride, count, h, rescale, partial.acc + i);
        i += wide ? 8 * VECTORS : 8;
    }
}

// The partial result of the slots from `begin` to `end` of one row, for the heads of one group.
template <class Number>
void attend_slots(const float* queries, const CacheView& keys, const CacheView& values, int64_t row, int64_t head,
                  int64_t begin, int64_t end, int64_t g, int64_t h, Partial partial) {
    using Type = typename Number::Type;
    const Type* const key = (const Type*)keys.data + row * keys.row_stride + head * keys.head_stride;
    const Type* const value = (const Type*)values.data + row * values.row_stride + head * values.head_stride;
    std::fill_n(partial.max, g, LOWEST), std::fill_n(partial.sum, g, 0.f), std::fill_n(partial.acc, g * h, 0.f);
    for (int64_t s = begin; s < end; s += DECODE_BLOCK)
        for (int64_t n = 0, heads; n < g; n += heads) {
            heads = g - n >= 8 ? 8 : g - n >= 4 ? 4 : g - n >= 2 ? 2 : 1;
            const auto kernel = heads == 8   ? attend_block<Number, 8>
                              : heads == 4 ? attend_block<Number, 4>
                              : heads == 2 ? attend_block<Number, 2>
                                           : attend_block<Number, 1>;
            kernel(queries + n * h, key + s * keys.slot_stride, keys.slot_stride, value + s * values.slot_stride,
                   values.slot_stride, std::min(DECODE_BLOCK, end - s), h,
                   Partial{partial.max + n, partial.sum + n, partial.acc + n * h});
        }
}

// Combines the partial results of a row's splits into the results "g h" of its heads.
void combine(float* partials, int64_t splits, int64_t g, int64_t h, float* heads) {
    const int64_t size = Partial::size(g, h);
    for (int64_t n = 0; n < g; n++, heads += h) {
        float max = LOWEST, sum = 0;
        for (int64_t p = 0; p < splits; p++) max = std::max(max, Partial::at(partials + p * size, g).max[n]);
        std::fill_n(heads, h, 0.f);
        for (int64_t p = 0; p < splits; p++) {
            const Partial partial = Partial::at(partials + p * size, g);
            const float rescale = std::exp(partial.max[n] - max);
            sum += rescale * partial.sum[n];
            for (int64_t i = 0; i < h; i++) heads[i] += rescale * partial.acc[n * h + i];
        }
        for (int64_t i = 0; i < h; i++) heads[i] /= max == LOWEST ? NAN : sum;  // as 0 / 0
    }
}

// Attention of queries "b k g h", which are already divided by sqrt(h), over keys and values "b k s h" of one dtype.
// The results of the heads are "b k g h".
void attend_rows(const float* queries, ScalarType dtype, const CacheView& keys, const CacheView& values,
                 const int64_t* positions, int64_t b, int64_t k, int64_t g, int64_t h, int64_t capacity,
                 int64_t threads, float* heads) {
    const auto kernel = dispatch(dtype, [](auto number) { return attend_slots<decltype(number)>; });
    // The smallest number of splits with which every thread gets equally many.
    const int64_t rows = b * k, splits = threads / std::gcd(rows, threads), size = Partial::size(g, h);
    const AlignedBuffer partials(rows * splits * size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < rows * splits; i++) {
            const int64_t row = i / splits, p = i % splits;
            const int64_t count = std::min(positions[row / k] + 1, capacity);
            const int64_t blocks = (count + DECODE_BLOCK - 1) / DECODE_BLOCK;
            kernel(queries + row * g * h, keys, values, row / k, row % k, blocks * p / splits * DECODE_BLOCK,
                   std::min(blocks * (p + 1) / splits * DECODE_BLOCK, count), g, h,
                   Partial::at(partials.data + i * size, g));
        }
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            combine(partials.data + row * splits * size, splits, g, h, heads + row * g * h);
    }
}

Tensor attend_one_query(Tensor queries, Tensor keys, Tensor values, Tensor positions, int64_t threads) {
    const int64_t b = queries.size(0), k = queries.size(1), g = queries.size(2), h = queries.size(3);
    STD_TORCH_CHECK(b * k > 0 && g > 0 && h > 0 && h % 8 == 0 && keys.stride(3) == 1 && values.stride(3) == 1,
                    "attend_one_query: heads of whole registers");
    STD_TORCH_CHECK(keys.scalar_type() == values.scalar_type() && positions.scalar_type() == ScalarType::Long,
                    "attend_one_query: keys and values of one dtype, positions of 64 bits");
    auto heads = torch::stable::new_empty(queries, {b, k, g, h});
    attend_rows((const float*)queries.data_ptr(), keys.scalar_type(), CacheView(keys), CacheView(values),
                (const int64_t*)positions.data_ptr(), b, k, g, h, keys.size(2), threads, (float*)heads.data_ptr());
    return heads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("attend_one_query", TORCH_BOX(&attend_one_query)); }
