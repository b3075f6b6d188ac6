// Attention of many queries a row on a processor with AVX2: softmax(q k) v over the slots up to each query's position.
//
// A register holds one number of WIDTH queries, side by side, of all heads that share a key. A number of a key or value
// is broadcast to all lanes of another register. So each lane keeps its own query's largest score, sum of weights and
// accumulated values, over one block of slots after the other (flash attention: Dao et al. 2022).

#include "register_tile.h"

namespace {

constexpr int64_t SLOTS = 32;  // of a block

// What a thread holds, as words of 32 bits: queries "h WIDTH", what is summed of values "h WIDTH"; of a block of slots
// the keys "s h" and the values "s h", and the scores "s WIDTH", later weights; and of each query a few numbers.
struct Held {
    float *queries, *sums, *keys, *values, *scores, *most, *total, *factors;
    int32_t* positions;

    Held(float* at, int64_t h)
        : queries(at), sums(queries + h * WIDTH), keys(sums + h * WIDTH), values(keys + SLOTS * h),
          scores(values + SLOTS * h), most(scores + SLOTS * WIDTH), total(most + WIDTH), factors(total + WIDTH),
          positions((int32_t*)(factors + WIDTH)) {}
    static int64_t size(int64_t h) { return 2 * h * (WIDTH + SLOTS) + (SLOTS + 4) * WIDTH; }
};

// Turns the scores of `count` slots from `begin` into weights relative to the largest score so far, 0 where masked; and
// computes the factor by which earlier accumulators are scaled down. `scale` is log2 e / sqrt(h).
template <class Words>
void weights_of(const Held& held, int64_t begin, int64_t count, bool hides, float scale) {
    Vector most[VECTORS];
    UNROLLED for (int v = 0; v < VECTORS; v++) most[v] = all_of(LEAST);
    for (int64_t s = 0; s < count; s++)
        UNROLLED for (int v = 0; v < VECTORS; v++) {
            Vector& score = vector_at(held.scores + s * WIDTH + v * LANES);
            if (hides) {
                const Integers positions = *(const Integers*)(held.positions + v * LANES);
                score = positions < (int32_t)(begin + s) ? all_of(-INFINITY) : score;
            }
            most[v] = larger(score, most[v]);
        }
    for (int64_t v = 0; v < VECTORS; v++) {
        Vector &before = vector_at(held.most + v * LANES), &total = vector_at(held.total + v * LANES), sum{};
        const Vector now = larger(most[v], before), factor = power_of_two((before - now) * scale);
        for (int64_t s = 0; s < count; s += Words::COUNT) {
            Vector weights[Words::COUNT];
            UNROLLED for (int i = 0; i < Words::COUNT; i++) {
                const Vector score = vector_at(held.scores + (s + i) * WIDTH + v * LANES);
                weights[i] = power_of_two((score - now) * scale);  // never above 0, however large the two are
                sum += weights[i];
            }
            vector_at(held.scores + s / Words::COUNT * WIDTH + v * LANES) = Words::joined(weights);
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

// The heads of `WIDTH` queries that share keys, or of as many as there are, in the order "t g", from `first` on.
template <class Number, class Words>
void attend_many(const Queries& queries, const Leaf& keys, const Leaf& values, const int64_t* positions, int64_t row,
                 int64_t head, int64_t first, int64_t g, int64_t t, int64_t h, int64_t room, const Held& held,
                 const Queries& heads) {
    using Type = typename Number::Type;
    const int64_t width = h / Words::COUNT, count = std::min(WIDTH, g * t - first);
    const auto place = [&](const Queries& of, int64_t m) {  // lanes after the last query repeat it
        m = first + std::min(m, count - 1);
        return (Type*)of.data + row * of.row + head * of.head + m % g * of.group + m / g * of.query;
    };
    for (int64_t m = 0; m < WIDTH; m += 8) {
        const Type* at[8];
        for (int j = 0; j < 8; j++) at[j] = place(queries, m + j);
        for (int64_t i = 0; i < width; i += 8) {
            __m256 words[8];
            UNROLLED for (int j = 0; j < 8; j++) words[j] = Words::eight(at[j] + i * Words::COUNT);
            transpose(words);
            UNROLLED for (int j = 0; j < 8; j++) _mm256_store_ps(held.queries + (i + j) * WIDTH + m, words[j]);
        }
    }
    int64_t least = room, end = 0;
    for (int64_t m = 0; m < WIDTH; m++) {
        const int64_t at = std::min(positions[row * t + (first + std::min(m, count - 1)) / g], room - 1);
        held.positions[m] = std::max(at, int64_t(-1)), least = std::min(least, at), end = std::max(end, at + 1);
    }
    std::fill_n(held.most, WIDTH, LEAST), std::fill_n(held.total, WIDTH, 0.f);
    if (end == 0) std::fill_n(held.sums, h * WIDTH, 0.f);

    const Type* const key = (const Type*)keys.data + row * keys.row + head * keys.head;
    const Type* const value = (const Type*)values.data + row * values.row + head * values.head;
    const Floats nothing(h);
    std::fill_n(nothing.at, h, 0.f);
    for (int64_t s = 0; s < end; s += SLOTS) {
        const int64_t there = std::min(SLOTS, end - s), whole = (there + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
        const auto slot = [&](const Type* leaf, int64_t stride, int64_t i) {
            return i < there ? leaf + (s + i) * stride : (const Type*)nothing.at;
        };
        for (int64_t i = 0; i < whole; i++)
            for (int64_t j = 0; j < width; j += 8)
                _mm256_store_ps(held.keys + i * width + j, Words::eight(slot(key, keys.slot, i) + j * Words::COUNT));
        for (int64_t i = 0; i < whole; i += Words::COUNT) {
            const Type* at[Words::COUNT];
            UNROLLED for (int j = 0; j < Words::COUNT; j++) at[j] = slot(value, values.slot, i + j);
            Words::across(at, h, held.values + i / Words::COUNT * h);
        }
        for (int64_t i = 0; i < whole; i += AT_ONCE)
            multiply<Words>(held.keys + i * width, width, 1, held.queries, width, nullptr, held.scores + i * WIDTH);
        weights_of<Words>(held, s, whole, s + whole - 1 > least, 1.44269504f / std::sqrt((float)h));
        for (int64_t i = 0; i < h; i += AT_ONCE)
            multiply<Words>(held.values + i, 1, h, held.scores, whole / Words::COUNT, s ? held.factors : nullptr,
                            held.sums + i * WIDTH);
    }

    for (int64_t m = 0; m < count; m += 8) {
        const __m256 share = _mm256_div_ps(_mm256_set1_ps(1), _mm256_load_ps(held.total + m));
        Type* at[8];
        for (int j = 0; j < 8; j++) at[j] = place(heads, m + j);
        for (int64_t i = 0; i < h; i += 8) {
            __m256 sums[8];
            UNROLLED for (int j = 0; j < 8; j++)
                sums[j] = _mm256_mul_ps(_mm256_load_ps(held.sums + (i + j) * WIDTH + m), share);
            transpose(sums);
            for (int j = 0; j < 8; j++) Number::store(at[j] + i, sums[j]);
        }
    }
}

// Attention of queries "b k g t h" over keys and values "b k s h": heads "b t k g h".
Tensor many_queries(Tensor queries, Tensor keys, Tensor values, Tensor positions, int64_t threads) {
    const int64_t b = queries.size(0), k = queries.size(1), g = queries.size(2), t = queries.size(3);
    const int64_t h = queries.size(4), room = keys.size(2), tasks = (g * t + WIDTH - 1) / WIDTH;
    const auto kind = queries.scalar_type();
    STD_TORCH_CHECK(b * k > 0 && g * t > 0 && room > 0 && h > 0 && h % 8 == 0 && queries.stride(4) == 1 &&
                        keys.stride(3) == 1 && values.stride(3) == 1, "many_queries: heads of whole registers");
    STD_TORCH_CHECK(keys.scalar_type() == kind && values.scalar_type() == kind &&
                        positions.scalar_type() == ScalarType::Long, "many_queries: one dtype, positions of 64 bits");
    const auto like = [&](const Tensor& leaf) {
        return leaf.size(0) == b && leaf.size(1) == k && leaf.size(2) == room && leaf.size(3) == h;
    };
    STD_TORCH_CHECK(like(keys) && like(values) && positions.numel() == b * t && positions.is_contiguous() &&
                        threads > 0, "many_queries: keys, values and positions of these queries");
    auto heads = torch::stable::new_empty(queries, {b, t, k, g, h});
    Queries from(queries), to(heads);
    to.head = g * h, to.group = h, to.query = k * g * h;
    const Leaf key(keys), value(values);
    const auto* const position = (const int64_t*)positions.data_ptr();
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
                some(from, key, value, position, row / k, row % k, i % tasks * WIDTH, g, t, h, room, held, to);
            }
        }
    });
    return heads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) { library.impl("many_queries", TORCH_BOX(&many_queries)); }
