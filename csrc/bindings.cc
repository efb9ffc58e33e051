// The Python module ossia._kernels: the only file that knows Python. Its typed face is src/ossia/_kernels.pyi.
//
// Arrays come in as buffers (C-contiguous, of floats or integers), weights as addresses that Python keeps alive. Shapes and
// indices are checked here; kernels trust them. Kernels run without the interpreter's lock, one call at a time.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using ossia::Experts;
using ossia::Format;
using ossia::KvFormat;
using ossia::Matrix;
using ossia::ExpertLora;
using ossia::Lora;

void expect(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

template <class T>
constexpr char kCode = 0;
template <>
constexpr char kCode<float> = 'f';
template <>
constexpr char kCode<int32_t> = 'i';
template <>
constexpr char kCode<int64_t> = 'l';
template <>
constexpr char kCode<int8_t> = 'b';
template <>
constexpr char kCode<uint16_t> = 'H';

// A view of a Python array; `T const` for input.
template <class T>
class Buffer {
 public:
  using Value = std::remove_const_t<T>;
  Buffer(nb::handle object, int ndim) {
    const int writable = std::is_const_v<T> ? 0 : PyBUF_WRITABLE;
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | writable)) throw nb::python_error();
    const char* format = view_.format ? view_.format : "B";
    const bool same = format[0] == kCode<Value> && format[1] == 0 && view_.itemsize == sizeof(Value);
    // int32 is 'i' or, where both are 4 bytes, 'l'; int64 is 'l' or 'q'.
    const bool same_int = (std::is_same_v<Value, int32_t> && format[0] == 'l' && view_.itemsize == 4) ||
                          (std::is_same_v<Value, int64_t> && format[0] == 'q');
    if ((!same && !same_int) || view_.ndim != ndim) {
      const std::string met = std::string(format) + " with " + std::to_string(view_.ndim) + " axes";
      PyBuffer_Release(&view_);
      throw nb::type_error(("expected a contiguous array of " + std::string(1, kCode<Value>) + " with " +
                            std::to_string(ndim) + " axes, got " + met).c_str());
    }
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return static_cast<T*>(view_.buf); }
  int64_t shape(int axis) const { return view_.shape[axis]; }
  int64_t size() const { return view_.len / static_cast<int64_t>(sizeof(T)); }

 private:
  Py_buffer view_;
};
using Floats = Buffer<const float>;
using FloatsOut = Buffer<float>;
using Ints = Buffer<const int32_t>;
using Longs = Buffer<const int64_t>;

// A view of rows in float32, or in uint16 for bfloat16.
template <bool kWritable>
class RowsBuffer {
  template <class T>
  using Of = Buffer<std::conditional_t<kWritable, T, const T>>;

 public:
  RowsBuffer(nb::handle object, int ndim) {
    if (nb::cast<int64_t>(object.attr("itemsize")) == 2) {
      bf16_.emplace(object, ndim);
    } else {
      floats_.emplace(object, ndim);
    }
  }
  bool is_bf16() const { return bf16_.has_value(); }
  int64_t shape(int axis) const { return bf16_ ? bf16_->shape(axis) : floats_->shape(axis); }
  int64_t size() const { return bf16_ ? bf16_->size() : floats_->size(); }
  // Kernels write only into what they call a result.
  ossia::Rows rows() const {
    if (bf16_) return {nullptr, const_cast<uint16_t*>(bf16_->data())};
    return {const_cast<float*>(floats_->data()), nullptr};
  }

 private:
  std::optional<Of<float>> floats_;
  std::optional<Of<uint16_t>> bf16_;
};
using RowsIn = RowsBuffer<false>;
using RowsOut = RowsBuffer<true>;

// Indices [n], and a weight for each unless None.
class Picks {
 public:
  Picks(nb::handle indices_N, nb::handle weights_N, int64_t limit) : indices_(indices_N, 1) {
    bool within = true;
    for (int64_t n = 0; n < count(); ++n) within &= static_cast<uint64_t>(indices()[n]) < static_cast<uint64_t>(limit);
    expect(within, "an index is outside the rows");
    if (weights_N.is_none()) return;
    weights_.emplace(weights_N, 1);
    expect(weights_->size() == count(), "every index needs a weight");
  }
  int64_t count() const { return indices_.size(); }
  const int64_t* indices() const { return indices_.data(); }
  const float* weights() const { return weights_ ? weights_->data() : nullptr; }

 private:
  Longs indices_;
  std::optional<Floats> weights_;
};

void expect_within(const int32_t* values, int64_t count, int64_t limit, const char* message) {
  bool within = true;
  for (int64_t i = 0; i < count; ++i) within &= static_cast<uint32_t>(values[i]) < static_cast<uint64_t>(limit);
  expect(within, message);
}

const uint8_t* at_address(uint64_t address) { return reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(address)); }

// Keys and values of one layer; the arrays belong to Python.
struct Cache {
  KvFormat format;
  int64_t num_blocks, block_size, num_kv_heads, head_dim;
  ossia::KvStore keys, values;
};

// The adapters of a call, a sequence of which some may be None, and each token's; none at all where `loras` is None.
template <class One>
class Changes {
 public:
  Changes(nb::handle loras, nb::handle lora_T, int64_t num_tokens) {
    if (loras.is_none()) return;
    for (nb::handle one : loras) each.push_back(one.is_none() ? nullptr : &nb::cast<const One&>(one));
    of_token_.emplace(lora_T, 1);
    expect(of_token_->size() == num_tokens, "adapters: every token needs a number, -1 for none");
    for (int64_t t = 0; t < num_tokens; ++t)
      expect(-1 <= of_token_->data()[t] && of_token_->data()[t] < static_cast<int64_t>(each.size()),
             "adapters: a token's number is too large");
  }
  ossia::PerToken<One> rows() const {
    if (each.empty()) return {};
    return {each.data(), static_cast<int64_t>(each.size()), of_token_->data()};
  }

  std::vector<const One*> each;

 private:
  std::optional<Ints> of_token_;
};

bool fits(const Lora& lora, const Matrix& weight) {
  return lora.rows == 0 || (lora.rows == weight.rows && lora.a.cols == weight.cols);
}

class Context {
 public:
  Context(const std::string& isa, int num_threads) : work_(num_threads) {
    kernels_ = ossia::find_kernels(isa.c_str());
    expect(kernels_ != nullptr, "this machine or this build lacks the instruction set");
  }

  std::string isa() const { return kernels_->name; }
  int tile_rows() const { return kernels_->tile_rows; }
  int num_threads() const { return work_.pool.num_threads(); }

  void embed(const Matrix& table, nb::handle ids_T, nb::handle out_TD) {
    const Ints ids(ids_T, 1);
    const FloatsOut out(out_TD, 2);
    expect(out.shape(0) == ids.shape(0) && out.shape(1) == table.cols, "embed: shapes differ");
    expect_within(ids.data(), ids.size(), table.rows, "embed: a token id is outside the vocabulary");
    run([&] { kernels_->embed(work_, table, ids.data(), ids.size(), out.data()); });
  }

  void rms_norm(nb::handle x_TD, nb::handle scale_D, float eps, nb::handle out_TD) {
    const Floats x(x_TD, 2), scale(scale_D, 1);
    const FloatsOut out(out_TD, 2);
    expect(x.shape(1) == scale.shape(0) && out.size() == x.size(), "rms_norm: shapes differ");
    run([&] { kernels_->rms_norm(work_, x.data(), scale.data(), eps, x.shape(0), x.shape(1), out.data()); });
  }

  void rope(nb::handle x_TQH, nb::handle cos_TP, nb::handle sin_TP, nb::handle out_TQH) {
    const RowsIn x(x_TQH, 3);
    const RowsOut out(out_TQH, 3);
    const Floats cos(cos_TP, 2), sin(sin_TP, 2);
    expect(cos.size() == x.shape(0) * (x.shape(2) / 2) && sin.size() == cos.size() && x.shape(2) % 2 == 0 &&
               out.size() == x.size() && out.is_bf16() == x.is_bf16(), "rope: shapes differ");
    run([&] {
      kernels_->rope(work_, x.rows(), cos.data(), sin.data(), x.shape(0), x.shape(1), x.shape(2), out.rows());
    });
  }

  void rope_angles(nb::handle positions_T, nb::handle inv_freq_P, double concentration, nb::handle cos_TP, nb::handle sin_TP) {
    const Ints positions(positions_T, 1);
    const Floats inv_freq(inv_freq_P, 1);
    const FloatsOut cos(cos_TP, 2), sin(sin_TP, 2);
    expect(cos.size() == positions.size() * inv_freq.size() && sin.size() == cos.size(), "rope_angles: shapes differ");
    run([&] {
      ossia::rope_angles(work_, positions.data(), inv_freq.data(), positions.size(), inv_freq.size(), concentration,
                         cos.data(), sin.data());
    });
  }

  void linear(nb::handle x_TI, const Matrix& weight, nb::handle bias_O, nb::handle out_TO, nb::handle loras, nb::handle lora_T) {
    const Floats x(x_TI, 2);
    const FloatsOut out(out_TO, 2);
    expect(x.shape(1) == weight.cols && out.shape(0) == x.shape(0) && out.shape(1) == weight.rows, "linear: shapes differ");
    const Changes<Lora> changes(loras, lora_T, x.shape(0));
    for (const Lora* lora : changes.each)
      expect(!lora || fits(*lora, weight), "linear: an adapter is for a matrix of another shape");
    if (bias_O.is_none()) {
      run([&] { kernels_->linear(work_, x.data(), weight, nullptr, changes.rows(), x.shape(0), out.data()); });
      return;
    }
    const Floats bias(bias_O, 1);
    expect(bias.size() == weight.rows, "linear: the bias has another length");
    run([&] { kernels_->linear(work_, x.data(), weight, bias.data(), changes.rows(), x.shape(0), out.data()); });
  }

  void route(nb::handle logits_TE, nb::handle experts_TA, nb::handle weights_TA) {
    const Floats logits(logits_TE, 2);
    const Buffer<int32_t> experts(experts_TA, 2);
    const FloatsOut weights(weights_TA, 2);
    expect(experts.shape(0) == logits.shape(0) && experts.shape(1) <= logits.shape(1) && weights.size() == experts.size(),
           "route: shapes differ");
    run([&] {
      ossia::route(logits.data(), logits.shape(0), logits.shape(1), experts.shape(1), experts.data(), weights.data());
    });
  }

  void moe(nb::handle x_TD, nb::handle experts_TA, nb::handle weights_TA, const Experts& experts, float limit, nb::handle out_TD,
           nb::handle loras, nb::handle lora_T) {
    const Floats x(x_TD, 2), weights(weights_TA, 2);
    const Ints ids(experts_TA, 2);
    const FloatsOut out(out_TD, 2);
    expect(x.shape(1) == experts.gate.cols && out.shape(0) == x.shape(0) && out.shape(1) == experts.down.rows &&
               ids.shape(0) == x.shape(0) && weights.size() == ids.size(), "moe: shapes differ");
    expect_within(ids.data(), ids.size(), experts.num_experts, "moe: an expert's number is too large");
    const Changes<ExpertLora> changes(loras, lora_T, x.shape(0));
    for (const ExpertLora* lora : changes.each)
      expect(!lora || (fits(lora->gate, experts.gate) && fits(lora->up, experts.up) && fits(lora->down, experts.down)),
             "moe: an adapter is for experts of another shape");
    run([&] {
      kernels_->moe(work_, x.data(), ids.data(), weights.data(), experts, changes.rows(), limit, x.shape(0), ids.shape(1),
                    out.data());
    });
  }

  void attention(nb::handle q_TQH, nb::handle k_TKH, nb::handle v_TKH, nb::handle sinks_Q, const Cache* cache,
                 nb::handle positions_T, nb::handle query_starts_N1, nb::handle key_lengths_N, nb::handle table_NB,
                 int64_t window, nb::handle out_TQH) {
    const Floats q(q_TQH, 3), k(k_TKH, 3), v(v_TKH, 3), sinks(sinks_Q, 1);
    const FloatsOut out(out_TQH, 3);
    const Ints positions(positions_T, 1), starts(query_starts_N1, 1), lengths(key_lengths_N, 1), table(table_NB, 2);
    ossia::AttentionArgs a = {};
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.sinks = sinks.data(), a.out = out.data();
    a.num_tokens = q.shape(0), a.num_heads = q.shape(1), a.num_kv_heads = k.shape(1), a.head_dim = q.shape(2);
    a.num_sequences = lengths.size();
    a.positions = positions.data(), a.query_starts = starts.data(), a.key_lengths = lengths.data();
    a.table = table.data(), a.table_width = table.shape(1);
    a.window = window;
    expect(k.shape(0) == a.num_tokens && k.shape(2) == a.head_dim && v.size() == k.size() && out.size() == q.size() &&
               sinks.size() == a.num_heads && a.num_heads % a.num_kv_heads == 0 && positions.size() == a.num_tokens &&
               starts.size() == a.num_sequences + 1, "attention: shapes differ");
    for (int64_t n = 0; n < a.num_sequences; ++n)
      expect(0 <= a.query_starts[n] && a.query_starts[n] < a.query_starts[n + 1] && a.query_starts[n + 1] <= a.num_tokens,
             "attention: query_starts must ascend within the tokens");
    if (cache) use_cache(*cache, table.shape(0), a);
    run([&] { kernels_->attention(work_, a); });
  }

  void pack_q8(const Matrix& source, int64_t first_row, nb::handle data, nb::handle scales) {
    const Buffer<int8_t> q(data, 1);
    const Buffer<uint16_t> d(scales, 1);
    const int64_t rows = (source.rows + tile_rows() - 1) / tile_rows() * tile_rows();
    expect(source.cols % ossia::kBlock == 0 && first_row % tile_rows() == 0 && q.size() >= (first_row + rows) * source.cols &&
               d.size() >= (first_row + rows) * source.cols / ossia::kBlock, "pack_q8: the packed arrays are too small");
    run([&] { kernels_->pack_q8(work_, source, first_row, q.data(), d.data()); });
  }

  // `out` is float32, or uint16 for bfloat16.
  void dequantize(const Matrix& stack, int64_t index, nb::handle out_OI) {
    expect(stack.format == Format::kMxfp4Pairs || stack.format == Format::kMxfp4Halves, "dequantize: not an MXFP4 matrix");
    expect(index >= 0, "dequantize: the index is below 0");
    const Matrix source = stack.at(index);
    const auto fits = [&](const auto& out) {
      expect(out.shape(0) == source.rows && out.shape(1) == source.cols, "dequantize: shapes differ");
    };
    if (nb::cast<int64_t>(out_OI.attr("itemsize")) == 2) {
      const Buffer<uint16_t> out(out_OI, 2);
      fits(out);
      run([&] { kernels_->dequantize(work_, source, nullptr, out.data()); });
    } else {
      const FloatsOut out(out_OI, 2);
      fits(out);
      run([&] { kernels_->dequantize(work_, source, out.data(), nullptr); });
    }
  }

  void rms_norm_backward(nb::handle x_TD, nb::handle scale_D, float eps, nb::handle g_TD, nb::handle dx_TD, nb::handle dscale_D) {
    const Floats x(x_TD, 2), scale(scale_D, 1), g(g_TD, 2);
    const FloatsOut dx(dx_TD, 2), dscale(dscale_D, 1);
    expect(scale.size() == x.shape(1) && g.size() == x.size() && dx.size() == x.size() && dscale.size() == scale.size(),
           "rms_norm_backward: shapes differ");
    run([&] {
      kernels_->rms_norm_backward(work_, x.data(), scale.data(), eps, g.data(), x.shape(0), x.shape(1), dx.data(), dscale.data());
    });
  }

  void swiglu(nb::handle gate_up_NF, float limit, nb::handle inner_NF) {
    const RowsIn gate_up(gate_up_NF, 2);
    const RowsOut inner(inner_NF, 2);
    expect(inner.shape(0) == gate_up.shape(0) && 2 * inner.shape(1) == gate_up.shape(1) && inner.is_bf16() == gate_up.is_bf16(),
           "swiglu: shapes differ");
    run([&] { kernels_->swiglu(work_, gate_up.rows(), limit, inner.shape(0), inner.shape(1), inner.rows()); });
  }

  void swiglu_backward(nb::handle gate_up_NF, nb::handle dinner_NF, nb::handle weights_N, float limit, nb::handle dpre_NF,
                       nb::handle dots_N) {
    const RowsIn gate_up(gate_up_NF, 2), dinner(dinner_NF, 2);
    const RowsOut dpre(dpre_NF, 2);
    const Floats weights(weights_N, 1);
    const FloatsOut dots(dots_N, 1);
    const int64_t rows = gate_up.shape(0), dim = dinner.shape(1);
    expect(dinner.shape(0) == rows && gate_up.shape(1) == 2 * dim && dpre.shape(0) == rows && dpre.shape(1) == 2 * dim &&
               weights.size() == rows && dots.size() == rows && dinner.is_bf16() == gate_up.is_bf16() &&
               dpre.is_bf16() == gate_up.is_bf16(), "swiglu_backward: shapes differ");
    run([&] {
      kernels_->swiglu_backward(work_, gate_up.rows(), dinner.rows(), weights.data(), limit, rows, dim, dpre.rows(), dots.data());
    });
  }

  void take_rows(nb::handle source_TD, nb::handle indices_N, nb::handle weights_N, nb::handle out_MD) {
    const RowsIn source(source_TD, 2);
    const RowsOut out(out_MD, 2);
    const Picks picks(indices_N, weights_N, source.shape(0));
    expect(out.shape(1) == source.shape(1) && out.shape(0) >= picks.count(), "take_rows: shapes differ");
    run([&] {
      kernels_->take_rows(work_, source.rows(), picks.indices(), picks.weights(), picks.count(), out.shape(0), out.shape(1),
                          out.rows());
    });
  }

  void add_rows(nb::handle rows_MD, nb::handle indices_N, nb::handle weights_N, nb::handle out_TD) {
    const RowsIn rows(rows_MD, 2);
    const FloatsOut out(out_TD, 2);
    const Picks picks(indices_N, weights_N, out.shape(0));
    expect(out.shape(1) == rows.shape(1) && rows.shape(0) >= picks.count(), "add_rows: shapes differ");
    run([&] {
      kernels_->add_rows(work_, rows.rows(), picks.indices(), picks.weights(), picks.count(), out.shape(1), out.data());
    });
  }

  void round_mxfp4(nb::handle x_N, nb::handle out_N) {
    const Floats x(x_N, 1);
    const FloatsOut out(out_N, 1);
    expect(x.size() % ossia::kBlock == 0 && out.size() == x.size(), "round_mxfp4: not blocks of 32, or shapes differ");
    run([&] { kernels_->round_mxfp4(work_, x.data(), x.size() / ossia::kBlock, out.data()); });
  }

  // Without g_TQH the forward pass, which writes out and lse; with it the way back, which reads them.
  void training_attention(nb::handle q_TQH, nb::handle k_TKH, nb::handle v_TKH, nb::handle sinks_Q, nb::handle starts_N1,
                          int64_t window, nb::handle out_TQH, nb::handle lse_TQ, nb::handle g_TQH, nb::handle dq_TQH,
                          nb::handle dk_TKH, nb::handle dv_TKH, nb::handle dots_TQ) {
    const Floats q(q_TQH, 3), k(k_TKH, 3), v(v_TKH, 3), sinks(sinks_Q, 1);
    const FloatsOut out(out_TQH, 3), lse(lse_TQ, 2);
    const Ints starts(starts_N1, 1);
    ossia::TrainingAttention a = {};
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.sinks = sinks.data(), a.out = out.data(), a.lse = lse.data();
    a.num_heads = q.shape(1), a.num_kv_heads = k.shape(1), a.head_dim = q.shape(2), a.num_sequences = starts.size() - 1;
    a.starts = starts.data(), a.window = window;
    expect(k.shape(0) == q.shape(0) && k.shape(2) == a.head_dim && v.size() == k.size() && out.size() == q.size() &&
               sinks.size() == a.num_heads && a.num_heads % a.num_kv_heads == 0 && lse.size() == q.shape(0) * a.num_heads &&
               window >= 0, "training_attention: shapes differ");
    expect(starts.size() > 0 && starts.data()[0] == 0 && starts.data()[a.num_sequences] == q.shape(0),
           "training_attention: the sequences must be all of the tokens");
    for (int64_t n = 0; n < a.num_sequences; ++n)
      expect(a.starts[n] <= a.starts[n + 1], "training_attention: starts must ascend");
    if (g_TQH.is_none()) return run([&] { kernels_->training_attention(work_, a); });
    const Floats g(g_TQH, 3);
    const FloatsOut dq(dq_TQH, 3), dk(dk_TKH, 3), dv(dv_TKH, 3), dots(dots_TQ, 2);
    a.g = g.data(), a.dq = dq.data(), a.dk = dk.data(), a.dv = dv.data(), a.dots = dots.data();
    expect(g.size() == q.size() && dq.size() == q.size() && dk.size() == k.size() && dv.size() == k.size() &&
               dots.size() == lse.size(), "training_attention: shapes differ");
    run([&] { kernels_->training_attention_backward(work_, a); });
  }

  double read_bandwidth(int64_t num_bytes, int num_rounds) {
    double result = 0;
    run([&] { result = ossia::read_bandwidth(work_.pool, num_bytes, num_rounds); });
    return result;
  }

  double integer_peak(int64_t num_rounds) {
    double result = 0;
    run([&] { result = ossia::integer_peak(work_.pool, *kernels_, num_rounds); });
    return result;
  }

 private:
  template <class Body>
  void run(const Body& body) {
    nb::gil_scoped_release unlocked;
    const std::lock_guard<std::mutex> lock(mutex_);
    body();
  }

  static void use_cache(const Cache& cache, int64_t num_tables, ossia::AttentionArgs& a) {
    expect(cache.num_kv_heads == a.num_kv_heads && cache.head_dim == a.head_dim, "attention: the cache has another shape");
    expect(num_tables >= a.num_sequences, "attention: a sequence has no table");
    for (int64_t n = 0; n < a.num_sequences; ++n) {
      const int64_t first = a.positions[a.query_starts[n]], last = a.positions[a.query_starts[n + 1] - 1];
      expect(0 <= first && last - first == a.query_starts[n + 1] - a.query_starts[n] - 1 && last == a.key_lengths[n] - 1,
             "attention: a sequence's tokens must be its last ones, in order");
      const int64_t oldest = a.window && first - a.window + 1 > 0 ? first - a.window + 1 : 0;
      const int64_t first_block = oldest / cache.block_size, end_block = last / cache.block_size + 1;
      expect(end_block <= a.table_width, "attention: a block table is too short");
      expect_within(a.table + n * a.table_width + first_block, end_block - first_block, cache.num_blocks,
                    "attention: a block table misses a block");
    }
    a.cached = true;
    a.kv_format = cache.format, a.keys = cache.keys, a.values = cache.values, a.block_size = cache.block_size;
  }

  ossia::Workspace work_;
  const ossia::Kernels* kernels_;
  std::mutex mutex_;
};

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "C++ kernels of ossia.ops.cpu";
  m.def("best_isa", [] { return std::string(ossia::best_isa()); });
  m.def("has_isa", [](const std::string& isa) { return ossia::find_kernels(isa.c_str()) != nullptr; }, "isa"_a);

  nb::class_<Matrix>(m, "Matrix")
      .def("__init__",
           [](Matrix* self, int format, int64_t rows, int64_t cols, uint64_t data, uint64_t scales, int64_t stack_stride,
              int64_t row_stride, int64_t block_stride, int64_t scale_stack_stride, int64_t scale_row_stride,
              int64_t scale_block_stride) {
             expect(0 <= format && format <= static_cast<int>(Format::kF32) && rows > 0 && cols > 0, "not a matrix");
             new (self) Matrix{static_cast<Format>(format), rows, cols, at_address(data), at_address(scales), row_stride,
                               block_stride, scale_row_stride, scale_block_stride, stack_stride, scale_stack_stride};
             expect(!ossia::is_quantized(self->format) || cols % ossia::kBlock == 0, "inputs must be a multiple of 32");
           },
           "format"_a, "rows"_a, "cols"_a, "data"_a, "scales"_a = 0, "stack_stride"_a = 0, "row_stride"_a = 0,
           "block_stride"_a = 0, "scale_stack_stride"_a = 0, "scale_row_stride"_a = 0, "scale_block_stride"_a = 0)
      .def_ro("rows", &Matrix::rows)
      .def_ro("cols", &Matrix::cols);

  nb::class_<Experts>(m, "Experts")
      .def("__init__",
           [](Experts* self, int64_t num_experts, const Matrix& gate, const Matrix& up, const Matrix& down,
              uint64_t gate_bias, uint64_t up_bias, uint64_t down_bias) {
             expect(gate.rows == up.rows && gate.cols == up.cols && down.cols == gate.rows && gate.format == up.format,
                    "gate, up and down do not fit together");
             const auto floats = [](uint64_t address) { return reinterpret_cast<const float*>(at_address(address)); };
             new (self) Experts{gate, up, down, floats(gate_bias), floats(up_bias), floats(down_bias), num_experts};
           },
           "num_experts"_a, "gate"_a, "up"_a, "down"_a, "gate_bias"_a, "up_bias"_a, "down_bias"_a);

  nb::class_<Lora>(m, "Lora")
      .def("__init__",
           [](Lora* self, const Matrix& a, int64_t rows, uint64_t b, int64_t b_stack_stride, float scale) {
             expect((a.format == Format::kF32 || a.format == Format::kBf16) && rows > 0, "not a low-rank change");
             new (self) Lora{a, rows, at_address(b), b_stack_stride, scale};
           },
           "a"_a, "rows"_a, "b"_a, "b_stack_stride"_a, "scale"_a);

  nb::class_<ExpertLora>(m, "ExpertLora")
      .def("__init__",
           [](ExpertLora* self, const Lora* gate, const Lora* up, const Lora* down) {
             new (self) ExpertLora{gate ? *gate : Lora{}, up ? *up : Lora{}, down ? *down : Lora{}};
           },
           "gate"_a.none(), "up"_a.none(), "down"_a.none());

  nb::class_<Cache>(m, "Cache")
      .def("__init__",
           [](Cache* self, int format, int64_t num_blocks, int64_t block_size, int64_t num_kv_heads, int64_t head_dim,
              uint64_t keys, uint64_t values, uint64_t key_scales, uint64_t value_scales) {
             const auto store = [](uint64_t data, uint64_t scales) {
               return ossia::KvStore{const_cast<uint8_t*>(at_address(data)),
                                     reinterpret_cast<float*>(const_cast<uint8_t*>(at_address(scales)))};
             };
             expect(0 <= format && format <= static_cast<int>(KvFormat::kF32) && block_size > 0, "not a cache");
             new (self) Cache{static_cast<KvFormat>(format), num_blocks, block_size, num_kv_heads, head_dim,
                              store(keys, key_scales), store(values, value_scales)};
           },
           "format"_a, "num_blocks"_a, "block_size"_a, "num_kv_heads"_a, "head_dim"_a, "keys"_a, "values"_a,
           "key_scales"_a = 0, "value_scales"_a = 0);

  nb::class_<Context>(m, "Context")
      .def(nb::init<const std::string&, int>(), "isa"_a, "num_threads"_a)
      .def_prop_ro("isa", &Context::isa)
      .def_prop_ro("tile_rows", &Context::tile_rows)
      .def_prop_ro("num_threads", &Context::num_threads)
      .def("embed", &Context::embed, "table"_a, "ids_T"_a, "out_TD"_a)
      .def("rms_norm", &Context::rms_norm, "x_TD"_a, "scale_D"_a, "eps"_a, "out_TD"_a)
      .def("rope", &Context::rope, "x_TQH"_a, "cos_TP"_a, "sin_TP"_a, "out_TQH"_a)
      .def("rope_angles", &Context::rope_angles, "positions_T"_a, "inv_freq_P"_a, "concentration"_a, "cos_TP"_a, "sin_TP"_a)
      .def("linear", &Context::linear, "x_TI"_a, "weight"_a, "bias_O"_a.none(), "out_TO"_a, "loras"_a.none() = nb::none(),
           "lora_T"_a.none() = nb::none())
      .def("route", &Context::route, "logits_TE"_a, "experts_TA"_a, "weights_TA"_a)
      .def("moe", &Context::moe, "x_TD"_a, "experts_TA"_a, "weights_TA"_a, "experts"_a, "limit"_a, "out_TD"_a,
           "loras"_a.none() = nb::none(), "lora_T"_a.none() = nb::none())
      .def("attention", &Context::attention, "q_TQH"_a, "k_TKH"_a, "v_TKH"_a, "sinks_Q"_a, "cache"_a.none(), "positions_T"_a,
           "query_starts_N1"_a, "key_lengths_N"_a, "table_NB"_a, "window"_a, "out_TQH"_a)
      .def("pack_q8", &Context::pack_q8, "source"_a, "first_row"_a, "data"_a, "scales"_a)
      .def("dequantize", &Context::dequantize, "stack"_a, "index"_a, "out_OI"_a)
      .def("rms_norm_backward", &Context::rms_norm_backward, "x_TD"_a, "scale_D"_a, "eps"_a, "g_TD"_a, "dx_TD"_a, "dscale_D"_a)
      .def("swiglu", &Context::swiglu, "gate_up_NF"_a, "limit"_a, "inner_NF"_a)
      .def("swiglu_backward", &Context::swiglu_backward, "gate_up_NF"_a, "dinner_NF"_a, "weights_N"_a, "limit"_a, "dpre_NF"_a,
           "dots_N"_a)
      .def("take_rows", &Context::take_rows, "source_TD"_a, "indices_N"_a, "weights_N"_a.none(), "out_MD"_a)
      .def("add_rows", &Context::add_rows, "rows_MD"_a, "indices_N"_a, "weights_N"_a.none(), "out_TD"_a)
      .def("round_mxfp4", &Context::round_mxfp4, "x_N"_a, "out_N"_a)
      .def("training_attention", &Context::training_attention, "q_TQH"_a, "k_TKH"_a, "v_TKH"_a, "sinks_Q"_a, "starts_N1"_a,
           "window"_a, "out_TQH"_a, "lse_TQ"_a, "g_TQH"_a.none() = nb::none(), "dq_TQH"_a.none() = nb::none(),
           "dk_TKH"_a.none() = nb::none(), "dv_TKH"_a.none() = nb::none(), "dots_TQ"_a.none() = nb::none())
      .def("read_bandwidth", &Context::read_bandwidth, "num_bytes"_a, "num_rounds"_a)
      .def("integer_peak", &Context::integer_peak, "num_rounds"_a);
}
