// All layers of one token a row in float32, each as `block` computes it: x + attention(norm x), then
// x + feed_forward(norm x); and the head.

#include "avx2.h"

namespace {

// The product of matrices of one kind, side by side, with rows: "r o".
void times(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    const bool integers = matrices[0].kind == ScalarType::Char || matrices[0].kind == ScalarType::Byte;
    (integers ? integers_times : floats_times)(matrices, x, y, threads);
}

// The tensors that a layer reads and writes, in the order of `Block`.
struct Layer {
    Matrices inner, output, gates, down;  // inner: of queries, keys and values
    const void *attention_norm, *ffn_norm;
    void *keys, *values;
};

// Numbers as floats.
void read(const void* from, ScalarType kind, int64_t count, float* to) {
    of_kind(kind, [&](auto number) {
        using Number = decltype(number);
        const auto* const at = (const typename Number::Type*)from;
        for (int64_t i = 0; i < count; i += 8) _mm256_storeu_ps(to + i, Number::load(at + i));
    });
}

// Floats as a tensor of other numbers like those of another.
Tensor written(const float* from, const Tensor& like, const std::vector<int64_t>& sizes) {
    auto to = torch::stable::new_empty(like, sizes);
    of_kind(to.scalar_type(), [&](auto number) {
        using Number = decltype(number);
        auto* const at = (typename Number::Type*)to.data_ptr();
        const int64_t count = to.numel();
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) Number::store(at + i, _mm256_loadu_ps(from + i));
        if (i < count) {  // a vocabulary may be of any size
            float last[8] = {};
            typename Number::Type eight[8];
            std::copy(from + i, from + count, last);
            Number::store(eight, _mm256_loadu_ps(last));
            std::copy_n(eight, count - i, at + i);
        }
    });
    return to;
}

// RMSNorm of rows "r d", with room for the weight as floats.
void norm(const float* x, const void* factors, ScalarType kind, int64_t rows, int64_t d, double eps, float* weight,
          float* y) {
    read(factors, kind, d, weight);
    for (int64_t r = 0; r < rows; r++, x += d, y += d) {
        __m256 squares = _mm256_setzero_ps();
        for (int64_t i = 0; i < d; i += 8) {
            const __m256 eight = _mm256_loadu_ps(x + i);
            squares = _mm256_fmadd_ps(eight, eight, squares);
        }
        const __m256 scale = _mm256_set1_ps(1 / std::sqrt(sum_of(squares) / d + float(eps)));
        for (int64_t i = 0; i < d; i += 8)
            _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), scale),
                                                  _mm256_loadu_ps(weight + i)));
    }
}

// Of each row's angles, "r h": the cosines twice, and the sines, the first less than none.
void angles(const int64_t* positions, const float* frequencies, int64_t rows, int64_t h, float* cos, float* sin) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < h; i += 2, cos += 2, sin += 2) {
            const float angle = float(positions[r]) * frequencies[i / 2];
            cos[0] = cos[1] = std::cos(angle), sin[1] = std::sin(angle), sin[0] = -sin[1];
        }
}

// Eight numbers, every pair rotated by its angle.
__m256 turned(const float* x, const float* cos, const float* sin) {
    const __m256 pairs = _mm256_loadu_ps(x), others = _mm256_permute_ps(pairs, 0b10110001);
    return _mm256_fmadd_ps(pairs, _mm256_loadu_ps(cos), _mm256_mul_ps(others, _mm256_loadu_ps(sin)));
}

// silu(gate) * up, of rows "r 2 f" of both.
void swiglu(const float* x, int64_t rows, int64_t f, float* y, int64_t threads) {
    const __m256 sign = _mm256_set1_ps(-0.f), one = _mm256_set1_ps(1);
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < f; i += 8) {
            const __m256 gate = _mm256_loadu_ps(x + 2 * r * f + i), up = _mm256_loadu_ps(x + (2 * r + 1) * f + i);
            const __m256 e = exp_of(_mm256_or_ps(gate, sign));  // of -|gate|, which is at most 1
            const __m256 above = _mm256_blendv_ps(one, e, gate);
            const __m256 sigmoid = _mm256_div_ps(above, _mm256_add_ps(one, e));
            _mm256_storeu_ps(y + r * f + i, _mm256_mul_ps(_mm256_mul_ps(gate, sigmoid), up));
        }
}

void add(float* x, const float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += 8)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
}

// Of tokens "... 1", the embedding "v d", the frequencies of a head's pairs, of each layer two norms "d", seven
// matrices, and a cache "... k s h", into which keys and values are written at `positions`: "... 1 d".
Tensor one_token(Tensor tokens, Tensor embedding, Tensor frequencies, std::vector<Tensor> norms,
                 std::vector<Tensor> values, std::vector<Tensor> scales, std::vector<Tensor> keys,
                 std::vector<Tensor> cached, Tensor positions, double eps, int64_t threads) {
    const int64_t d = embedding.size(1), rows = tokens.numel(), layers = keys.size();
    const int64_t h = keys[0].size(-1), room = keys[0].size(-2), k = keys[0].size(-3), f = values[4].size(0);
    const int64_t q = values[0].numel() / values[1].numel() * k * h;
    const ScalarType kind = embedding.scalar_type();
    STD_TORCH_CHECK(embedding.is_contiguous() && tokens.is_contiguous() && positions.is_contiguous() &&
                        positions.numel() == rows && frequencies.numel() == h / 2 &&
                        values.size() == size_t(7 * layers) && (!scales.empty() || values[0].scalar_type() == kind),
                    "one_token: rows of one token each");
    const auto *const token = (const int64_t*)tokens.data_ptr(), *const position = (const int64_t*)positions.data_ptr();
    for (int64_t r = 0; r < rows; r++) {
        STD_TORCH_CHECK(0 <= position[r] && position[r] < room, "the cache has no slot ", position[r]);
        STD_TORCH_CHECK(0 <= token[r] && token[r] < embedding.size(0), "the vocabulary has no token ", token[r]);
    }

    // Checks that all tensors are what the caller checked before, and finds their memory.
    const ScalarType kept = keys[0].scalar_type(), normed = norms[0].scalar_type();
    const auto matrix = [&](int64_t n, int64_t outputs, int64_t d) {
        const Tensor* const scale = scales.empty() ? nullptr : &scales[n];
        const Matrix found(values[n], scale, d);
        const bool halves = found.kind == ScalarType::Byte;
        STD_TORCH_CHECK(values[n].is_contiguous() && found.kind == values[0].scalar_type() &&
                            values[n].numel() * (halves ? 2 : 1) == outputs * d &&
                            (!scale || (scale->numel() == (halves ? 2 * outputs * d / GROUP : outputs) &&
                                        scale->is_contiguous() &&
                                        scale->scalar_type() == (halves ? ScalarType::BFloat16 : ScalarType::Float))),
                        "one_token: a weight has changed its size or dtype");
        return found;
    };
    std::vector<Layer> all;
    for (int64_t layer = 0, n = 0; layer < layers; layer++, n += 7) {
        const auto &key = keys[layer], &value = cached[layer];
        const auto &first = norms[2 * layer], &second = norms[2 * layer + 1];
        STD_TORCH_CHECK(key.is_contiguous() && value.is_contiguous() && key.numel() == rows * k * room * h &&
                            value.numel() == key.numel() && first.numel() == d && second.numel() == d &&
                            key.scalar_type() == kept && value.scalar_type() == kept &&
                            first.scalar_type() == normed && second.scalar_type() == normed &&
                            first.is_contiguous() && second.is_contiguous(),
                        "one_token: a norm or a layer of the cache has changed its size or dtype");
        all.push_back({{matrix(n, q, d), matrix(n + 1, k * h, d), matrix(n + 2, k * h, d)}, {matrix(n + 3, d, q)},
                       {matrix(n + 4, f, d), matrix(n + 5, f, d)}, {matrix(n + 6, d, f)}, first.data_ptr(),
                       second.data_ptr(), key.data_ptr(), value.data_ptr()});
    }

    const Floats now(rows * d), weight(d), seen(rows * d), projected(rows * (q + 2 * k * h)), queries(rows * q),
        heads(rows * q), gates(rows * 2 * f), inner(rows * f), cos(rows * h), sin(rows * h);
    angles(position, (const float*)frequencies.data_ptr(), rows, h, cos.at, sin.at);
    for (int64_t r = 0; r < rows; r++)
        read((const char*)embedding.data_ptr() + token[r] * d * embedding.element_size(), kind, d, now.at + r * d);
    for (const auto& layer : all) {
        norm(now.at, layer.attention_norm, normed, rows, d, eps, weight.at, seen.at);
        times(layer.inner, {seen.at, rows, d}, projected.at, threads);
        of_kind(kept, [&](auto number) {
            using Number = decltype(number);
            using Type = typename Number::Type;
            const __m256 scale = _mm256_set1_ps(1 / std::sqrt(float(h)));
            const float* from = projected.at;
            for (int64_t r = 0; r < rows; r++, from += k * h) {
                const float *const c = cos.at + r * h, *const s = sin.at + r * h;
                for (int64_t n = 0; n < q; n += h, from += h)
                    for (int64_t i = 0; i < h; i += 8)
                        _mm256_storeu_ps(queries.at + r * q + n + i,
                                         _mm256_mul_ps(turned(from + i, c + i, s + i), scale));
                for (int64_t n = 0; n < k; n++, from += h) {
                    const int64_t place = ((r * k + n) * room + position[r]) * h;
                    for (int64_t i = 0; i < h; i += 8) {
                        Number::store((Type*)layer.keys + place + i, turned(from + i, c + i, s + i));
                        Number::store((Type*)layer.values + place + i, _mm256_loadu_ps(from + k * h + i));
                    }
                }
            }
        });
        query(queries.at, kept, Leaf(layer.keys, k, room, h), Leaf(layer.values, k, room, h), position, rows, k,
              q / k / h, h, room, threads, heads.at);
        times(layer.output, {heads.at, rows, q}, seen.at, threads);
        add(now.at, seen.at, rows * d);

        norm(now.at, layer.ffn_norm, normed, rows, d, eps, weight.at, seen.at);
        times(layer.gates, {seen.at, rows, d}, gates.at, threads);
        swiglu(gates.at, rows, f, inner.at, threads);
        times(layer.down, {inner.at, rows, f}, seen.at, threads);
        add(now.at, seen.at, rows * d);
    }
    std::vector<int64_t> sizes;
    for (int64_t axis = 0; axis < tokens.dim(); axis++) sizes.push_back(tokens.size(axis));
    sizes.push_back(d);
    return written(now.at, embedding, sizes);
}

// The logits of x "... d": output (norm x).
Tensor head(Tensor x, Tensor weight, std::vector<Tensor> values, std::vector<Tensor> scales, double eps,
            int64_t threads) {
    const int64_t d = weight.numel(), rows = x.numel() / d;
    const Matrices output{Matrix(values[0], scales.empty() ? nullptr : &scales[0], d)};
    const Floats now(rows * d), factors(d), seen(rows * d), y(rows * output[0].outputs);
    read(x.data_ptr(), x.scalar_type(), rows * d, now.at);
    norm(now.at, weight.data_ptr(), weight.scalar_type(), rows, d, eps, factors.at, seen.at);
    times(output, {seen.at, rows, d}, y.at, threads);
    std::vector<int64_t> sizes;
    for (int64_t axis = 0; axis < x.dim(); axis++) sizes.push_back(x.size(axis));
    sizes.back() = output[0].outputs;
    return written(y.at, x, sizes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) {
    library.impl("one_token", TORCH_BOX(&one_token));
    library.impl("head", TORCH_BOX(&head));
}
