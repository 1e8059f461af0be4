// Runs every kernel under the sanitizers: all memory is of exactly the size that is promised, so that a byte read or written
// past its end is found; results are compared with the definition of the product.
//
//     make native
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../src/mobiquant/kernels/cpu/types.h"

using namespace mobiquant;

extern "C" {
const char* mobiquant_instructions(int number);
int mobiquant_use(const char* name);
int mobiquant_product(const Weight* weight, const float* x, int tokens, const signed char* bits, float* y, int threads);
int mobiquant_decode(const Decoder* model, const Reading* reading, int token, int position, float* logits, double* counts,
                     int threads);
void mobiquant_descend(const Descent* work, int threads);
}

namespace {

std::mt19937 chance(1);

float normal() { return std::normal_distribution<float>()(chance); }

// Exactly `count` values, `by` bytes off any alignment.
template <class T>
struct Exact {
    std::unique_ptr<unsigned char[]> memory;
    T* data;
    explicit Exact(size_t count, size_t by = 0)
        : memory(new unsigned char[count * sizeof(T) + by]), data(reinterpret_cast<T*>(memory.get() + by)) {}
};

uint16_t half(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(((bits >> 13) - (112u << 10)) & 0x7fff);
}

float widened(uint16_t bits) { return std::ldexp(1.0f + (bits & 1023) / 1024.0f, (bits >> 10) - 15); }

struct Stored {
    std::vector<Exact<uint8_t>> planes;
    Exact<uint16_t> scale;
    Exact<uint8_t> zero;
    Exact<float> bias;
    Weight weight{};

    Stored(int rows, int columns, int group, int base)
        : scale(static_cast<size_t>(rows) * ((columns + group - 1) / group)),
          zero(static_cast<size_t>(rows) * ((columns + group - 1) / group), 1), bias(rows) {
        const int bytes = (columns + 7) / 8, groups = (columns + group - 1) / group;
        for (int p = 0; p < MAX_BITS; ++p) {
            planes.emplace_back(static_cast<size_t>(rows) * bytes, p % 3);
            for (int k = 0; k < rows * bytes; ++k) {
                // what lies past the last column is zero, as it is stored
                const int left = columns - k % bytes * 8;
                planes.back().data[k] = static_cast<uint8_t>(chance()) & (left >= 8 ? 0xff : static_cast<uint8_t>(0xff00 >> left));
            }
            weight.plane[p] = planes.back().data;
        }
        for (int k = 0; k < rows * groups; ++k) {
            scale.data[k] = half(0.01f + 0.02f * std::fabs(normal()));
            zero.data[k] = static_cast<uint8_t>(chance());
        }
        for (int k = 0; k < rows; ++k) bias.data[k] = normal();
        weight.scale = scale.data, weight.zero = zero.data, weight.bias = bias.data;
        weight.rows = rows, weight.columns = columns, weight.group = group, weight.base = base;
    }

    double value(int row, int column, int bits) const {
        const int bytes = (weight.columns + 7) / 8, groups = (weight.columns + weight.group - 1) / weight.group;
        int code = 0;
        for (int p = 0; p < bits; ++p) code = 2 * code + (planes[p].data[row * bytes + column / 8] >> (7 - column % 8) & 1);
        const int at = row * groups + column / weight.group;
        const double cell = std::ldexp(1.0, weight.base - bits), z = std::ldexp(zero.data[at], weight.base - 8) + 0.5;
        return widened(scale.data[at]) * ((code + 0.5) * cell - z);
    }
};

int failures = 0;

void expect(bool good, const std::string& what) {
    if (good) return;
    std::printf("FAILED %s\n", what.c_str());
    ++failures;
}

void products(const char* name) {
    const int shapes[][3] = {{16, 576, 64}, {9, 576, 64}, {5, 1000, 96}, {3, 40, 32}, {8, 1536, 128}, {1, 8, 32}, {2, 4100, 4128}};
    for (const auto& shape : shapes) {
        for (const int base : {1, 2, 4}) {
            const Stored w(shape[0], shape[1], shape[2], base);
            for (const int tokens : {0, 1, 2, 3, 17}) {
                Exact<float> x(static_cast<size_t>(tokens) * shape[1]), y(static_cast<size_t>(tokens) * shape[0]);
                Exact<signed char> bits(tokens);
                for (int k = 0; k < tokens * shape[1]; ++k) x.data[k] = normal();
                for (int t = 0; t < tokens; ++t) bits.data[t] = static_cast<signed char>(base + chance() % (9 - base));
                expect(mobiquant_product(&w.weight, x.data, tokens, bits.data, y.data, 1 + tokens % 3), "memory");
                double noise = 0, terms = 0;
                for (int t = 0; t < tokens; ++t) {
                    for (int r = 0; r < shape[0]; ++r) {
                        double sum = w.bias.data[r], size = 0;
                        for (int k = 0; k < shape[1]; ++k) {
                            const double term = w.value(r, k, bits.data[t]) * x.data[t * shape[1] + k];
                            sum += term, size += std::fabs(term);
                        }
                        noise += (y.data[t * shape[0] + r] - sum) * (y.data[t * shape[0] + r] - sum);
                        terms += size * size;
                    }
                }
                expect(noise <= 1e-4 * terms, std::string(name) + " product " + std::to_string(shape[1]));
            }
        }
    }
}

void decoding(const char* name) {
    const int width = 96, inner = 160, heads = 3, size = 32, keys = 1, vocabulary = 50, positions = 40, hidden = 4;
    const int rows[LINEARS] = {width, size, size, width, inner, inner, width};
    const int columns[LINEARS] = {width, width, width, width, width, width, inner};
    std::vector<Stored> held;
    held.reserve(LINEARS + 1);
    Exact<float> norm(width), table(positions * size / 2), embedding(vocabulary * width), logits(vocabulary), small(hidden * 8);
    Exact<int8_t> router(hidden * inner);
    Exact<uint16_t> step(hidden);
    for (int k = 0; k < width; ++k) norm.data[k] = 1;
    for (int k = 0; k < positions * size / 2; ++k) table.data[k] = 0.6f;
    for (int k = 0; k < vocabulary * width; ++k) embedding.data[k] = normal();
    for (int k = 0; k < hidden * 8; ++k) small.data[k] = normal();
    for (int k = 0; k < hidden * inner; ++k) router.data[k] = static_cast<int8_t>(chance());
    for (int k = 0; k < hidden; ++k) step.data[k] = half(0.01f);
    Block blocks[2] = {};
    for (int k = 0; k < LINEARS; ++k) {
        held.emplace_back(rows[k], columns[k], 32, 2);
        for (Block& block : blocks) {
            block.linear[k] = held[k].weight;
            block.router[k] = {router.data, step.data, small.data, small.data, small.data, small.data, hidden, 4, columns[k]};
            block.first_norm = block.second_norm = norm.data;
        }
    }
    held.emplace_back(vocabulary, width, 64, 4);
    const size_t cache = 2 * static_cast<size_t>(keys) * positions * size;
    Exact<float> k(cache), v(cache);
    Decoder model{};
    model.blocks = blocks, model.head = held[LINEARS].weight, model.embedding = embedding.data, model.final_norm = norm.data;
    model.cosine = model.sine = table.data, model.keys = k.data, model.values = v.data;
    model.count = 2, model.width = width, model.heads = heads, model.key_heads = keys, model.head_size = size, model.inner = inner;
    model.vocabulary = vocabulary, model.positions = positions, model.epsilon = 1e-5f, model.attention_scale = 0.2f;
    model.first_bits = 4, model.best = 10;
    for (const int routed : {0, 1}) {
        const Reading reading{{2, 3, 4, 6, 8}, routed ? 5 : 3, routed, 0.0f};
        double counts[5] = {}, before = 0;
        for (int position = 0; position < positions; ++position) {
            expect(mobiquant_decode(&model, &reading, position % vocabulary, position, logits.data, counts, 1 + position % 3), "memory");
            bool finite = true;
            for (int n = 0; n < vocabulary; ++n) finite &= std::isfinite(logits.data[n]);
            expect(finite, std::string(name) + " logits");
        }
        for (const double count : counts) before += count;
        double weights = 0;
        for (int n = 0; n < LINEARS; ++n) weights += 2.0 * positions * rows[n] * columns[n];
        expect(before == weights, std::string(name) + " counts");
    }
}

// Nearest code of a column by the definition, in double: all cells of `search_bits`, then the cell of each finer depth's mean.
int nearest(const Descent& d, const double* target, int column) {
    const auto size = [&](int depth) { return std::ldexp(1.0, d.base - d.widths[depth]); };
    int coarse = 1, code = 0;
    while (d.widths[coarse - 1] != d.search_bits) ++coarse;
    const float* const tail = d.tails + column * (d.depths - coarse) * d.depths;
    const auto mean = [&](int depth) {
        double sum = 0;
        for (int e = coarse; e < d.depths; ++e) sum += tail[(depth - coarse) * d.depths + e] * target[e];
        return sum;
    };
    double best = INFINITY;
    for (int c = 0; c < 1 << d.search_bits; ++c) {
        double cost = 0;
        for (int e = 0; e < coarse; ++e) {
            const double gap = ((c >> (d.search_bits - d.widths[e])) + 0.5) * size(e) - target[e];
            cost += d.weights[column * d.depths + e] * gap * gap;
        }
        if (coarse < d.depths) {
            const double low = c * size(coarse - 1) + size(coarse) / 2, high = (c + 1) * size(coarse - 1) - size(coarse) / 2;
            const double gap = std::fmax(0, std::fmax(low - mean(coarse), mean(coarse) - high));
            for (int e = coarse; e < d.depths; ++e) cost += d.weights[column * d.depths + e] * gap * gap;
        }
        if (cost < best) best = cost, code = c;
    }
    for (int e = coarse; e < d.depths; ++e) {
        const int low = code << (d.widths[e] - d.widths[e - 1]), high = low + (1 << (d.widths[e] - d.widths[e - 1])) - 1;
        code = static_cast<int>(std::fmin(std::fmax(std::floor(mean(e) / size(e)), low), high));
    }
    return code;
}

void descents(const char* name) {
    const std::vector<std::vector<int>> lists = {{2, 3, 4, 6, 8}, {2, 4}, {4, 8}, {7, 8}, {8}, {1, 2, 3, 4, 5, 6, 7, 8}};
    for (const auto& widths : lists) {
        for (const int rows : {1, 16, 37}) {
            const int columns = 70, depths = static_cast<int>(widths.size()), total = widths.back();
            int coarse = 1;
            while (coarse < depths && widths[coarse] <= 4) ++coarse;
            const auto all = [&](size_t count, float most, float least) {
                Exact<float> made(count);
                for (size_t k = 0; k < count; ++k) made.data[k] = std::fmin(std::fmax(normal(), least), most);
                return made;
            };
            const size_t part = static_cast<size_t>(columns) * rows;
            const auto gradient = all(static_cast<size_t>(depths) * DESCENT_COLUMNS * rows, 9, -9), hessian = all(depths * columns * columns, 0.1f, -0.1f);
            const auto scale = all(part, 2, 0.1f), diagonal = all(columns * depths, 3, 1), weights = all(columns * depths, 3, 0.1f);
            const auto tails = all(static_cast<size_t>(columns) * (depths - coarse) * depths, 0.5f, 0.1f);
            for (const int start : {0, 64}) {
                Exact<uint8_t> chosen(part);
                const int count = start ? columns - start : 64;
                Exact<float> moved(static_cast<size_t>(depths) * count * rows);
                for (size_t k = 0; k < part; ++k) chosen.data[k] = static_cast<uint8_t>(chance() & ((1 << total) - 1));
                const std::vector<uint8_t> before(chosen.data, chosen.data + part);
                Descent d{gradient.data, hessian.data, scale.data, diagonal.data, weights.data, tails.data, chosen.data, moved.data};
                d.depths = depths, d.columns = columns, d.rows = rows, d.base = widths[0];
                d.search_bits = widths[coarse - 1], d.start = start, d.stop = start + count;
                std::copy(widths.begin(), widths.end(), d.widths);
                mobiquant_descend(&d, 1 + rows % 3);
                int others = 0, wrong = 0;
                for (int column = 0; column < columns; ++column) {
                    for (int row = 0; row < rows; ++row) {
                        const size_t at = static_cast<size_t>(column) * rows + row;
                        if (column < d.start || column >= d.stop) {
                            others += chosen.data[at] != before[at];
                            continue;
                        }
                        double target[MAX_BITS];
                        for (int e = 0; e < depths; ++e) {
                            const auto level = [&](int code) {
                                return ((code >> (total - widths[e])) + 0.5) * std::ldexp(1.0, widths[0] - widths[e]);
                            };
                            const auto place = [&](int k) { return (static_cast<size_t>(e) * count + k - start) * rows + row; };
                            double slope = gradient.data[place(column)];
                            for (int k = d.start; k < column; ++k) {
                                slope += static_cast<double>(hessian.data[(static_cast<size_t>(e) * columns + column) * columns + k]) *
                                         moved.data[place(k)];
                            }
                            target[e] = level(before[at]) - slope / (diagonal.data[column * depths + e] * scale.data[at]);
                            const double by = (level(chosen.data[at]) - level(before[at])) * scale.data[at];
                            const float said = moved.data[place(column)];
                            others += std::fabs(said - by) > 1e-4 * (1 + std::fabs(by));
                        }
                        wrong += chosen.data[at] != nearest(d, target, column);
                    }
                }
                expect(!others, std::string(name) + " descent moved");
                // ties in fp32
                expect(wrong <= 1 + 0.002 * rows * (d.stop - d.start), std::string(name) + " descent " + std::to_string(wrong));
            }
        }
    }
}

}  // namespace

int main() {
    int sets = 0;
    for (; const char* name = mobiquant_instructions(sets); ++sets) {
        expect(mobiquant_use(name), name);
        products(name);
        decoding(name);
        descents(name);
        std::printf("%s checked\n", name);
    }
    expect(!mobiquant_use("none"), "an unknown instruction set");
    std::printf("%d passed, %d failed\n", sets - (failures > 0), failures);
    return failures > 0;
}
