// The kernels without Python: for sanitizers, for emulators and for machines that are only cross-compiled for.
//
// Every instruction set that the machine runs is held against sums in double, a token alone against the same token in a
// batch, and one thread against several, to the bit. Prints what failed and returns 1.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using ossia::Format;
using ossia::Kernels;
using ossia::Matrix;
using ossia::Workspace;

int failures = 0;

void check(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

std::mt19937 generator(1);

std::vector<float> normal(int64_t count, float gain = 1.0f) {
  std::normal_distribution<float> draw(0.0f, gain);
  std::vector<float> numbers(count);
  for (float& number : numbers) number = draw(generator);
  return numbers;
}

// Root mean square of the difference, by that of what is expected.
double distance(const std::vector<float>& met, const std::vector<double>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < met.size(); ++i) {
    error += (met[i] - expected[i]) * (met[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(error / size);
}

// Rows [first, first + count) of a batch must come out alone as they came out together.
bool same_rows(const std::vector<float>& whole, const std::vector<float>& part, int64_t first, int64_t width) {
  return std::memcmp(whole.data() + first * width, part.data(), part.size() * sizeof(float)) == 0;
}

void test_pool() {
  for (const int threads : {1, 2, 5}) {
    ossia::ThreadPool pool(threads);
    for (int round = 0; round < 2000; ++round) {
      std::vector<int> times(round % 37);
      pool.for_each(times.size(), true, [&](int64_t item, int) { ++times[item]; });
      for (const int time : times) check(time == 1, "pool: every piece is done once");
      // Now and then long enough for the workers to fall asleep.
      if (round % 500 == 499) std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
  }
}

// A low-rank change of a stack of matrices, in the order of the kernels.
struct Adapter {
  int64_t stack, rank, rows, cols;
  std::vector<float> a, b;

  Adapter(int64_t stack, int64_t rank, int64_t rows, int64_t cols)
      : stack(stack), rank(rank), rows(rows), cols(cols), a(normal(stack * rank * cols, 0.1f)), b(stack * pieces() * rank * 32) {
    for (int64_t s = 0; s < stack; ++s)
      for (int64_t o = 0; o < rows; ++o)
        for (int64_t r = 0; r < rank; ++r) b[at(s, o, r)] = normal(1)[0];
  }
  int64_t pieces() const { return (rows + 31) / 32; }
  int64_t at(int64_t s, int64_t o, int64_t r) const { return ((s * pieces() + o / 32) * rank + r) * 32 + o % 32; }
  ossia::Lora lora() const {
    Matrix m;
    m.format = Format::kF32, m.rows = rank, m.cols = cols, m.row_stride = cols * 4, m.stack_stride = rank * cols * 4;
    m.data = reinterpret_cast<const uint8_t*>(a.data());
    return {m, rows, reinterpret_cast<const uint8_t*>(b.data()), pieces() * rank * 32 * 4, 0.5f};
  }
  template <class Number>
  double change(int64_t s, int64_t o, const Number* x) const {
    double sum = 0;
    for (int64_t r = 0; r < rank; ++r) {
      double h = 0;
      for (int64_t i = 0; i < cols; ++i) h += static_cast<double>(a[(s * rank + r) * cols + i]) * x[i];
      sum += 0.5 * h * b[at(s, o, r)];
    }
    return sum;
  }
};

void test_linear(const Kernels& kernels, Format format, int64_t rows, int64_t cols) {
  const std::string name = std::string(kernels.name) + " linear " + std::to_string(static_cast<int>(format));
  const int64_t tokens = 70;
  const std::vector<float> x = normal(tokens * cols), w = normal(rows * cols), bias = normal(rows);
  std::vector<double> expected(tokens * rows);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = 0; o < rows; ++o) {
      double sum = bias[o];
      for (int64_t i = 0; i < cols; ++i) sum += static_cast<double>(x[t * cols + i]) * w[o * cols + i];
      expected[t * rows + o] = sum;
    }
  const Adapter small(1, 3, rows, cols), large(1, 9, rows, cols);
  std::vector<int32_t> of_token(tokens);
  for (int64_t t = 0; t < tokens; ++t) of_token[t] = static_cast<int32_t>(t / 3 % 4) - 1;
  std::vector<float> first, first_changed;
  for (const int threads : {1, 3}) {
    Workspace work(threads);
    Matrix matrix;
    matrix.format = Format::kF32, matrix.rows = rows, matrix.cols = cols;
    matrix.data = reinterpret_cast<const uint8_t*>(w.data()), matrix.row_stride = cols * 4;
    const int64_t padded = (rows + kernels.tile_rows - 1) / kernels.tile_rows * kernels.tile_rows;
    std::vector<int8_t> q(padded * cols);
    std::vector<uint16_t> scales(padded * cols / 32 + 1);
    if (format == Format::kQ8) {
      kernels.pack_q8(work, matrix, 0, q.data(), scales.data());
      matrix.format = Format::kQ8;
      matrix.data = reinterpret_cast<const uint8_t*>(q.data());
      matrix.scales = reinterpret_cast<const uint8_t*>(scales.data());
    }
    std::vector<float> out(tokens * rows);
    kernels.linear(work, x.data(), matrix, bias.data(), {}, tokens, out.data());
    check(distance(out, expected) < (format == Format::kQ8 ? 0.012 : 1e-6), name + ": the sums");
    if (first.empty()) first = out;
    check(out == first, name + ": threads");
    for (const int64_t count : {1, 2, 3, 4, 7}) {
      std::vector<float> part(count * rows);
      kernels.linear(work, x.data() + 60 * cols, matrix, bias.data(), {}, count, part.data());
      check(same_rows(out, part, 60, rows), name + ": alone as in a batch");
    }
    // Two adapters, by turns of three tokens, and none.
    std::vector<ossia::Lora> loras;
    for (const Adapter* one : {&small, &large}) loras.push_back(one->lora());
    const ossia::Lora* each[] = {&loras[0], nullptr, &loras[1]};
    std::vector<float> changed(tokens * rows);
    kernels.linear(work, x.data(), matrix, bias.data(), {each, 3, of_token.data()}, tokens, changed.data());
    std::vector<double> expected_change(tokens * rows);
    for (int64_t t = 0; t < tokens; ++t) {
      const Adapter* own = of_token[t] == 0 ? &small : of_token[t] == 2 ? &large : nullptr;
      for (int64_t o = 0; o < rows; ++o) {
        expected_change[t * rows + o] = own ? own->change(0, o, x.data() + t * cols) : 0.0;
        changed[t * rows + o] -= out[t * rows + o];
      }
    }
    check(distance(changed, expected_change) < 1e-6, name + ": adapters");
    kernels.linear(work, x.data(), matrix, bias.data(), {each, 3, of_token.data()}, tokens, changed.data());
    if (first_changed.empty()) first_changed = changed;
    check(changed == first_changed, name + ": adapters and threads");
    for (const int64_t count : {1, 5}) {
      std::vector<float> part(count * rows);
      kernels.linear(work, x.data() + 55 * cols, matrix, bias.data(), {each, 3, of_token.data() + 55}, count, part.data());
      check(same_rows(changed, part, 55, rows), name + ": adapters alone as in a batch");
    }
  }
}

void test_moe(const Kernels& kernels, Format order) {
  const std::string name = std::string(kernels.name) + " moe " + std::to_string(static_cast<int>(order));
  const int64_t experts = 3, active = 2, dim = 64, hidden = 288, tokens = 150;
  const int values[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  // As in a GGUF file: 17 bytes a block, the scale first.
  const auto stack = [&](int64_t rows, int64_t cols) {
    std::vector<uint8_t> file(experts * rows * (cols / 32) * 17);
    for (size_t i = 0; i < file.size(); ++i)
      file[i] = static_cast<uint8_t>(i % 17 == 0 ? 118 + generator() % 6 : generator() % 256);
    return file;
  };
  const auto matrix = [&](const std::vector<uint8_t>& file, int64_t rows, int64_t cols) {
    Matrix m;
    m.format = order, m.rows = rows, m.cols = cols, m.data = file.data() + 1, m.scales = file.data();
    m.block_stride = m.scale_block_stride = 17;
    m.row_stride = m.scale_row_stride = cols / 32 * 17;
    m.stack_stride = m.scale_stack_stride = rows * m.row_stride;
    return m;
  };
  const auto number = [&](const Matrix& m, int64_t row, int64_t i) {
    const int64_t b = i / 32, at = i % 32;
    const uint8_t* bytes = m.data + row * m.row_stride + b * m.block_stride;
    const int code = order == Format::kMxfp4Pairs ? bytes[at / 2] >> (at % 2 * 4) & 15 : bytes[at % 16] >> (at / 16 * 4) & 15;
    const int scale = m.scales[row * m.scale_row_stride + b * m.scale_block_stride];
    return std::ldexp((code & 8 ? -0.5 : 0.5) * values[code & 7], scale - 127);
  };
  const std::vector<uint8_t> gate = stack(hidden, dim), up = stack(hidden, dim), down = stack(dim, hidden);
  const std::vector<float> gate_bias = normal(experts * hidden), up_bias = normal(experts * hidden);
  const std::vector<float> down_bias = normal(experts * dim), x = normal(tokens * dim, 20.0f), weights = normal(tokens * active);
  std::vector<int32_t> ids(tokens * active);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t a = 0; a < active; ++a) ids[t * active + a] = static_cast<int32_t>((t % 7 == 0 ? a : a + 1) % experts);
  const ossia::Experts e{matrix(gate, hidden, dim), matrix(up, hidden, dim), matrix(down, dim, hidden),
                         gate_bias.data(), up_bias.data(), down_bias.data(), experts};

  std::vector<float> floats(hidden * dim);
  std::vector<uint16_t> halves(hidden * dim);
  Workspace both(2);
  kernels.dequantize(both, e.up.at(1), floats.data(), nullptr);
  kernels.dequantize(both, e.up.at(1), nullptr, halves.data());
  bool exact = true;
  for (int64_t f = 0; f < hidden; ++f)
    for (int64_t i = 0; i < dim; ++i) {
      const float wanted = static_cast<float>(number(e.up.at(1), f, i));
      uint32_t bits;
      std::memcpy(&bits, &wanted, 4);
      exact &= std::memcmp(&floats[f * dim + i], &wanted, 4) == 0 && halves[f * dim + i] == bits >> 16;
    }
  check(exact, std::string(kernels.name) + " dequantize");
  // The first half of the tokens go through an adapter, for all three matrices or for down alone.
  const Adapter gate_change(experts, 4, hidden, dim), up_change(experts, 2, hidden, dim), down_change(experts, 3, dim, hidden);
  const ossia::ExpertLora all{gate_change.lora(), up_change.lora(), down_change.lora()}, only_down{{}, {}, down_change.lora()};
  const ossia::ExpertLora* each[] = {&all, &only_down};
  std::vector<int32_t> of_token(tokens), none(tokens, -1);
  for (int64_t t = 0; t < tokens; ++t) of_token[t] = t < tokens / 2 ? static_cast<int32_t>(t / 5 % 2) : -1;

  std::vector<double> expected(tokens * dim);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t a = 0; a < active; ++a) {
      const int32_t id = ids[t * active + a];
      std::vector<double> h(hidden);
      for (int64_t f = 0; f < hidden; ++f) {
        double g = gate_bias[id * hidden + f], u = up_bias[id * hidden + f];
        for (int64_t i = 0; i < dim; ++i) {
          g += number(e.gate.at(id), f, i) * x[t * dim + i];
          u += number(e.up.at(id), f, i) * x[t * dim + i];
        }
        if (of_token[t] == 0) {
          g += gate_change.change(id, f, x.data() + t * dim);
          u += up_change.change(id, f, x.data() + t * dim);
        }
        g = std::fmin(g, 7.0), u = std::fmax(-7.0, std::fmin(u, 7.0));
        h[f] = g / (1 + std::exp(-1.702 * g)) * (u + 1);
      }
      for (int64_t d = 0; d < dim; ++d) {
        double y = down_bias[id * dim + d];
        for (int64_t f = 0; f < hidden; ++f) y += number(e.down.at(id), d, f) * h[f];
        if (of_token[t] >= 0) y += down_change.change(id, d, h.data());
        expected[t * dim + d] += weights[t * active + a] * y;
      }
    }
  std::vector<float> first;
  for (const int threads : {1, 3}) {
    Workspace work(threads);
    std::vector<float> out(tokens * dim);
    kernels.moe(work, x.data(), ids.data(), weights.data(), e, {each, 2, of_token.data()}, 7.0f, tokens, active, out.data());
    check(distance(out, expected) < 0.02, name + ": the sums");
    if (first.empty()) first = out;
    check(out == first, name + ": threads");
    for (const int64_t count : {1, 2, 3, 9}) {
      std::vector<float> part(count * dim);
      for (const int64_t start : {100, 33}) {
        kernels.moe(work, x.data() + start * dim, ids.data() + start * active, weights.data() + start * active, e,
                    {each, 2, of_token.data() + start}, 7.0f, count, active, part.data());
        check(same_rows(out, part, start, dim), name + ": alone as in a batch");
      }
    }
    std::vector<float> without(tokens * dim), with_none(tokens * dim);
    kernels.moe(work, x.data(), ids.data(), weights.data(), e, {}, 7.0f, tokens, active, without.data());
    kernels.moe(work, x.data(), ids.data(), weights.data(), e, {each, 2, none.data()}, 7.0f, tokens, active, with_none.data());
    check(without == with_none, name + ": tokens without an adapter");
  }
}

void test_attention(const Kernels& kernels, ossia::KvFormat format, int64_t window) {
  const std::string name = std::string(kernels.name) + " attention " + std::to_string(static_cast<int>(format));
  const int64_t tokens = 1100, heads = 6, kv_heads = 2, dim = 20, block_size = 24;
  const int32_t num_blocks = 46;
  const std::vector<float> q = normal(tokens * heads * dim), k = normal(tokens * kv_heads * dim), v = normal(tokens * kv_heads * dim);
  const std::vector<float> sinks = normal(heads);
  std::vector<int32_t> table(num_blocks), positions(tokens);
  for (int32_t i = 0; i < num_blocks; ++i) table[i] = (i * 7 + 3) % num_blocks;
  for (int64_t t = 0; t < tokens; ++t) positions[t] = static_cast<int32_t>(t);

  std::vector<double> expected(tokens * heads * dim);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t kv = head / (heads / kv_heads), first = window ? std::max<int64_t>(0, t - window + 1) : 0;
      std::vector<double> weight;
      double top = sinks[head], sum = 0;
      for (int64_t j = first; j <= t; ++j) {
        double s = 0;
        for (int64_t h = 0; h < dim; ++h)
          s += static_cast<double>(q[(t * heads + head) * dim + h]) * k[(j * kv_heads + kv) * dim + h];
        weight.push_back(s / std::sqrt(static_cast<double>(dim)));
        top = std::fmax(top, weight.back());
      }
      for (double& w : weight) sum += w = std::exp(w - top);
      sum += std::exp(sinks[head] - top);
      for (int64_t j = first; j <= t; ++j)
        for (int64_t h = 0; h < dim; ++h)
          expected[(t * heads + head) * dim + h] += weight[j - first] / sum * v[(j * kv_heads + kv) * dim + h];
    }

  const double tolerance = format == ossia::KvFormat::kQ8 ? 0.02 : format == ossia::KvFormat::kBf16 ? 0.006 : 1e-5;
  std::vector<float> whole(tokens * heads * dim);
  for (const int threads : {1, 3})
    for (const int64_t step : {tokens, int64_t{1}, int64_t{137}}) {
      Workspace work(threads);
      std::vector<float> keys(num_blocks * block_size * kv_heads * dim), values(keys.size());
      std::vector<float> key_scales(num_blocks * block_size * kv_heads), value_scales(key_scales.size());
      std::vector<float> out(tokens * heads * dim);
      // Token by token only over the end: it is the cut that matters.
      for (int64_t start = 0; start < tokens;) {
        const int64_t count = std::min(step == 1 && start < tokens - 20 ? tokens - 20 : step, tokens - start);
        const int32_t starts[2] = {0, static_cast<int32_t>(count)}, length = static_cast<int32_t>(start + count);
        ossia::AttentionArgs a = {};
        a.q = q.data() + start * heads * dim, a.k = k.data() + start * kv_heads * dim, a.v = v.data() + start * kv_heads * dim;
        a.sinks = sinks.data(), a.out = out.data() + start * heads * dim;
        a.num_tokens = count, a.num_heads = heads, a.num_kv_heads = kv_heads, a.head_dim = dim, a.num_sequences = 1;
        a.positions = positions.data() + start, a.query_starts = starts, a.key_lengths = &length;
        a.table = table.data(), a.table_width = num_blocks, a.window = window, a.cached = true, a.kv_format = format;
        a.keys = {keys.data(), key_scales.data()}, a.values = {values.data(), value_scales.data()};
        a.block_size = block_size;
        kernels.attention(work, a);
        start += count;
      }
      if (threads == 1 && step == tokens) whole = out;
      check(distance(out, expected) < tolerance, name + ": the sums");
      check(std::memcmp(out.data(), whole.data(), out.size() * 4) == 0, name + ": however the prompt is cut");
    }
}

void test_elementwise(const Kernels& kernels) {
  const std::string name = kernels.name;
  Workspace work(2);
  const int64_t tokens = 40, dim = 1003;
  const std::vector<float> x = normal(tokens * dim), scale = normal(dim);
  std::vector<float> out(tokens * dim);
  std::vector<double> expected(tokens * dim);
  for (int64_t t = 0; t < tokens; ++t) {
    double sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += static_cast<double>(x[t * dim + i]) * x[t * dim + i];
    for (int64_t i = 0; i < dim; ++i) expected[t * dim + i] = x[t * dim + i] / std::sqrt(sum / dim + 1e-5) * scale[i];
  }
  kernels.rms_norm(work, x.data(), scale.data(), 1e-5f, tokens, dim, out.data());
  check(distance(out, expected) < 1e-6, name + " rms_norm");
}

// Widths that no register divides, beside the same in double.
void test_training(const Kernels& kernels, int64_t rows, int64_t dim) {
  const std::string name = kernels.name;
  Workspace work(2);
  std::vector<float> gate_up = normal(rows * 2 * dim, 5.0f), dinner = normal(rows * dim), weights = normal(rows);
  std::vector<float> inner(rows * dim), dpre(rows * 2 * dim), dots(rows);
  std::vector<double> expected_inner(inner.size()), expected_dpre(dpre.size()), expected_dots(rows);
  const double limit = 7.0, alpha = ossia::kSwigluAlpha;
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < dim; ++i) {
      const int64_t at = n * 2 * dim + i;
      const double gate = std::min<double>(gate_up[at], limit);
      const double up = std::clamp<double>(gate_up[at + dim], -limit, limit) + 1;
      const double sigmoid = 1 / (1 + std::exp(-alpha * gate)), g = dinner[n * dim + i];
      const bool gate_inside = gate_up[at] <= limit, up_inside = std::abs(gate_up[at + dim]) <= limit;
      expected_inner[n * dim + i] = gate * sigmoid * up;
      expected_dots[n] += gate * sigmoid * up * g;
      expected_dpre[at] = gate_inside * weights[n] * g * up * sigmoid * (1 + alpha * gate * (1 - sigmoid));
      expected_dpre[at + dim] = up_inside * weights[n] * g * gate * sigmoid;
    }
  kernels.swiglu(work, {gate_up.data()}, 7.0f, rows, dim, {inner.data()});
  check(distance(inner, expected_inner) < 1e-6, name + " swiglu");
  kernels.swiglu_backward(work, {gate_up.data()}, {dinner.data()}, weights.data(), 7.0f, rows, dim, {dpre.data()}, dots.data());
  check(distance(dpre, expected_dpre) < 1e-6 && distance(dots, expected_dots) < 1e-5, name + " swiglu_backward");

  const std::vector<float> x = normal(rows * dim, 3.0f), scale = normal(dim);
  std::vector<float> dx(rows * dim), dscale(dim);
  std::vector<double> expected_dx(dx.size()), expected_dscale(dim);
  for (int64_t t = 0; t < rows; ++t) {
    double squares = 0, products = 0;
    for (int64_t i = 0; i < dim; ++i) {
      const double number = x[t * dim + i];
      squares += number * number;
      products += number * dinner[t * dim + i] * scale[i];
    }
    const double r = 1 / std::sqrt(squares / dim + 1e-5);
    for (int64_t i = 0; i < dim; ++i) {
      const double number = x[t * dim + i], g = dinner[t * dim + i];
      expected_dx[t * dim + i] = r * g * scale[i] - r * r * r * products / dim * number;
      expected_dscale[i] += r * g * number;
    }
  }
  kernels.rms_norm_backward(work, x.data(), scale.data(), 1e-5f, dinner.data(), rows, dim, dx.data(), dscale.data());
  check(distance(dx, expected_dx) < 1e-5 && distance(dscale, expected_dscale) < 1e-5, name + " rms_norm_backward");

  // Rows in reverse, through bfloat16 and back onto themselves: each twice itself, to 8 bits.
  std::vector<int64_t> indices(rows);
  for (int64_t n = 0; n < rows; ++n) indices[n] = rows - 1 - n;
  std::vector<uint16_t> narrow((rows + 3) * dim, 1);
  std::vector<float> sum = x;
  std::vector<double> expected_sum(x.size());
  for (size_t i = 0; i < x.size(); ++i) expected_sum[i] = 2.0 * x[i];
  ossia::Rows source{sum.data()}, taken{nullptr, narrow.data()};
  kernels.take_rows(work, source, indices.data(), nullptr, rows, rows + 3, dim, taken);
  check(std::all_of(narrow.end() - 3 * dim, narrow.end(), [](uint16_t bits) { return bits == 0; }), name + " take_rows");
  kernels.add_rows(work, taken, indices.data(), nullptr, rows, dim, sum.data());
  check(distance(sum, expected_sum) < 2e-3, name + " take_rows, add_rows");
}

// Blocks of MXFP4 beside all numbers of the grid under the three scales that may be best, in double.
void test_rounding(const Kernels& kernels) {
  const double grid[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const int64_t blocks = 1500;
  std::vector<float> x = normal(blocks * ossia::kBlock), out(x.size());
  for (int64_t b = 0; b < blocks; ++b)
    for (int i = 0; i < ossia::kBlock; ++i) x[b * ossia::kBlock + i] *= std::ldexp(1.0f, b % 61 - 30);
  std::fill_n(x.begin(), ossia::kBlock, -0.0f);
  x[3 * ossia::kBlock + 5] = INFINITY;
  Workspace work(2);
  kernels.round_mxfp4(work, x.data(), blocks, out.data());
  for (int64_t b = 0; b < blocks; ++b) {
    const float *block = x.data() + b * ossia::kBlock, *met = out.data() + b * ossia::kBlock;
    float largest = 0;
    for (int i = 0; i < ossia::kBlock; ++i) largest = std::max(largest, std::abs(block[i]));
    double least_error = INFINITY, error = 0;
    for (int step = -1; step <= 1 && std::isfinite(largest) && largest > 0; ++step) {
      const double scale = std::ldexp(1.0, std::ilogb(largest) - 2 + step);
      double sum = 0;
      for (int i = 0; i < ossia::kBlock; ++i) {
        double nearest = INFINITY;
        for (const double number : grid) nearest = std::min(nearest, std::abs(std::abs(block[i]) - number * scale));
        sum += nearest * nearest;
      }
      least_error = std::min(least_error, sum);
    }
    bool holds = true;
    for (int i = 0; i < ossia::kBlock; ++i) {
      error += (static_cast<double>(met[i]) - block[i]) * (static_cast<double>(met[i]) - block[i]);
      holds = holds && (std::isnan(met[i]) || std::signbit(met[i]) == std::signbit(block[i]));
    }
    if (!std::isfinite(largest)) holds = std::all_of(met, met + ossia::kBlock, [](float one) { return std::isnan(one); });
    else if (largest == 0) holds = holds && error == 0;
    else holds = holds && error <= least_error * (1 + 1e-6);
    check(holds, std::string(kernels.name) + " round_mxfp4");
  }
}

// Attention with its way back: what it yields, and the slopes by differences of sum(out g) in double.
void test_training_attention(const Kernels& kernels, int64_t window) {
  const std::string name = kernels.name;
  Workspace work(2);
  const int64_t tokens = 53, heads = 4, kv_heads = 2, dim = 18;
  const std::vector<int32_t> starts = {0, 41, 41, 53};
  const std::vector<float> q = normal(tokens * heads * dim), g = normal(q.size()), sinks = normal(heads);
  const std::vector<float> k = normal(tokens * kv_heads * dim), v = normal(k.size());
  const auto attend = [&](const std::vector<double>& q, const std::vector<double>& k, const std::vector<double>& v) {
    std::vector<double> out(q.size());
    for (size_t n = 0; n + 1 < starts.size(); ++n)
      for (int64_t t = starts[n]; t < starts[n + 1]; ++t)
        for (int64_t head = 0; head < heads; ++head) {
          double total = std::exp(static_cast<double>(sinks[head]));
          double* o = out.data() + (t * heads + head) * dim;
          for (int64_t j = std::max<int64_t>(starts[n], window ? t - window + 1 : 0); j <= t; ++j) {
            const int64_t key = (j * kv_heads + head / (heads / kv_heads)) * dim;
            double score = 0;
            for (int64_t h = 0; h < dim; ++h) score += q[(t * heads + head) * dim + h] * k[key + h];
            const double power = std::exp(score / std::sqrt(static_cast<double>(dim)));
            total += power;
            for (int64_t h = 0; h < dim; ++h) o[h] += power * v[key + h];
          }
          for (int64_t h = 0; h < dim; ++h) o[h] /= total;
        }
    return out;
  };
  std::vector<float> out(q.size()), lse(tokens * heads), dots(lse.size()), dq(q.size()), dk(k.size()), dv(v.size());
  ossia::TrainingAttention args = {q.data(), k.data(), v.data(), sinks.data(), out.data(), lse.data(), g.data(), dq.data(),
                                   dk.data(), dv.data(), dots.data(), heads, kv_heads, dim, 3, starts.data(), window};
  kernels.training_attention(work, args);
  kernels.training_attention_backward(work, args);
  const std::vector<double> wide[3] = {{q.begin(), q.end()}, {k.begin(), k.end()}, {v.begin(), v.end()}};
  check(distance(out, attend(wide[0], wide[1], wide[2])) < 1e-6, name + " training_attention");
  const std::vector<float>* slopes[3] = {&dq, &dk, &dv};
  for (int which = 0; which < 3; ++which)
    for (size_t at = which; at < wide[which].size(); at += 397) {
      double sums[2] = {0, 0};
      for (const int side : {0, 1}) {
        std::vector<double> moved[3] = {wide[0], wide[1], wide[2]};
        moved[which][at] += side ? 1e-4 : -1e-4;
        const std::vector<double> result = attend(moved[0], moved[1], moved[2]);
        for (size_t i = 0; i < result.size(); ++i) sums[side] += result[i] * g[i];
      }
      check(std::abs((*slopes[which])[at] - (sums[1] - sums[0]) / 2e-4) < 1e-5, name + " training_attention_backward");
    }
}

}  // namespace

// With an argument: only that instruction set, which must be there (an emulator takes its time).
int main(int num_arguments, char** arguments) {
  const std::string only = num_arguments > 1 ? arguments[1] : "";
  if (only.empty()) test_pool();
  int num_sets = 0;
  for (const char* isa : {"portable", "avx2", "avxvnni", "avx512vnni", "dotprod", "i8mm"}) {
    if (!only.empty() && only != isa) continue;
    const Kernels* kernels = ossia::find_kernels(isa);
    check(kernels || only.empty(), only + " is missing");
    if (!kernels) continue;
    ++num_sets;
    for (const Format format : {Format::kQ8, Format::kF32}) {
      test_linear(*kernels, format, 37, 96);
      test_linear(*kernels, format, 5, 320);
    }
    test_linear(*kernels, Format::kF32, 37, 45);
    test_moe(*kernels, Format::kMxfp4Pairs);
    test_moe(*kernels, Format::kMxfp4Halves);
    for (const int64_t window : {0, 128})
      for (const auto format : {ossia::KvFormat::kBf16, ossia::KvFormat::kQ8, ossia::KvFormat::kF32})
        test_attention(*kernels, format, window);
    test_elementwise(*kernels);
    test_training(*kernels, 70, 33);
    test_training(*kernels, 600, 64);
    test_rounding(*kernels);
    for (const int64_t window : {0, 1, 21}) test_training_attention(*kernels, window);
    std::printf("%s: tested\n", isa);
  }
  std::printf("%d instruction sets, %d failures\n", num_sets, failures);
  return failures != 0;
}
