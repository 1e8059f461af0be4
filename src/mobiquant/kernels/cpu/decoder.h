// One token through a whole decoder: RMS norm, attention with rotary positions, gated feed-forward, head.
//
// A layer is five jobs of the pool (query, key and value; heads; output; gate and up; down); what lies between them is small
// and done by the caller. Sums are in fp32 and in an order that does not depend on the number of threads.
#pragma once

#include "product.h"

namespace {

// e^x to about 2e-7 of its value, without a branch, so that loops over it are vectorised.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float moved = x * 1.44269504f + 12582912.0f, whole = moved - 12582912.0f;
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &moved, 4);
    const int32_t power = (bits - 0x4b400000 + 127) << 23;
    float two;
    std::memcpy(&two, &power, 4);
    return p * two;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

inline float dot(const float* a, const float* b, int count) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int k = 0; k < count; ++k) total += a[k] * b[k];
    return total;
}

inline void rms_norm(const float* x, const float* weight, int count, float epsilon, float* y) {
    const float inverse = 1.0f / std::sqrt(dot(x, x, count) / static_cast<float>(count) + epsilon);
#pragma omp simd
    for (int k = 0; k < count; ++k) y[k] = x[k] * inverse * weight[k];
}

// Slices that a token reads (`router.py`), at least 1.
template <class V>
int depth_of(const Router& r, const Reading& reading, const float* x) {
    if (!reading.routed || r.hidden == 0) return reading.cap;
    const float rms = std::sqrt(dot(x, x, r.columns) / static_cast<float>(r.columns));
    const float held = rms < 1e-6f ? 1e-6f : rms, inverse = 1.0f / held, log_rms = std::log(held);
    float out[MAX_BITS];
    for (int e = 0; e < r.outputs; ++e) out[e] = r.out_bias[e];
    for (int h = 0; h < r.hidden; ++h) {
        const int8_t* const row = r.weight + static_cast<size_t>(h) * r.columns;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int k = 0; k < r.columns; ++k) total += static_cast<float>(row[k]) * x[k];
        const float value = silu(total * inverse * V::half(r.scale[h]) + log_rms * r.rms[h] + r.bias[h]);
        for (int e = 0; e < r.outputs; ++e) out[e] += r.out[e * r.hidden + h] * value;
    }
    // a deeper slice never scores above a shallower one
    float score = out[0];
    int depth = 1;
    for (int e = 0; e < r.outputs; ++e) {
        if (e) score -= out[e] > 20.0f ? out[e] : std::log1p(std::exp(out[e]));
        depth += score > reading.tau;
    }
    return depth < reading.cap ? depth : reading.cap;
}

// products of queries and keys that are done sooner by one thread than shared out
constexpr int64_t ALONE = 30000;

template <class V>
class Step {
   public:
    Step(const Decoder& model, const Reading& reading, int position, double* counts)
        : m(model), how(reading), here(position), counted(counts) {}

    // Returns whether there was memory.
    bool run(int token, float* logits) {
        static thread_local Scratch buffers;
        const int queries = m.heads * m.head_size, keys = m.key_heads * m.head_size;
        const size_t floats = 3 * static_cast<size_t>(m.width) + 2 * queries + 2 * keys + 2 * static_cast<size_t>(m.inner) +
                              static_cast<size_t>(m.heads) * (here + 16) + 256;
        float* next = static_cast<float*>(buffers.get(sizeof(float) * floats));
        if (next == nullptr) return false;
        const auto take = [&](int count) { float* const at = next; next += (count + 15) / 16 * 16; return at; };
        state = take(m.width), x = take(m.width), added = take(m.width), query = take(queries), mixed = take(queries);
        key = take(keys), value = take(keys), gate = take(m.inner), up = take(m.inner), chances = next;
        embed(token);
        for (int number = 0; number < m.count; ++number) layer(m.blocks[number], number);
        rms_norm(state, m.final_norm, m.width, m.epsilon, x);
        Part head[1] = {{&m.head, logits, m.first_bits, 0}};
        together(head, 1, x);
        if (m.first_bits < MAX_BITS) again(logits);
        return !failed;
    }

   private:
    const Decoder& m;
    const Reading& how;
    const int here;
    double* const counted;
    int decided[LINEARS], coming = 1;
    bool failed = false;
    float *state = nullptr, *x = nullptr, *added = nullptr, *query = nullptr, *mixed = nullptr;
    float *key = nullptr, *value = nullptr, *gate = nullptr, *up = nullptr, *chances = nullptr;

    void embed(int token) {
        const size_t at = static_cast<size_t>(token) * m.width;
        for (int k = 0; k < m.width; ++k) {
            if (m.embedding_type == 0) {
                state[k] = static_cast<const float*>(m.embedding)[at + k];
            } else if (m.embedding_type == 1) {
                const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(m.embedding)[at + k]) << 16;
                std::memcpy(state + k, &bits, 4);
            } else {
                state[k] = V::half(static_cast<const uint16_t*>(m.embedding)[at + k]);
            }
        }
    }

    template <class F>
    void together(Part* parts, int count, const float* input, const F& after) {
        failed |= !::together<V>(parts, count, input, after);
    }
    void together(Part* parts, int count, const float* input) {
        together(parts, count, input, [](int, int, int) {});
    }

    // Read the rows of the head with the highest logits at full depth: `best` of them, or up to four times as many.
    void again(float* logits) {
        static thread_local Scratch lists;
        const int count = m.vocabulary;
        int* const rows = static_cast<int*>(lists.get(sizeof(int) * count));
        const Shape<V>* const shape = Shape<V>::of(m.head);
        void* const memory = shape == nullptr ? nullptr : token_memory<V>(shape->blocks);
        if (rows == nullptr || memory == nullptr) {
            failed = true;
            return;
        }
        float low = logits[0], high = logits[0];
#pragma omp simd reduction(min : low) reduction(max : high)
        for (int k = 0; k < count; ++k) {
            low = logits[k] < low ? logits[k] : low;
            high = logits[k] > high ? logits[k] : high;
        }
        low -= 1.0f;
        // halve the range until what lies above `low` is neither too little nor too much
        for (int turn = 0; turn < 24; ++turn) {
            const float middle = 0.5f * (low + high);
            int above = 0;
#pragma omp simd reduction(+ : above)
            for (int k = 0; k < count; ++k) above += logits[k] > middle;
            (above < m.best ? high : low) = middle;
            if (above >= m.best && above <= 4 * m.best) break;
        }
        int chosen = 0;
        for (int k = 0; k < count; ++k) {
            if (logits[k] > low) rows[chosen++] = k;
        }
        Activations<V> quant(memory, 1, shape->blocks);
        quant.set(0, x, m.width, m.width);
        constexpr int STEP = 64;
        parallel((chosen + STEP - 1) / STEP, [&](int chunk) {
            for (int k = chunk * STEP; k < chosen && k < (chunk + 1) * STEP; ++k) {
                one_token<V>(MAX_BITS, m.head, *shape, 1, rows[k], rows[k] + 1, quant, logits);
            }
        });
    }

    // Decide for linears from `first` on, as their routers say of an input; a linear without one takes the depth of the one before.
    void decide(const Block& b, int first, int count, const float* input) {
        int depth = how.cap;
        for (int k = first; k < first + count; ++k) {
            if (b.router[k].weight != nullptr || k == first) depth = depth_of<V>(b.router[k], how, input);
            decided[k] = depth;
        }
    }

    // What linears from `first` on read, which have this input.
    void depths(const Block& b, int first, int count, const float* input, Part* parts) {
        if (!b.ahead) {
            decide(b, first, count, input);
        } else if (first == QUERY) {
            if (b.router[QUERY].weight != nullptr) decide(b, QUERY, OUTPUT, input);
            else for (int k = QUERY; k < OUTPUT; ++k) decided[k] = coming;
            decide(b, OUTPUT, LINEARS - OUTPUT, input);
            if (b.next.weight != nullptr) coming = depth_of<V>(b.next, how, input);
        }
        for (int k = 0; k < count; ++k) {
            const Weight& w = b.linear[first + k];
            parts[k].bits = how.widths[decided[first + k] - 1];
            counted[decided[first + k] - 1] += static_cast<double>(w.rows) * w.columns;
        }
    }

    void turn(float* head) const {
        const int half = m.head_size / 2;
        const float *const c = m.cosine + static_cast<size_t>(here) * half, *const s = m.sine + static_cast<size_t>(here) * half;
        for (int k = 0; k < half; ++k) {
            const float low = head[k], high = head[k + half];
            head[k] = low * c[k] - high * s[k];
            head[k + half] = high * c[k] + low * s[k];
        }
    }

    void attend(const float* keys, const float* values, int head) {
        const int size = m.head_size, count = here + 1;
        const size_t own = static_cast<size_t>(head / (m.heads / m.key_heads)) * m.positions * size;
        float *const p = chances + static_cast<size_t>(head) * (here + 16), *const out = mixed + head * size;
        const float* const q = query + head * size;
        float most = -INFINITY, total = 0;
        for (int t = 0; t < count; ++t) {
            p[t] = dot(q, keys + own + static_cast<size_t>(t) * size, size) * m.attention_scale;
            most = p[t] > most ? p[t] : most;
        }
#pragma omp simd reduction(+ : total)
        for (int t = 0; t < count; ++t) {
            p[t] = exponential(p[t] - most);
            total += p[t];
        }
        for (int k = 0; k < size; ++k) out[k] = 0;
        for (int t = 0; t < count; ++t) {
            const float* const v = values + own + static_cast<size_t>(t) * size;
            const float weight = p[t] / total;
#pragma omp simd
            for (int k = 0; k < size; ++k) out[k] += weight * v[k];
        }
    }

    void add(const float* more) {
#pragma omp simd
        for (int k = 0; k < m.width; ++k) state[k] += more[k];
    }

    void layer(const Block& b, int number) {
        const int size = m.head_size;
        const size_t cache = static_cast<size_t>(number) * m.key_heads * m.positions * size;
        float *const keys = m.keys + cache, *const values = m.values + cache;
        rms_norm(state, b.first_norm, m.width, m.epsilon, x);
        Part inputs[3] = {{&b.linear[QUERY], query, 0, 0}, {&b.linear[KEY], key, 0, 0}, {&b.linear[VALUE], value, 0, 0}};
        depths(b, QUERY, 3, x, inputs);
        together(inputs, 3, x);
        for (int head = 0; head < m.heads; ++head) {
            if (b.query_norm != nullptr) rms_norm(query + head * size, b.query_norm, size, m.epsilon, query + head * size);
            turn(query + head * size);
        }
        for (int head = 0; head < m.key_heads; ++head) {
            if (b.key_norm != nullptr) rms_norm(key + head * size, b.key_norm, size, m.epsilon, key + head * size);
            turn(key + head * size);
            const size_t at = (static_cast<size_t>(head) * m.positions + here) * size;
            std::memcpy(keys + at, key + head * size, sizeof(float) * size);
            std::memcpy(values + at, value + head * size, sizeof(float) * size);
        }
        if (static_cast<int64_t>(m.heads) * (here + 1) * size > ALONE) {
            parallel(m.heads, [&](int head) { attend(keys, values, head); });
        } else {
            for (int head = 0; head < m.heads; ++head) attend(keys, values, head);
        }
        Part output[1] = {{&b.linear[OUTPUT], added, 0, 0}};
        depths(b, OUTPUT, 1, mixed, output);
        together(output, 1, mixed);
        add(added);
        rms_norm(state, b.second_norm, m.width, m.epsilon, x);
        Part middle[2] = {{&b.linear[GATE], gate, 0, 0}, {&b.linear[UP], up, 0, 0}};
        depths(b, GATE, 2, x, middle);
        together(middle, 2, x, [&](int p, int from, int to) {
            if (p) return;
#pragma omp simd
            for (int k = from; k < to; ++k) gate[k] = silu(gate[k]);
        });
#pragma omp simd
        for (int k = 0; k < m.inner; ++k) gate[k] *= up[k];
        Part down[1] = {{&b.linear[DOWN], added, 0, 0}};
        depths(b, DOWN, 1, gate, down);
        together(down, 1, gate);
        add(added);
    }
};

template <class V>
int decode(const Decoder& model, const Reading& reading, int token, int position, float* logits, double* counts) {
    return Step<V>(model, reading, position, counts).run(token, logits);
}

}  // namespace
