// Layers of one token a row, each x + attention(norm x), then x + feed_forward(norm x), as `block` is written, in
// float32; and the head.

#include "avx2.h"

namespace {

// A layer's matrices, in the order of `Block`: floats, 8 bits with a scale an output, or 4 bits with their scales.
struct Matrices {
    const std::vector<Tensor>&values, &scales;
    int64_t threads;

    // Whether they are still what they were when their caller looked.
    void check(int64_t begin, std::initializer_list<int64_t> numbers) const {
        for (const int64_t count : numbers) {
            const auto& value = values[begin++];
            const bool halves = !scales.empty() && value.scalar_type() == ScalarType::Byte;
            STD_TORCH_CHECK(value.is_contiguous() && value.numel() == (halves ? count / 2 : count) &&
                                value.scalar_type() == values[0].scalar_type(),
                            "one_token: a weight has changed its size or dtype");
        }
    }

    // Of those from `begin` to `end`, and rows: "r o".
    Tensor times(int64_t begin, int64_t end, const Rows& x) const {
        const std::vector<Tensor> some(values.begin() + begin, values.begin() + end);
        if (scales.empty()) return products(some, x, threads);
        const std::vector<Tensor> own(scales.begin() + begin, scales.begin() + end);
        const bool bytes = some[0].scalar_type() == ScalarType::Char;
        auto y = products(some, bytes ? std::vector<Tensor>() : own, x, threads);
        float* to = (float*)y.data_ptr();
        for (int64_t r = 0; bytes && r < x.rows; r++)
            for (const auto& scale : own) {
                const float* const from = (const float*)scale.data_ptr();
                const int64_t count = scale.numel();
                int64_t o = 0;
                for (; o + 8 <= count; o += 8)
                    _mm256_storeu_ps(to + o, _mm256_mul_ps(_mm256_loadu_ps(to + o), _mm256_loadu_ps(from + o)));
                for (; o < count; o++) to[o] *= from[o];
                to += count;
            }
        return y;
    }
};

// Numbers as floats.
void read(const Tensor& from, float* to) {
    of_kind(from.scalar_type(), [&](auto number) {
        using Number = decltype(number);
        const auto* const at = (const typename Number::Type*)from.data_ptr();
        const int64_t count = from.numel();
        for (int64_t i = 0; i < count; i += 8) _mm256_storeu_ps(to + i, Number::load(at + i));
    });
}

// Floats as a tensor's numbers.
void write(const float* from, const Tensor& to) {
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
}

// RMSNorm of rows "r d", with room for the weight as floats.
void norm(const float* x, const Tensor& factors, int64_t rows, int64_t d, double eps, float* weight, float* y) {
    read(factors, weight);
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

// The cosines or sines of each row's angles, "... 1 h/2", of which every other number may be another's.
struct Angles {
    const float* at;
    int64_t row, pair;

    explicit Angles(const Tensor& x)
        : at((const float*)x.data_ptr()), row(x.stride(x.dim() - 2)), pair(x.stride(x.dim() - 1)) {}
};

// Every pair of a head turned by its angle, times `scale`.
void turn(const float* x, const Angles& cos, const Angles& sin, int64_t row, int64_t h, float scale, float* y) {
    const float *c = cos.at + row * cos.row, *s = sin.at + row * sin.row;
    for (int64_t p = 0; p < h; p += 2, c += cos.pair, s += sin.pair) {
        y[p] = (x[p] * *c - x[p + 1] * *s) * scale;
        y[p + 1] = (x[p] * *s + x[p + 1] * *c) * scale;
    }
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

void add(float* x, const Tensor& y) {
    const float* const from = (const float*)y.data_ptr();
    const int64_t count = y.numel();
    for (int64_t i = 0; i < count; i += 8)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(from + i)));
}

// Of x "... 1 d", of each layer two norms "d", seven matrices, and a cache "... k s h", into which keys and values are
// written at `positions` "... 1".
Tensor one_token(Tensor x, Tensor cosines, Tensor sines, std::vector<Tensor> norms, std::vector<Tensor> values,
                 std::vector<Tensor> scales, std::vector<Tensor> keys, std::vector<Tensor> cached, Tensor positions,
                 double eps, int64_t threads) {
    const int64_t d = norms[0].numel(), rows = x.numel() / d, layers = keys.size();
    const int64_t h = keys[0].size(-1), room = keys[0].size(-2), k = keys[0].size(-3), f = values[4].size(0);
    const int64_t q = values[0].numel() / values[1].numel() * k * h;
    const int64_t* const position = (const int64_t*)positions.data_ptr();
    STD_TORCH_CHECK(x.is_contiguous() && positions.is_contiguous() && positions.numel() == rows &&
                        cosines.numel() == rows * h / 2 && values.size() == size_t(7 * layers) &&
                        (!scales.empty() || values[0].scalar_type() == x.scalar_type()),
                    "one_token: rows of one token each");
    for (int64_t r = 0; r < rows; r++)
        STD_TORCH_CHECK(0 <= position[r] && position[r] < room, "the cache has no slot ", position[r]);
    const Matrices matrices{values, scales, threads};
    const Angles cos(cosines), sin(sines);

    const auto empty = [&](int64_t width) { return torch::stable::new_empty(cosines, {rows, width}); };
    auto seen = empty(d), inner = empty(f), queries = torch::stable::new_empty(cosines, {rows, k, q / k / h, h});
    const Floats now(rows * d), weight(d), turned(h);
    read(x, now.at);
    for (int64_t layer = 0; layer < layers; layer++) {
        const auto &key = keys[layer], &value = cached[layer];
        matrices.check(7 * layer, {q * d, k * h * d, k * h * d, q * d, f * d, f * d, f * d});
        STD_TORCH_CHECK(key.is_contiguous() && value.is_contiguous() && key.numel() == rows * k * room * h &&
                            value.numel() == key.numel() && norms[2 * layer].numel() == d &&
                            norms[2 * layer + 1].numel() == d,
                        "one_token: a norm or a layer of the cache has changed its size");

        norm(now.at, norms[2 * layer], rows, d, eps, weight.at, (float*)seen.data_ptr());
        const auto all = matrices.times(7 * layer, 7 * layer + 3, Rows(seen));
        of_kind(key.scalar_type(), [&](auto number) {
            using Number = decltype(number);
            using Type = typename Number::Type;
            Type *const to_keys = (Type*)key.data_ptr(), *const to_values = (Type*)value.data_ptr();
            float* const to = (float*)queries.data_ptr();
            const float* from = (const float*)all.data_ptr();
            for (int64_t r = 0; r < rows; r++, from += k * h) {
                for (int64_t i = 0; i < q; i += h, from += h)
                    turn(from, cos, sin, r, h, 1 / std::sqrt(float(h)), to + r * q + i);
                for (int64_t n = 0; n < k; n++, from += h) {
                    const int64_t place = ((r * k + n) * room + position[r]) * h;
                    turn(from, cos, sin, r, h, 1, turned.at);
                    for (int64_t i = 0; i < h; i += 8) {
                        Number::store(to_keys + place + i, _mm256_loadu_ps(turned.at + i));
                        Number::store(to_values + place + i, _mm256_loadu_ps(from + k * h + i));
                    }
                }
            }
        });
        const auto flat = [&](const Tensor& leaf) { return torch::stable::reshape(leaf, {rows, k, room, h}); };
        const auto heads = one_query(queries, flat(key), flat(value), positions, threads);
        add(now.at, matrices.times(7 * layer + 3, 7 * layer + 4, Rows(heads, rows, q)));

        norm(now.at, norms[2 * layer + 1], rows, d, eps, weight.at, (float*)seen.data_ptr());
        const auto both = matrices.times(7 * layer + 4, 7 * layer + 6, Rows(seen));
        swiglu((const float*)both.data_ptr(), rows, f, (float*)inner.data_ptr(), threads);
        add(now.at, matrices.times(7 * layer + 6, 7 * layer + 7, Rows(inner)));
    }
    auto result = torch::stable::empty_like(x);
    write(now.at, result);
    return result;
}

// The logits of x "... d": output (norm x).
Tensor head(Tensor x, Tensor weight, std::vector<Tensor> values, std::vector<Tensor> scales, double eps,
            int64_t threads) {
    const int64_t d = weight.numel(), rows = x.numel() / d;
    auto seen = torch::stable::new_empty(x, {rows, d}, ScalarType::Float);
    const Floats now(rows * d), factors(d);
    read(x, now.at);
    norm(now.at, weight, rows, d, eps, factors.at, (float*)seen.data_ptr());
    const auto y = Matrices{values, scales, threads}.times(0, 1, Rows(seen));
    auto sizes = std::vector<int64_t>();
    for (int64_t axis = 0; axis < x.dim() - 1; axis++) sizes.push_back(x.size(axis));
    sizes.push_back(y.size(1));
    auto result = torch::stable::new_empty(x, sizes);
    write((const float*)y.data_ptr(), result);
    return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llama_fn, CPU, library) {
    library.impl("one_token", TORCH_BOX(&one_token));
    library.impl("head", TORCH_BOX(&head));
}
