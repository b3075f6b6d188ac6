// Attention of many queries a row on a processor with AVX2: softmax(q k) v over the slots up to each query's position.
//
// A tile has WIDTH queries, of all heads of a group, one query per lane. Each number of a key or value is broadcast to
// all lanes. So each lane keeps the largest score, the sum of weights and the accumulated values of its own query. The
// kernel adds one block of slots after another (flash attention: Dao et al. 2022).

#include "register_tile.h"

namespace {

constexpr int64_t PREFILL_BLOCK = 32;  // slots

// The memory of one thread, in lanes of 32 bits. For a tile: queries "h WIDTH" and accumulated values "h WIDTH". For a
// block of slots: keys "s h", values "s h" and scores "s WIDTH", which become weights. For each query: its largest
// score so far, its sum of weights, the factor that rescales the accumulators, and its position.
struct Workspace {
    float *queries, *acc, *keys, *values, *scores, *max, *sum, *rescale;
    int32_t* positions;

    Workspace(float* memory, int64_t h)
        : queries(memory), acc(queries + h * WIDTH), keys(acc + h * WIDTH), values(keys + PREFILL_BLOCK * h),
          scores(values + PREFILL_BLOCK * h), max(scores + PREFILL_BLOCK * WIDTH), sum(max + WIDTH),
          rescale(sum + WIDTH), positions((int32_t*)(rescale + WIDTH)) {}
    static int64_t size(int64_t h) { return 2 * h * (WIDTH + PREFILL_BLOCK) + (PREFILL_BLOCK + 4) * WIDTH; }
};

// Online softmax. The scores of `count` slots from `begin` become exp(score - largest score so far), or 0 where masked.
// It also computes the factor that rescales the accumulators. `scale` is log2 e / sqrt(h).
template <class Packing>
void softmax_block(const Workspace& ws, int64_t begin, int64_t count, bool masked, float scale) {
    Vector block_max[VECTORS];
    UNROLLED for (int v = 0; v < VECTORS; v++) block_max[v] = broadcast(LOWEST);
    for (int64_t s = 0; s < count; s++)
        UNROLLED for (int v = 0; v < VECTORS; v++) {
            Vector& score = vector_at(ws.scores + s * WIDTH + v * LANES);
            if (masked) {
                const IntVector positions = *(const IntVector*)(ws.positions + v * LANES);
                score = positions < (int32_t)(begin + s) ? broadcast(-INFINITY) : score;
            }
            block_max[v] = vector_max(score, block_max[v]);
        }
    for (int64_t v = 0; v < VECTORS; v++) {
        Vector &old_max = vector_at(ws.max + v * LANES), &sum = vector_at(ws.sum + v * LANES), block_sum{};
        const Vector new_max = vector_max(block_max[v], old_max), rescale = vector_exp2((old_max - new_max) * scale);
        for (int64_t s = 0; s < count; s += Packing::PER_LANE) {
            Vector weights[Packing::PER_LANE];
            UNROLLED for (int i = 0; i < Packing::PER_LANE; i++) {
                const Vector score = vector_at(ws.scores + (s + i) * WIDTH + v * LANES);
                weights[i] = vector_exp2((score - new_max) * scale);  // the difference is never above 0
                block_sum += weights[i];
            }
            vector_at(ws.scores + s / Packing::PER_LANE * WIDTH + v * LANES) = Packing::pack(weights);
        }
        vector_at(ws.rescale + v * LANES) = rescale, sum = fmadd(sum, rescale, block_sum), old_max = new_max;
    }
}

// Queries "b k g t h", or the results of their heads, and the strides of the first four axes.
struct Queries {
    char* data;
    int64_t row_stride, head_stride, group_stride, query_stride;

    explicit Queries(const Tensor& x)
        : data((char*)x.data_ptr()), row_stride(x.stride(0)), head_stride(x.stride(1)), group_stride(x.stride(2)),
          query_stride(x.stride(3)) {}
};

// Attention of a tile: up to WIDTH queries of one row and kv head, in the order "t g", beginning with number `first`.
template <class Number, class Packing>
void attend_tile(const Queries& queries, const CacheView& keys, const CacheView& values, const int64_t* positions,
                 int64_t row, int64_t head, int64_t first, int64_t g, int64_t t, int64_t h, int64_t capacity,
                 const Workspace& ws, const Queries& heads) {
    using Type = typename Number::Type;
    const int64_t depth = h / Packing::PER_LANE, count = std::min(WIDTH, g * t - first);
    const auto address = [&](const Queries& of, int64_t m) {  // lanes after the last query repeat it
        m = first + std::min(m, count - 1);
        return (Type*)of.data + row * of.row_stride + head * of.head_stride + m % g * of.group_stride +
               m / g * of.query_stride;
    };
    for (int64_t m = 0; m < WIDTH; m += 8) {
        const Type* at[8];
        for (int j = 0; j < 8; j++) at[j] = address(queries, m + j);
        for (int64_t i = 0; i < depth; i += 8) {
            __m256 lanes[8];
            UNROLLED for (int j = 0; j < 8; j++) lanes[j] = Packing::load_8_lanes(at[j] + i * Packing::PER_LANE);
            transpose_8x8(lanes);
            UNROLLED for (int j = 0; j < 8; j++) _mm256_store_ps(ws.queries + (i + j) * WIDTH + m, lanes[j]);
        }
    }
    int64_t min_position = capacity, end = 0;
    for (int64_t m = 0; m < WIDTH; m++) {
        const int64_t position = std::min(positions[row * t + (first + std::min(m, count - 1)) / g], capacity - 1);
        ws.positions[m] = std::max(position, int64_t(-1));
        min_position = std::min(min_position, position), end = std::max(end, position + 1);
    }
    std::fill_n(ws.max, WIDTH, LOWEST), std::fill_n(ws.sum, WIDTH, 0.f);
    if (end == 0) std::fill_n(ws.acc, h * WIDTH, 0.f);

    const Type* const key = (const Type*)keys.data + row * keys.row_stride + head * keys.head_stride;
    const Type* const value = (const Type*)values.data + row * values.row_stride + head * values.head_stride;
    const AlignedBuffer zeros(h);
    std::fill_n(zeros.data, h, 0.f);
    for (int64_t s = 0; s < end; s += PREFILL_BLOCK) {
        const int64_t valid = std::min(PREFILL_BLOCK, end - s);
        const int64_t padded = (valid + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        const auto slot = [&](const Type* first, int64_t stride, int64_t i) {
            return i < valid ? first + (s + i) * stride : (const Type*)zeros.data;
        };
        for (int64_t i = 0; i < padded; i++)
            for (int64_t j = 0; j < depth; j += 8)
                _mm256_store_ps(ws.keys + i * depth + j,
                                Packing::load_8_lanes(slot(key, keys.slot_stride, i) + j * Packing::PER_LANE));
        for (int64_t i = 0; i < padded; i += Packing::PER_LANE) {
            const Type* at[Packing::PER_LANE];
            UNROLLED for (int j = 0; j < Packing::PER_LANE; j++) at[j] = slot(value, values.slot_stride, i + j);
            Packing::interleave_rows(at, h, ws.values + i / Packing::PER_LANE * h);
        }
        for (int64_t i = 0; i < padded; i += TILE_ROWS)
            multiply_tile<Packing>(ws.keys + i * depth, depth, 1, ws.queries, depth, nullptr, ws.scores + i * WIDTH);
        softmax_block<Packing>(ws, s, padded, s + padded - 1 > min_position, 1.44269504f / std::sqrt((float)h));
        for (int64_t i = 0; i < h; i += TILE_ROWS)
            multiply_tile<Packing>(ws.values + i, 1, h, ws.scores, padded / Packing::PER_LANE, s ? ws.rescale : nullptr,
                                   ws.acc + i * WIDTH);
    }

    for (int64_t m = 0; m < count; m += 8) {
        const __m256 inverse_sum = _mm256_div_ps(_mm256_set1_ps(1), _mm256_load_ps(ws.sum + m));
        Type* at[8];
        for (int j = 0; j < 8; j++) at[j] = address(heads, m + j);
        for (int64_t i = 0; i < h; i += 8) {
            __m256 outputs[8];
            UNROLLED for (int j = 0; j < 8; j++)
                outputs[j] = _mm256_mul_ps(_mm256_load_ps(ws.acc + (i + j) * WIDTH + m), inverse_sum);
            transpose_8x8(outputs);
            for (int j = 0; j < 8; j++) Number::store(at[j] + i, outputs[j]);
        }
    }
}

// Attention of queries "b k g t h" over keys and values "b k s h": heads "b t k g h".
Tensor attend_many_queries(Tensor queries, Tensor keys, Tensor values, Tensor positions, int64_t threads) {
    const int64_t b = queries.size(0), k = queries.size(1), g = queries.size(2), t = queries.size(3);
    const int64_t h = queries.size(4), capacity = keys.size(2), tiles = (g * t + WIDTH - 1) / WIDTH;
    const auto dtype = queries.scalar_type();
    STD_TORCH_CHECK(b * k > 0 && g * t > 0 && capacity > 0 && h > 0 && h % 8 == 0 && queries.stride(4) == 1 &&
                        keys.stride(3) == 1 && values.stride(3) == 1,
                    "attend_many_queries: heads of whole registers");
    STD_TORCH_CHECK(keys.scalar_type() == dtype && values.scalar_type() == dtype &&
                        positions.scalar_type() == ScalarType::Long,
                    "attend_many_queries: one dtype, positions of 64 bits");
    const auto matches = [&](const Tensor& x) {
        return x.size(0) == b && x.size(1) == k && x.size(2) == capacity && x.size(3) == h;
    };
    STD_TORCH_CHECK(matches(keys) && matches(values) && positions.numel() == b * t && positions.is_contiguous() &&
                        threads > 0,
                    "attend_many_queries: keys, values and positions of these queries");
    auto heads = torch::stable::new_empty(queries, {b, t, k, g, h});
    Queries from(queries), to(heads);
    to.head_stride = g * h, to.group_stride = h, to.query_stride = k * g * h;
    const CacheView key(keys), value(values);
    const auto* const position = (const int64_t*)positions.data_ptr();
    dispatch(dtype, [&](auto number) {
        using Number = decltype(number);
        auto kernel = attend_tile<Number, Unpacked<Number>>;
#ifdef __AVX512BF16__
        if constexpr (std::is_same_v<Number, BFloat16>)
            if (h % 16 == 0) kernel = attend_tile<Number, PackedPairs>;
#endif
#pragma omp parallel num_threads(threads)
        {
            const AlignedBuffer memory(Workspace::size(h));
            const Workspace ws(memory.data, h);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < b * k * tiles; i++) {
                const int64_t row = i / tiles;
                kernel(from, key, value, position, row / k, row % k, i % tiles * WIDTH, g, t, h, capacity, ws, to);
            }
        }
    });
    return heads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) {
    library.impl("attend_many_queries", TORCH_BOX(&attend_many_queries));
}
