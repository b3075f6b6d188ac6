// Attention of one query a row on a processor with AVX2: softmax(q k) v over the slots up to the row's position.
//
// Slots are processed in chunks, whose scores stay in the L1 cache. Accumulators are relative to the largest score so
// far (flash attention: Dao et al. 2022). A register holds eight scores: of eight heads that share a key, or of fewer
// heads and several slots.

#include "avx2.h"

namespace {

constexpr int64_t CHUNK = 16;  // slots

// The accumulators of the heads that share keys: each head's largest score, its sum of exp(score - largest), and
// that of exp(score - largest) times the values, "g h".
struct Said {
    float *most, *total, *values;

    static Said at(float* memory, int64_t g) { return {memory, memory + g, memory + 2 * g}; }
    static int64_t size(int64_t g, int64_t h) { return g * (h + 2); }
};

// exp(x) of x <= 0, to 2e-7; below -87 it is that of -87, 1e-38, and of NaN it is NaN.
__m256 exp_of(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87), x);  // the second, if one of them is NaN
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // log 2 in two parts (Cody and Waite 1980)
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.f / 720);
    for (const float factor : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(factor));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

// The sum of each of eight registers, in their order.
__m256 sums_of(const __m256 v[8]) {
    const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 last = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(first, last, 0x20), _mm256_permute2f128_ps(first, last, 0x31));
}

// Of numbers of `HEADS` heads by turns, in each place those of its head joined.
template <int HEADS, class Join>
__m256 of_each(__m256 v, const Join& join) {
    if constexpr (HEADS < 8) v = join(v, _mm256_permute2f128_ps(v, v, 1));
    if constexpr (HEADS < 4) v = join(v, _mm256_permute_ps(v, 0b01001110));
    if constexpr (HEADS < 2) v = join(v, _mm256_permute_ps(v, 0b10110001));
    return v;
}

// Prefetches numbers.
template <class Type>
void ask(const Type* at, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(Type)) _mm_prefetch((const char*)(at + i), _MM_HINT_T0);
}

// The scores of `count` slots, of `HEADS` heads by turns, and the largest in each lane so far. It prefetches what is
// read next: the values of these slots, and the keys of the next chunk.
template <class Number, int HEADS>
__m256 score(const float* queries, const typename Number::Type* keys, int64_t slot, int64_t count, int64_t h,
             float* scores, __m256 most, const typename Number::Type* values, int64_t value_slot) {
    constexpr int SLOTS = 8 / HEADS;
    for (int64_t s = 0; s < count; s += SLOTS) {
        const typename Number::Type* at[SLOTS];  // entries after the last slot repeat it
        UNROLLED for (int j = 0; j < SLOTS; j++) at[j] = keys + std::min(s + j, count - 1) * slot;
        UNROLLED for (int j = 0; j < SLOTS; j++)
            ask(values + (s + j) * value_slot, h), ask(keys + (CHUNK + s + j) * slot, h);
        __m256 sums[8];
        UNROLLED for (int i = 0; i < 8; i++) sums[i] = _mm256_setzero_ps();
        for (int64_t i = 0; i < h; i += 8)
            UNROLLED for (int j = 0; j < SLOTS; j++) {
                const __m256 key = Number::load(at[j] + i);
                UNROLLED for (int n = 0; n < HEADS; n++) {
                    __m256& sum = sums[j * HEADS + n];
                    sum = _mm256_fmadd_ps(key, _mm256_loadu_ps(queries + n * h + i), sum);
                }
            }
        const __m256 eight = sums_of(sums);
        _mm256_store_ps(scores + s * HEADS, eight);
        most = _mm256_max_ps(most, eight);
    }
    return of_each<HEADS>(most, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
}

// exp(score - most) in the place of the scores; their sum for each head.
template <int HEADS>
__m256 weigh(float* scores, int64_t count, __m256 most) {
    alignas(32) float slots[8];
    for (int i = 0; i < 8; i++) slots[i] = i / HEADS;
    __m256 total = _mm256_setzero_ps();
    for (int64_t s = 0; s < count; s += 8 / HEADS) {
        const __m256 there = _mm256_cmp_ps(_mm256_load_ps(slots), _mm256_set1_ps(count - s), _CMP_LT_OQ);
        const __m256 weight = _mm256_and_ps(exp_of(_mm256_sub_ps(_mm256_load_ps(scores + s * HEADS), most)), there);
        _mm256_store_ps(scores + s * HEADS, weight);
        total = _mm256_add_ps(total, weight);
    }
    return of_each<HEADS>(total, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
}

// For each of `HEADS` heads, `WIDE` registers of sum = sum * factor + sum over the slots of weight * value.
template <class Number, int HEADS, int WIDE>
void mix(const float* weights, const typename Number::Type* values, int64_t slot, int64_t count, int64_t h,
         const float* factors, float* to) {
    __m256 sums[HEADS][WIDE];
    UNROLLED for (int n = 0; n < HEADS; n++)
        UNROLLED for (int w = 0; w < WIDE; w++)
            sums[n][w] = _mm256_mul_ps(_mm256_loadu_ps(to + n * h + 8 * w), _mm256_set1_ps(factors[n]));
    for (int64_t s = 0; s < count; s++, weights += HEADS, values += slot) {
        __m256 value[WIDE];
        UNROLLED for (int w = 0; w < WIDE; w++) value[w] = Number::load(values + 8 * w);
        UNROLLED for (int n = 0; n < HEADS; n++) {
            const __m256 weight = _mm256_broadcast_ss(weights + n);
            UNROLLED for (int w = 0; w < WIDE; w++) sums[n][w] = _mm256_fmadd_ps(weight, value[w], sums[n][w]);
        }
    }
    UNROLLED for (int n = 0; n < HEADS; n++)
        UNROLLED for (int w = 0; w < WIDE; w++) _mm256_storeu_ps(to + n * h + 8 * w, sums[n][w]);
}

// Adds a chunk of slots to the accumulators of `HEADS` heads.
template <class Number, int HEADS>
void attend(const float* queries, const typename Number::Type* keys, int64_t key_slot,
            const typename Number::Type* values, int64_t value_slot, int64_t count, int64_t h, Said said) {
    constexpr int WIDE = 8 / HEADS;
    alignas(32) float scores[CHUNK * HEADS], before[8], most[8], factors[8], totals[8];
    for (int i = 0; i < 8; i++) before[i] = said.most[i % HEADS];
    const __m256 largest = score<Number, HEADS>(queries, keys, key_slot, count, h, scores, _mm256_load_ps(before),
                                                values, value_slot);
    _mm256_store_ps(most, largest);
    _mm256_store_ps(factors, exp_of(_mm256_sub_ps(_mm256_load_ps(before), largest)));
    _mm256_store_ps(totals, weigh<HEADS>(scores, count, largest));
    for (int n = 0; n < HEADS; n++) said.most[n] = most[n], said.total[n] = said.total[n] * factors[n] + totals[n];
    for (int64_t i = 0; i < h;) {
        const bool wide = i + 8 * WIDE <= h;
        const auto some = wide ? mix<Number, HEADS, WIDE> : mix<Number, HEADS, 1>;
        some(scores, values + i, value_slot, count, h, factors, said.values + i);
        i += wide ? 8 * WIDE : 8;
    }
}

// Accumulates the slots from `begin` to `end` of a row for the heads that share them.
template <class Number>
void slots(const float* queries, const Leaf& keys, const Leaf& values, int64_t row, int64_t head, int64_t begin,
           int64_t end, int64_t g, int64_t h, Said said) {
    using Type = typename Number::Type;
    const Type* const key = (const Type*)keys.data + row * keys.row + head * keys.head;
    const Type* const value = (const Type*)values.data + row * values.row + head * values.head;
    std::fill_n(said.most, g, LEAST), std::fill_n(said.total, g, 0.f), std::fill_n(said.values, g * h, 0.f);
    for (int64_t s = begin; s < end; s += CHUNK)
        for (int64_t n = 0, heads; n < g; n += heads) {
            heads = g - n >= 8 ? 8 : g - n >= 4 ? 4 : g - n >= 2 ? 2 : 1;
            const auto some = heads == 8   ? attend<Number, 8>
                              : heads == 4 ? attend<Number, 4>
                              : heads == 2 ? attend<Number, 2>
                                           : attend<Number, 1>;
            some(queries + n * h, key + s * keys.slot, keys.slot, value + s * values.slot, values.slot,
                 std::min(CHUNK, end - s), h, Said{said.most + n, said.total + n, said.values + n * h});
        }
}

// The weighted mean of the accumulators of several parts of the slots, which lie one after the other, into "g h".
void join(float* said, int64_t parts, int64_t g, int64_t h, float* heads) {
    const int64_t size = Said::size(g, h);
    for (int64_t n = 0; n < g; n++, heads += h) {
        float most = LEAST, total = 0;
        for (int64_t p = 0; p < parts; p++) most = std::max(most, Said::at(said + p * size, g).most[n]);
        std::fill_n(heads, h, 0.f);
        for (int64_t p = 0; p < parts; p++) {
            const Said part = Said::at(said + p * size, g);
            const float share = std::exp(part.most[n] - most);
            total += share * part.total[n];
            for (int64_t i = 0; i < h; i++) heads[i] += share * part.values[n * h + i];
        }
        for (int64_t i = 0; i < h; i++) heads[i] /= most == LEAST ? NAN : total;  // as 0 / 0
    }
}

// Of queries "b k g h", divided by sqrt(h), and keys and values "b k s h" in numbers of a kind: heads "b k g h".
void query(const float* queries, ScalarType kind, const Leaf& keys, const Leaf& values, const int64_t* positions,
           int64_t b, int64_t k, int64_t g, int64_t h, int64_t room, int64_t threads, float* heads) {
    const auto some = of_kind(kind, [](auto number) { return slots<decltype(number)>; });
    // Each row's slots are split into parts, so that every thread has the same number of parts.
    const int64_t rows = b * k, parts = threads / std::gcd(rows, threads), size = Said::size(g, h);
    const Floats said(rows * parts * size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < rows * parts; i++) {
            const int64_t row = i / parts, p = i % parts;
            const int64_t count = std::min(positions[row / k] + 1, room), chunks = (count + CHUNK - 1) / CHUNK;
            some(queries + row * g * h, keys, values, row / k, row % k, chunks * p / parts * CHUNK,
                 std::min(chunks * (p + 1) / parts * CHUNK, count), g, h, Said::at(said.at + i * size, g));
        }
#pragma omp for
        for (int64_t row = 0; row < rows; row++) join(said.at + row * parts * size, parts, g, h, heads + row * g * h);
    }
}

Tensor one_query(Tensor queries, Tensor keys, Tensor values, Tensor positions, int64_t threads) {
    const int64_t b = queries.size(0), k = queries.size(1), g = queries.size(2), h = queries.size(3);
    STD_TORCH_CHECK(b * k > 0 && g > 0 && h > 0 && h % 8 == 0 && keys.stride(3) == 1 && values.stride(3) == 1,
                    "one_query: heads of whole registers");
    STD_TORCH_CHECK(keys.scalar_type() == values.scalar_type() && positions.scalar_type() == ScalarType::Long,
                    "one_query: keys and values of one dtype, positions of 64 bits");
    auto heads = torch::stable::new_empty(queries, {b, k, g, h});
    query((const float*)queries.data_ptr(), keys.scalar_type(), Leaf(keys), Leaf(values),
          (const int64_t*)positions.data_ptr(), b, k, g, h, keys.size(2), threads, (float*)heads.data_ptr());
    return heads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("one_query", TORCH_BOX(&one_query)); }
