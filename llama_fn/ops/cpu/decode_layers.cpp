// A decode step of one token a row, in float32: all layers in one call, and the head in another.
//
// Each layer computes what `block` does: x + attention(norm x), then x + feed_forward(norm x).

#include "avx2.h"

namespace {

// The products "r o" of matrices of one dtype and rows. The outputs of all matrices are concatenated.
void multiply(const Matrices& matrices, const Rows& x, float* y, int64_t threads) {
    const bool integers = matrices[0].dtype == ScalarType::Char || matrices[0].dtype == ScalarType::Byte;
    (integers ? multiply_integers : multiply_floats)(matrices, x, y, threads);
}

// The tensors that a layer reads and writes, in the order of `Block`.
struct Layer {
    Matrices qkv, output, gate_up, down;  // qkv: of queries, keys and values
    const void *attention_norm, *ffn_norm;
    void *keys, *values;
};

// Converts `count` numbers of a dtype to floats.
void to_floats(const void* from, ScalarType dtype, int64_t count, float* to) {
    dispatch(dtype, [&](auto number) {
        using Number = decltype(number);
        const auto* const at = (const typename Number::Type*)from;
        for (int64_t i = 0; i < count; i += 8) _mm256_storeu_ps(to + i, Number::load(at + i));
    });
}

// A tensor of these sizes, with the dtype of `like`, that holds these floats.
Tensor from_floats(const float* from, const Tensor& like, const std::vector<int64_t>& sizes) {
    auto to = torch::stable::new_empty(like, sizes);
    dispatch(to.scalar_type(), [&](auto number) {
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

// RMSNorm of rows "r d". `weight` is memory for the weights as floats.
void rms_norm(const float* x, const void* weights, ScalarType dtype, int64_t rows, int64_t d, double eps, float* weight,
              float* y) {
    to_floats(weights, dtype, d, weight);
    for (int64_t r = 0; r < rows; r++, x += d, y += d) {
        __m256 squares = _mm256_setzero_ps();
        for (int64_t i = 0; i < d; i += 8) {
            const __m256 eight = _mm256_loadu_ps(x + i);
            squares = _mm256_fmadd_ps(eight, eight, squares);
        }
        const __m256 scale = _mm256_set1_ps(1 / std::sqrt(hsum(squares) / d + float(eps)));
        for (int64_t i = 0; i < d; i += 8)
            _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), scale),
                                                  _mm256_loadu_ps(weight + i)));
    }
}

// RoPE's factors "r h" at each row's position. For a pair: its cosine twice, and its sine, first negated.
void rotations(const int64_t* positions, const float* frequencies, int64_t rows, int64_t h, float* cos, float* sin) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < h; i += 2, cos += 2, sin += 2) {
            const float angle = float(positions[r]) * frequencies[i / 2];
            cos[0] = cos[1] = std::cos(angle), sin[1] = std::sin(angle), sin[0] = -sin[1];
        }
}

// Four pairs of numbers, each rotated by its angle.
__m256 rotated(const float* x, const float* cos, const float* sin) {
    const __m256 pairs = _mm256_loadu_ps(x), others = _mm256_permute_ps(pairs, 0b10110001);
    return _mm256_fmadd_ps(pairs, _mm256_loadu_ps(cos), _mm256_mul_ps(others, _mm256_loadu_ps(sin)));
}

// silu(gate) * up, where x "r 2 f" holds each row's gate and up.
void swiglu(const float* x, int64_t rows, int64_t f, float* y, int64_t threads) {
    const __m256 sign = _mm256_set1_ps(-0.f), one = _mm256_set1_ps(1);
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < f; i += 8) {
            const __m256 gate = _mm256_loadu_ps(x + 2 * r * f + i), up = _mm256_loadu_ps(x + (2 * r + 1) * f + i);
            const __m256 e = vector_exp(_mm256_or_ps(gate, sign));  // exp(-|gate|), which cannot overflow
            const __m256 numerator = _mm256_blendv_ps(one, e, gate);
            const __m256 sigmoid = _mm256_div_ps(numerator, _mm256_add_ps(one, e));
            _mm256_storeu_ps(y + r * f + i, _mm256_mul_ps(_mm256_mul_ps(gate, sigmoid), up));
        }
}

void add_to(float* x, const float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += 8)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
}

// All layers, for tokens "... 1": the output "... 1 d" of the last layer. `embedding` is "v d", and `frequencies` are
// RoPE's. Each layer has two norms "d", seven matrices, and a cache "... k s h", into which its keys and values are
// written at `positions`.
Tensor decode_layers(Tensor tokens, Tensor embedding, Tensor frequencies, std::vector<Tensor> norms,
                     std::vector<Tensor> values, std::vector<Tensor> scales, std::vector<Tensor> keys,
                     std::vector<Tensor> cached_values, Tensor positions, double eps, int64_t threads) {
    const int64_t d = embedding.size(1), rows = tokens.numel(), layers = keys.size();
    const int64_t h = keys[0].size(-1), capacity = keys[0].size(-2), k = keys[0].size(-3), f = values[4].size(0);
    const int64_t q = values[0].numel() / values[1].numel() * k * h;
    const ScalarType dtype = embedding.scalar_type();
    STD_TORCH_CHECK(embedding.is_contiguous() && tokens.is_contiguous() && positions.is_contiguous() &&
                        positions.numel() == rows && frequencies.numel() == h / 2 &&
                        values.size() == size_t(7 * layers) && (!scales.empty() || values[0].scalar_type() == dtype),
                    "decode_layers: rows of one token each");
    const auto *const token = (const int64_t*)tokens.data_ptr(), *const position = (const int64_t*)positions.data_ptr();
    for (int64_t r = 0; r < rows; r++) {
        STD_TORCH_CHECK(0 <= position[r] && position[r] < capacity, "the cache has no slot ", position[r]);
        STD_TORCH_CHECK(0 <= token[r] && token[r] < embedding.size(0), "the vocabulary has no token ", token[r]);
    }

    // Check again what the caller checked, since a tensor may have changed since then; and find its memory.
    const ScalarType cache_dtype = keys[0].scalar_type(), norm_dtype = norms[0].scalar_type();
    const auto matrix = [&](int64_t n, int64_t outputs, int64_t d) {
        const Tensor* const scale = scales.empty() ? nullptr : &scales[n];
        const Matrix weight(values[n], scale, d);
        const bool four_bits = weight.dtype == ScalarType::Byte;
        const auto scale_dtype = four_bits ? ScalarType::BFloat16 : ScalarType::Float;
        STD_TORCH_CHECK(values[n].is_contiguous() && weight.dtype == values[0].scalar_type() &&
                            values[n].numel() * (four_bits ? 2 : 1) == outputs * d &&
                            (!scale || (scale->numel() == (four_bits ? 2 * outputs * d / GROUP : outputs) &&
                                        scale->is_contiguous() &&
                                        scale->scalar_type() == scale_dtype)),
                        "decode_layers: a weight has changed its size or dtype");
        return weight;
    };
    std::vector<Layer> model;
    for (int64_t layer = 0, n = 0; layer < layers; layer++, n += 7) {
        const auto &key = keys[layer], &value = cached_values[layer];
        const auto &first = norms[2 * layer], &second = norms[2 * layer + 1];
        STD_TORCH_CHECK(key.is_contiguous() && value.is_contiguous() && key.numel() == rows * k * capacity * h &&
                            value.numel() == key.numel() && first.numel() == d && second.numel() == d &&
                            key.scalar_type() == cache_dtype && value.scalar_type() == cache_dtype &&
                            first.scalar_type() == norm_dtype && second.scalar_type() == norm_dtype &&
                            first.is_contiguous() && second.is_contiguous(),
                        "decode_layers: a norm or a layer of the cache has changed its size or dtype");
        model.push_back({{matrix(n, q, d), matrix(n + 1, k * h, d), matrix(n + 2, k * h, d)}, {matrix(n + 3, d, q)},
                         {matrix(n + 4, f, d), matrix(n + 5, f, d)}, {matrix(n + 6, d, f)}, first.data_ptr(),
                         second.data_ptr(), key.data_ptr(), value.data_ptr()});
    }

    const AlignedBuffer hidden(rows * d), weight(d), buffer(rows * d), projected(rows * (q + 2 * k * h)),
        queries(rows * q), heads(rows * q), gate_up(rows * 2 * f), gated(rows * f), cos(rows * h), sin(rows * h);
    rotations(position, (const float*)frequencies.data_ptr(), rows, h, cos.data, sin.data);
    for (int64_t r = 0; r < rows; r++)
        to_floats((const char*)embedding.data_ptr() + token[r] * d * embedding.element_size(), dtype, d,
                  hidden.data + r * d);
    for (const auto& layer : model) {
        rms_norm(hidden.data, layer.attention_norm, norm_dtype, rows, d, eps, weight.data, buffer.data);
        multiply(layer.qkv, {buffer.data, rows, d}, projected.data, threads);
        dispatch(cache_dtype, [&](auto number) {
            using Number = decltype(number);
            using Type = typename Number::Type;
            const __m256 scale = _mm256_set1_ps(1 / std::sqrt(float(h)));
            const float* source = projected.data;
            for (int64_t r = 0; r < rows; r++, source += k * h) {
                const float *const c = cos.data + r * h, *const s = sin.data + r * h;
                for (int64_t n = 0; n < q; n += h, source += h)
                    for (int64_t i = 0; i < h; i += 8)
                        _mm256_storeu_ps(queries.data + r * q + n + i,
                                         _mm256_mul_ps(rotated(source + i, c + i, s + i), scale));
                for (int64_t n = 0; n < k; n++, source += h) {
                    const int64_t slot = ((r * k + n) * capacity + position[r]) * h;
                    for (int64_t i = 0; i < h; i += 8) {
                        Number::store((Type*)layer.keys + slot + i, rotated(source + i, c + i, s + i));
                        Number::store((Type*)layer.values + slot + i, _mm256_loadu_ps(source + k * h + i));
                    }
                }
            }
        });
        attend_rows(queries.data, cache_dtype, CacheView(layer.keys, k, capacity, h),
                    CacheView(layer.values, k, capacity, h), position, rows, k, q / k / h, h, capacity, threads,
                    heads.data);
        multiply(layer.output, {heads.data, rows, q}, buffer.data, threads);
        add_to(hidden.data, buffer.data, rows * d);

        rms_norm(hidden.data, layer.ffn_norm, norm_dtype, rows, d, eps, weight.data, buffer.data);
        multiply(layer.gate_up, {buffer.data, rows, d}, gate_up.data, threads);
        swiglu(gate_up.data, rows, f, gated.data, threads);
        multiply(layer.down, {gated.data, rows, f}, buffer.data, threads);
        add_to(hidden.data, buffer.data, rows * d);
    }
    std::vector<int64_t> sizes;
    for (int64_t axis = 0; axis < tokens.dim(); axis++) sizes.push_back(tokens.size(axis));
    sizes.push_back(d);
    return from_floats(hidden.data, embedding, sizes);
}

// The logits of x "... d": output (norm x).
Tensor decode_head(Tensor x, Tensor weight, std::vector<Tensor> values, std::vector<Tensor> scales, double eps,
                   int64_t threads) {
    const int64_t d = weight.numel(), rows = x.numel() / d;
    const Matrices output{Matrix(values[0], scales.empty() ? nullptr : &scales[0], d)};
    const AlignedBuffer hidden(rows * d), weights(d), buffer(rows * d), y(rows * output[0].outputs);
    to_floats(x.data_ptr(), x.scalar_type(), rows * d, hidden.data);
    rms_norm(hidden.data, weight.data_ptr(), weight.scalar_type(), rows, d, eps, weights.data, buffer.data);
    multiply(output, {buffer.data, rows, d}, y.data, threads);
    std::vector<int64_t> sizes;
    for (int64_t axis = 0; axis < x.dim(); axis++) sizes.push_back(x.size(axis));
    sizes.back() = output[0].outputs;
    return from_floats(y.data, x, sizes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) {
    library.impl("decode_layers", TORCH_BOX(&decode_layers));
    library.impl("decode_head", TORCH_BOX(&decode_head));
}
