// What the kernels take and give: plain structs over pointers and sizes, and one table of functions per instruction set.
//
// Legend (as in src/ossia/ops/__init__.py): T tokens, D hidden, F intermediate, Q query heads, K key/value heads, H head
// dim, E experts, A experts per token, O x I a matrix, B x S cache blocks and slots, b blocks of 32 inputs.
//
// The result of one token's row is the same bits whatever else is in the batch, however many threads work, and however
// a prompt is cut into passes:
//   products with quantised weights   exact integers per 32 inputs, then one float sum over the blocks in order
//   products with float weights       lanes over the inputs, in an order that depends on the row's length alone
//   experts                           added in the order of the routing
//   attention                         keys in tiles and splits at fixed absolute positions, combined in order
//   adapters                          ranks in order, each token's own added to its finished product
#pragma once

#include <cstddef>
#include <cstdint>

#include "thread_pool.h"

namespace ossia {

// Headers are compiled once per instruction set: what they define must be inlined, never shared between the sets.
#define OSSIA_ALWAYS_INLINE inline __attribute__((always_inline))

constexpr float kSwigluAlpha = 1.702f;
constexpr int kBlock = 32;  // numbers that share a scale: MXFP4, Q8 and the quantised activations

enum class Format : int { kMxfp4Pairs, kMxfp4Halves, kQ8, kBf16, kF16, kF32 };

OSSIA_ALWAYS_INLINE bool is_quantized(Format format) { return format <= Format::kQ8; }

// A matrix O x I, or a stack of them. Strides in bytes.
//   mxfp4  data[row, b] 16 bytes of nibbles, scales[row, b] one E8M0 byte; any strides
//   q8     packed by `pack_q8`: data[tile, b, group of 4 inputs, row of the tile, 4], scales float16 [tile, b, row]
//   else   data[row] contiguous numbers
struct Matrix {
  Format format = Format::kF32;
  int64_t rows = 0, cols = 0;
  const uint8_t* data = nullptr;
  const uint8_t* scales = nullptr;
  int64_t row_stride = 0, block_stride = 0;
  int64_t scale_row_stride = 0, scale_block_stride = 0;
  int64_t stack_stride = 0, scale_stack_stride = 0;

  OSSIA_ALWAYS_INLINE Matrix at(int64_t index) const {
    Matrix one = *this;
    one.data += index * stack_stride;
    if (scales) one.scales += index * scale_stack_stride;
    return one;
  }
};

// Rows of numbers in float32 or in bfloat16; the other pointer is null.
struct Rows {
  float* floats = nullptr;
  uint16_t* bf16 = nullptr;
};

// 32 activations as integers: x = q d. `correction` undoes the offset that makes a weight's code unsigned.
struct QBlock {
  int8_t q[kBlock];
  int32_t correction;
  float d;
};
static_assert(sizeof(QBlock) == 40);

struct Experts {
  Matrix gate, up, down;        // [E, F, D], [E, F, D], [E, D, F]
  const float* gate_bias;       // [E, F]
  const float* up_bias;         // [E, F]
  const float* down_bias;       // [E, D]
  int64_t num_experts;
};

// A low-rank change of a matrix, or of each of a stack: y[o] += b[o, r] (scale a[r, i] x[i]); a and b in bfloat16 or float32.
struct Lora {
  Matrix a;                    // [.., r, I]
  int64_t rows = 0;            // O
  const uint8_t* b = nullptr;  // [.., ceil(O / 32), r, 32], zeros beyond O
  int64_t b_stack_stride = 0;  // bytes
  float scale = 0.0f;
};

// The changes of the experts of one layer; no rows where there is none.
struct ExpertLora {
  Lora gate, up, down;
};

// Which change each token of a batch goes through: each[of_token[t]], -1 and null for none. `each` null: no token.
template <class One>
struct PerToken {
  const One* const* each = nullptr;
  int64_t count = 0;
  const int32_t* of_token = nullptr;
};
using LoraRows = PerToken<Lora>;
using ExpertLoraRows = PerToken<ExpertLora>;

enum class KvFormat : int { kBf16, kQ8, kF32 };

// Keys or values of one layer: [B, K, S, H]; q8 has one float scale per (block, head, slot).
struct KvStore {
  void* data;
  float* scales;
};

struct AttentionArgs {
  const float* q;      // [T, Q, H]
  const float* k;      // [T, K, H]
  const float* v;      // [T, K, H]
  const float* sinks;  // [Q]
  float* out;          // [T, Q, H]
  int64_t num_tokens, num_heads, num_kv_heads, head_dim;
  int64_t num_sequences;
  const int32_t* positions;     // [T]
  const int32_t* query_starts;  // [N + 1]
  const int32_t* key_lengths;   // [N]
  const int32_t* table;         // [N, table_width]; without a cache unused
  int64_t table_width;
  int64_t window;               // 0: none
  bool cached;
  KvFormat kv_format;
  KvStore keys, values;
  int64_t block_size;
};

// Attention of sequences over their own tokens; dots, dq, dk and dv are the backward pass's results, and g its input.
struct TrainingAttention {
  const float *q, *k, *v, *sinks;  // [T, Q, H], [T, K, H] twice, [Q]
  float* out;                      // [T, Q, H]
  float* lse;                      // [T, Q], of scores and sink
  const float* g;                  // [T, Q, H]
  float *dq, *dk, *dv;
  float* dots;                     // [T, Q], g . out
  int64_t num_heads, num_kv_heads, head_dim, num_sequences;
  const int32_t* starts;           // [N + 1]
  int64_t window;                  // 0: none
};

// Memory that grows and is used again by the next call.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  OSSIA_ALWAYS_INLINE T* get(int64_t count) {
    return static_cast<T*>(grow(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* grow(size_t num_bytes);

  void* data_ = nullptr;
  size_t size_ = 0;
};

// What a call works with: the threads and memory that lives from call to call.
struct Workspace {
  explicit Workspace(int num_threads) : pool(num_threads) {}
  ThreadPool pool;
  Scratch quantized, hidden, partial, outputs, lists, per_worker, ranks, exact;
};

struct Kernels {
  const char* name;
  int tile_rows;  // rows that are multiplied side by side; the packed Q8 layout follows it

  void (*embed)(Workspace&, const Matrix& table, const int32_t* ids, int64_t num_tokens, float* out);
  void (*rms_norm)(Workspace&, const float* x, const float* scale, float eps, int64_t num_tokens, int64_t dim, float* out);
  // `out` may be x itself.
  void (*rope)(Workspace&, const Rows& x, const float* cos, const float* sin, int64_t num_tokens, int64_t heads, int64_t dim,
               const Rows& out);
  void (*linear)(Workspace&, const float* x, const Matrix& weight, const float* bias, const LoraRows& loras,
                 int64_t num_tokens, float* out);
  void (*moe)(Workspace&, const float* x, const int32_t* expert_ids, const float* weights, const Experts& experts,
              const ExpertLoraRows& loras, float limit, int64_t num_tokens, int64_t num_active, float* out);
  void (*attention)(Workspace&, const AttentionArgs&);
  // Rows [first_row, first_row + rows) of a float matrix, or of Q8_0 blocks (int8 [row, b, 32], float16 [row, b]), into
  // the packed layout of a matrix of `cols` inputs; first_row is a multiple of tile_rows.
  void (*pack_q8)(Workspace&, const Matrix& source, int64_t first_row, int8_t* data, uint16_t* scales);
  // The numbers of an MXFP4 matrix [rows, cols], exactly, as float32 or as bfloat16: one of the two is null.
  void (*dequantize)(Workspace&, const Matrix& source, float* floats, uint16_t* bf16);

  // Training's (training.cc). The rows of one call are all in float32 or all in bfloat16, but for `take_rows`.
  void (*rms_norm_backward)(Workspace&, const float* x, const float* scale, float eps, const float* g, int64_t num_tokens,
                            int64_t dim, float* dx, float* dscale);
  // inner [n, F] of gate_up [n, 2F]
  void (*swiglu)(Workspace&, const Rows& gate_up, float limit, int64_t rows, int64_t dim, const Rows& inner);
  // dpre [n, 2F] of the gradient of inner, times the row's weight, and each row's inner . dinner without it
  void (*swiglu_backward)(Workspace&, const Rows& gate_up, const Rows& dinner, const float* weights, float limit, int64_t rows,
                          int64_t dim, const Rows& dpre, float* dots);
  // Some rows, times weights unless null, and zeros behind them.
  void (*take_rows)(Workspace&, const Rows& source, const int64_t* indices, const float* weights, int64_t count,
                    int64_t num_out, int64_t dim, const Rows& out);
  // Rows, times weights unless null, onto some rows of out, none of them twice.
  void (*add_rows)(Workspace&, const Rows& rows, const int64_t* indices, const float* weights, int64_t count, int64_t dim,
                   float* out);
  // Blocks of 32 numbers as MXFP4 holds them, by the scale with the least squared error; NaN where not all are finite.
  void (*round_mxfp4)(Workspace&, const float* x, int64_t num_blocks, float* out);
  // From q, k, v and sinks: out and lse; with these and g: dq, dk, dv and dots.
  void (*training_attention)(Workspace&, const TrainingAttention&);
  void (*training_attention_backward)(Workspace&, const TrainingAttention&);

  // The instruction that the integer products are made of, in registers; gives the number of multiply-accumulates.
  double (*integer_products)(int64_t num_rounds);
};

// Elementwise operations that need no instruction set of their own (host.cc).
void route(const float* logits, int64_t num_tokens, int64_t num_experts, int64_t num_active, int32_t* experts, float* weights);
void rope_angles(Workspace&, const int32_t* positions, const float* inv_freq, int64_t num_tokens, int64_t pairs,
                 double concentration, float* cos, float* sin);
// Multiply-accumulates per second that the pool's threads reach together, in G.
double integer_peak(ThreadPool& pool, const Kernels& kernels, int64_t num_rounds);
// Bytes per second that `pool` reads from memory, in G.
double read_bandwidth(ThreadPool& pool, int64_t num_bytes, int num_rounds);

// The kernels of an instruction set, or null where this build or this machine lacks it.
const Kernels* find_kernels(const char* isa);
// The best that this machine runs.
const char* best_isa();

}  // namespace ossia
