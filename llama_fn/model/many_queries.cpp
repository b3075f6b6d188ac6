// Attention of many queries a row on a processor with AVX2: softmax(q k) v over the slots up to each query's position.
//
// The queries of all heads that share a key lie side by side in registers, a number of each; what a slot's key or value
// says to them is a number in all places of another. So the largest score, the sum of weights and what is summed of
// values are found place by place, over one block of slots after the other (flash attention: Dao et al. 2022), and both
// products are one loop. It multiplies words of 32 bits: floats, or pairs of bfloat16 where one instruction takes them.

#include "avx2.h"

namespace {

constexpr int64_t SLOTS = 32;   // of a block
constexpr int64_t VECTORS = 3;  // of queries: with as many times `TILE` sums, what the registers hold

#ifdef __AVX512F__
using Vector = __m512;
constexpr int64_t LANES = 16, TILE_ROWS = 8;
Vector all_of(float x) { return _mm512_set1_ps(x); }
Vector multiplied_and_added(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }  // the second, if one of them is NaN
#else
using Vector = __m256;
constexpr int64_t LANES = 8, TILE_ROWS = 4;
Vector all_of(float x) { return _mm256_set1_ps(x); }
Vector multiplied_and_added(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
#endif
using Integers = int32_t __attribute__((vector_size(sizeof(Vector))));
constexpr int64_t MANY = VECTORS * LANES;  // queries at once

Vector& vector_at(float* at) { return *(Vector*)at; }
const Vector& vector_at(const float* at) { return *(const Vector*)at; }

// 2^x of x <= 0, to 2e-7; below -126 it is 0, and of NaN it is NaN.
Vector power_of_two(Vector x) {
    const Vector large = all_of(12582912 + 127);  // 1.5 * 2^23: a sum with it is whole, and its lowest bits an exponent
    const Vector shifted = x + large, r = x - (shifted - large);
    Vector y = all_of(1.54035304e-4f);
    for (const float factor : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
        y = multiplied_and_added(y, r, all_of(factor));
    return x < -126.f ? Vector{} : y * (Vector)((Integers)shifted << 23);
}

// Eight words of each of eight registers, so that the first of all lie in the first.
void transpose(__m256 v[8]) {
    __m256 two[8], four[8];
    UNROLLED for (int i = 0; i < 8; i += 2)
        two[i] = _mm256_unpacklo_ps(v[i], v[i + 1]), two[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    UNROLLED for (int i = 0; i < 8; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0x44);
            four[i + 2 * j + 1] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0xee);
        }
    UNROLLED for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
    }
}

// How numbers are words: each one of its own, as a float.
template <class Number>
struct Singles {
    using Type = typename Number::Type;
    static constexpr int64_t COUNT = 1;
    static __m256 eight(const Type* at) { return Number::load(at); }
    static Vector add(Vector sums, Vector a, Vector b) { return multiplied_and_added(a, b, sums); }
    static Vector joined(const Vector* weights) { return *weights; }
    // The words of `h` numbers of a slot, and of its neighbors that go with it.
    static void values(const Type* const* slots, int64_t h, float* to) {
        for (int64_t i = 0; i < h; i += 8) _mm256_store_ps(to + i, Number::load(*slots + i));
    }
};

#ifdef __AVX512BF16__
struct Pairs {
    using Type = uint16_t;
    static constexpr int64_t COUNT = 2;
    static __m256 eight(const Type* at) { return _mm256_loadu_ps((const float*)at); }
    static Vector add(Vector sums, Vector a, Vector b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
    static Vector joined(const Vector* weights) { return interleaved((__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0])); }
    static void values(const Type* const* slots, int64_t h, float* to) {
        for (int64_t i = 0; i < h; i += 16) {
            const __m256i first = _mm256_loadu_si256((const __m256i*)(slots[0] + i));
            const __m256i second = _mm256_loadu_si256((const __m256i*)(slots[1] + i));
            vector_at(to + i) = interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
        }
    }

private:
    static Vector interleaved(__m512i halves) {
        using Order = uint16_t __attribute__((vector_size(64)));
        constexpr Order order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (Vector)_mm512_permutexvar_epi16((__m512i)order, halves);
    }
};
#endif

// c "TILE_ROWS MANY" = c * factors + a "TILE_ROWS words" times b "words MANY", where a's lie so far from each other;
// without factors, c is not read.
template <class Words>
void multiply(const float* a, int64_t row, int64_t word, const float* b, int64_t words, const float* factors,
              float* c) {
    Vector sums[TILE_ROWS][VECTORS];
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        UNROLLED for (int v = 0; v < VECTORS; v++)
            sums[r][v] = factors ? vector_at(c + r * MANY + v * LANES) * vector_at(factors + v * LANES) : Vector{};
    for (int64_t w = 0; w < words; w++, a += word, b += MANY) {
        Vector right[VECTORS];
        UNROLLED for (int v = 0; v < VECTORS; v++) right[v] = vector_at(b + v * LANES);
        UNROLLED for (int r = 0; r < TILE_ROWS; r++) {
            const Vector left = all_of(a[r * row]);
            UNROLLED for (int v = 0; v < VECTORS; v++) sums[r][v] = Words::add(sums[r][v], left, right[v]);
        }
    }
    UNROLLED for (int r = 0; r < TILE_ROWS; r++)
        UNROLLED for (int v = 0; v < VECTORS; v++) vector_at(c + r * MANY + v * LANES) = sums[r][v];
}

// What a thread holds, as words of 32 bits: queries "h MANY", what is summed of values "h MANY"; of a block of slots
// the keys "s h" and the values "s h", and the scores "s MANY", later weights; and of each query a few numbers.
struct Held {
    float *queries, *sums, *keys, *values, *scores, *most, *total, *factors;
    int32_t* positions;

    Held(float* at, int64_t h)
        : queries(at), sums(queries + h * MANY), keys(sums + h * MANY), values(keys + SLOTS * h),
          scores(values + SLOTS * h), most(scores + SLOTS * MANY), total(most + MANY), factors(total + MANY),
          positions((int32_t*)(factors + MANY)) {}
    static int64_t size(int64_t h) { return 2 * h * (MANY + SLOTS) + (SLOTS + 4) * MANY; }
};

// Scores to weights, relative to the largest so far, of slots from `begin`; hidden ones have none.
template <class Words>
void weights_of(const Held& held, int64_t begin, int64_t count, bool hides, float scale) {
    Vector most[VECTORS];
    UNROLLED for (int v = 0; v < VECTORS; v++) most[v] = all_of(LEAST);
    for (int64_t s = 0; s < count; s++)
        UNROLLED for (int v = 0; v < VECTORS; v++) {
            Vector& score = vector_at(held.scores + s * MANY + v * LANES);
            if (hides) {
                const Integers positions = *(const Integers*)(held.positions + v * LANES);
                score = positions < (int32_t)(begin + s) ? all_of(-INFINITY) : score;
            }
            most[v] = larger(score, most[v]);
        }
    for (int64_t v = 0; v < VECTORS; v++) {
        Vector &before = vector_at(held.most + v * LANES), &total = vector_at(held.total + v * LANES), sum{};
        const Vector now = larger(most[v] * scale, before), factor = power_of_two(before - now);
        for (int64_t s = 0; s < count; s += Words::COUNT) {
            Vector weights[Words::COUNT];
            UNROLLED for (int i = 0; i < Words::COUNT; i++) {
                const Vector score = vector_at(held.scores + (s + i) * MANY + v * LANES);
                weights[i] = power_of_two(multiplied_and_added(score, all_of(scale), -now));
                sum += weights[i];
            }
            vector_at(held.scores + s / Words::COUNT * MANY + v * LANES) = Words::joined(weights);
        }
        vector_at(held.factors + v * LANES) = factor, total = multiplied_and_added(total, factor, sum), before = now;
    }
}

// Queries "b k g t h", or their heads.
struct Queries {
    char* data;
    int64_t row, head, group, query;  // strides

    explicit Queries(const Tensor& x)
        : data((char*)x.data_ptr()), row(x.stride(0)), head(x.stride(1)), group(x.stride(2)), query(x.stride(3)) {}
};

// The heads of `MANY` queries that share keys, or of fewer, in the order "t g", from `first` on.
template <class Number, class Words>
void attend_many(const Queries& queries, const Leaf& keys, const Leaf& values, const int64_t* positions, int64_t row,
                 int64_t head, int64_t first, int64_t g, int64_t t, int64_t h, int64_t room, const Held& held,
                 const Queries& heads) {
    using Type = typename Number::Type;
    const int64_t width = h / Words::COUNT, count = std::min(MANY, g * t - first);
    const auto place = [&](const Queries& of, int64_t m) {  // in place of queries beyond the last, the last
        m = first + std::min(m, count - 1);
        return (Type*)of.data + row * of.row + head * of.head + m % g * of.group + m / g * of.query;
    };
    for (int64_t m = 0; m < MANY; m += 8) {
        const Type* at[8];
        for (int j = 0; j < 8; j++) at[j] = place(queries, m + j);
        for (int64_t i = 0; i < width; i += 8) {
            __m256 words[8];
            UNROLLED for (int j = 0; j < 8; j++) words[j] = Words::eight(at[j] + i * Words::COUNT);
            transpose(words);
            UNROLLED for (int j = 0; j < 8; j++) _mm256_store_ps(held.queries + (i + j) * MANY + m, words[j]);
        }
    }
    int64_t least = room, end = 0;
    for (int64_t m = 0; m < MANY; m++) {
        const int64_t at = std::min(positions[row * t + (first + std::min(m, count - 1)) / g], room - 1);
        held.positions[m] = std::max(at, int64_t(-1)), least = std::min(least, at), end = std::max(end, at + 1);
    }
    std::fill_n(held.most, MANY, LEAST), std::fill_n(held.total, MANY, 0.f);
    if (end == 0) std::fill_n(held.sums, h * MANY, 0.f);

    const Type* const key = (const Type*)keys.data + row * keys.row + head * keys.head;
    const Type* const value = (const Type*)values.data + row * values.row + head * values.head;
    const Floats nothing(h);
    for (int64_t s = 0; s < end; s += SLOTS) {
        const int64_t there = std::min(SLOTS, end - s), whole = (there + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        const auto slot = [&](const Type* leaf, int64_t stride, int64_t i) {
            return i < there ? leaf + (s + i) * stride : (const Type*)nothing.at;
        };
        for (int64_t i = 0; i < whole; i++)
            for (int64_t j = 0; j < width; j += 8)
                _mm256_store_ps(held.keys + i * width + j, Words::eight(slot(key, keys.slot, i) + j * Words::COUNT));
        for (int64_t i = 0; i < whole; i += Words::COUNT) {
            const Type* at[Words::COUNT];
            UNROLLED for (int j = 0; j < Words::COUNT; j++) at[j] = slot(value, values.slot, i + j);
            Words::values(at, h, held.values + i / Words::COUNT * h);
        }
        for (int64_t i = 0; i < whole; i += TILE_ROWS)
            multiply<Words>(held.keys + i * width, width, 1, held.queries, width, nullptr, held.scores + i * MANY);
        weights_of<Words>(held, s, whole, s + whole - 1 > least, 1.44269504f / std::sqrt((float)h));
        for (int64_t i = 0; i < h; i += TILE_ROWS)
            multiply<Words>(held.values + i, 1, h, held.scores, whole / Words::COUNT, s ? held.factors : nullptr,
                            held.sums + i * MANY);
    }

    for (int64_t m = 0; m < count; m += 8) {
        const __m256 share = _mm256_div_ps(_mm256_set1_ps(1), _mm256_load_ps(held.total + m));
        Type* at[8];
        for (int j = 0; j < 8; j++) at[j] = place(heads, m + j);
        for (int64_t i = 0; i < h; i += 8) {
            __m256 sums[8];
            UNROLLED for (int j = 0; j < 8; j++)
                sums[j] = _mm256_mul_ps(_mm256_load_ps(held.sums + (i + j) * MANY + m), share);
            transpose(sums);
            for (int j = 0; j < 8; j++) Number::store(at[j] + i, sums[j]);
        }
    }
}

// Of queries "b k g t h", and keys and values "b k s h": heads "b t k g h".
Tensor many_queries(Tensor queries, Tensor keys, Tensor values, Tensor positions, int64_t threads) {
    const int64_t b = queries.size(0), k = queries.size(1), g = queries.size(2), t = queries.size(3), h = queries.size(4);
    STD_TORCH_CHECK(b * k > 0 && g * t > 0 && h > 0 && h % 8 == 0 && queries.stride(4) == 1 && keys.stride(3) == 1 &&
                        values.stride(3) == 1, "many_queries: heads of whole registers");
    const auto kind = queries.scalar_type();
    STD_TORCH_CHECK(keys.scalar_type() == kind && values.scalar_type() == kind && 
                    positions.scalar_type() == ScalarType::Long, "many_queries: one dtype, positions of 64 bits");
    auto heads = torch::stable::new_empty(queries, {b, t, k, g, h});
    Queries from(queries), to(heads);
    to.head = g * h, to.group = h, to.query = k * g * h;
    const Leaf key(keys), value(values);
    const auto* const position = (const int64_t*)positions.data_ptr();
    const int64_t room = keys.size(2), tasks = (g * t + MANY - 1) / MANY;
    of_kind(kind, [&](auto number) {
        using Number = decltype(number);
        auto some = attend_many<Number, Singles<Number>>;
#ifdef __AVX512BF16__
        if constexpr (std::is_same_v<Number, BFloat16>)
            if (h % 16 == 0) some = attend_many<Number, Pairs>;
#endif
#pragma omp parallel num_threads(threads)
        {
            const Floats memory(Held::size(h));
            const Held held(memory.at, h);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < b * k * tasks; i++) {
                const int64_t row = i / tasks;
                some(from, key, value, position, row / k, row % k, i % tasks * MANY, g, t, h, room, held, to);
            }
        }
    });
    return heads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("many_queries", TORCH_BOX(&many_queries)); }
