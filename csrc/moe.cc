// The mixture of experts, for one token as for thousands.
//
//   slots        the T * A (token, choice) pairs, sorted by expert; each expert's slots in tiles of kTokenTile
//   gate, up     h[slot, f] = swiglu(x w_gate[e, f] + bias, x w_up[e, f] + bias), quantised at once, 32 rows of f at a time
//   down         y[slot, d] = h w_down[e, d] + bias
//   adapters     each slot's own low-rank change, added to its gate, up and y; that of y from h before it is quantised
//   combine      out[t, d] = sum_a weight[t, a] y[slot(t, a), d], in the order of the routing
//
// Weights are read where they lie (a mapped checkpoint); a piece of work is 32 rows of one expert for all its tokens.
#include "moe.h"

#include "dot.h"
#include "lora.h"

namespace ossia::OSSIA_NS {
namespace {

constexpr int64_t kWorthSharing = 1 << 17;  // multiply-accumulates; some 3 microseconds
constexpr int64_t kLoraWorthSharing = 1 << 14;
constexpr int64_t kItemRows = kBlock;       // one quantised block of h
static_assert(kItemRows == kLoraRows);
constexpr int64_t kMaxTokens = 1024;        // per pass: bounds the memory for h and y

struct Tile {
  int64_t first, count;  // slots
};

struct Slots {
  int64_t num_slots;
  int64_t num_used;           // experts that have slots
  const int32_t* used;        // [num_used] expert
  const int64_t* starts;      // [num_used + 1] first slot of a used expert
  const int32_t* position;    // [T * A] slot of a (token, choice)
};

// Slot s of a used expert lies in the tile that starts at:
OSSIA_INLINE Tile tile_of(int64_t slot, int64_t start, int64_t end) {
  const int64_t first = start + (slot - start) / kTokenTile * kTokenTile;
  return {first, least<int64_t>(kTokenTile, end - first)};
}

Slots sort_slots(Scratch& memory, const int32_t* expert_ids, int64_t num_slots, int64_t num_experts) {
  int64_t* starts = memory.get<int64_t>(2 * num_experts + 2 + (num_experts + num_slots + 1) / 2 + 1);
  int64_t* next = starts + num_experts + 1;
  int32_t* used = reinterpret_cast<int32_t*>(next + num_experts + 1);
  int32_t* position = used + num_experts;
  for (int64_t e = 0; e < num_experts; ++e) next[e] = 0;
  for (int64_t s = 0; s < num_slots; ++s) ++next[expert_ids[s]];
  int64_t num_used = 0, start = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t count = next[e];
    next[e] = start;
    if (count == 0) continue;
    used[num_used] = static_cast<int32_t>(e);
    starts[num_used++] = start;
    start += count;
  }
  starts[num_used] = num_slots;
  for (int64_t s = 0; s < num_slots; ++s) position[s] = static_cast<int32_t>(next[expert_ids[s]]++);
  return {num_slots, num_used, used, starts, position};
}

// The activations of all slots as the next product wants them: quantised [tile][b][slot of the tile], or rows of floats.
struct Activations {
  QBlock* quantized = nullptr;
  float* floats = nullptr;
  int64_t cols = 0;

  Activations(Scratch& memory, const Matrix& w, int64_t num_slots) : cols(w.cols) {
    if (is_quantized(w.format)) {
      quantized = memory.get<QBlock>(num_slots * (cols / kBlock));
    } else {
      floats = memory.get<float>(num_slots * cols);
    }
  }
  QBlock* tile(int64_t first) const { return quantized + first * (cols / kBlock); }
};

// The sums of a tile's rows to product[slot of the tile][kItemRows].
OSSIA_INLINE void keep_sums(const Matrix& w, int64_t tile, int64_t item, const float* sums, int64_t count, float* product) {
  const RowTile rows = row_tile(w, tile);
  float* to = product + rows.first_row - item * kItemRows;
  for (int64_t t = 0; t < count; ++t)
    for (int lane = rows.first_lane; lane < rows.end_lane; ++lane)
      to[t * kItemRows + lane] = sums[t * kTileRows + lane];
}

OSSIA_INLINE void tiles_of_item(const Matrix& w, int64_t item, int64_t* first, int64_t* end) {
  *first = item * (kItemRows / kTileRows);
  *end = w.rows < kTileRows ? w.rows : least(num_row_tiles(w), *first + kItemRows / kTileRows);
}

OSSIA_INLINE void item_product(const Matrix& w, int64_t item, const Activations& x, Tile slots, float* product) {
  if (x.quantized) {
    int64_t first, end;
    tiles_of_item(w, item, &first, &end);
    for_tiles(w, first, end, x.tile(slots.first), slots.count, [&](int64_t tile, const float* sums) {
      keep_sums(w, tile, item, sums, slots.count, product);
    });
  } else {
    const int64_t row = item * kItemRows;
    float_rows(w, row, least(kItemRows, w.rows - row), x.floats + slots.first * x.cols, x.cols, slots.count, product,
               kItemRows);
  }
}

// Gate and up tile by tile in turn: where their rows interleave in the file, memory is read in sequence.
OSSIA_INLINE void gate_up_product(const Matrix& gate, const Matrix& up, int64_t item, const Activations& x, Tile slots,
                                  float* gate_product, float* up_product) {
  if (!x.quantized) {
    item_product(gate, item, x, slots, gate_product);
    item_product(up, item, x, slots, up_product);
    return;
  }
  alignas(64) float sums[2][kTokenTile * kTileRows];
  int64_t tile, end;
  for (tiles_of_item(gate, item, &tile, &end); tile < end; ++tile) {
    quantized_tiles(gate, tile, up, tile, x.tile(slots.first), slots.count, sums[0], sums[1]);
    keep_sums(gate, tile, item, sums[0], slots.count, gate_product);
    keep_sums(up, tile, item, sums[1], slots.count, up_product);
  }
}

// gate' sigmoid(1.702 gate') (up' + 1) with gate' = min(gate, limit), up' = clip(up, -limit, limit); NaN stays.
OSSIA_INLINE Vf swiglu(Vf gate, Vf up, float limit) {
  gate = min(set1(limit), gate);
  up = max(set1(-limit), min(set1(limit), up));
  return mul(mul(gate, sigmoid(mul(set1(kSwigluAlpha), gate))), add(up, set1(1.0f)));
}

// The last item of a matrix whose rows are no multiple of 32 has a bias to match.
OSSIA_INLINE const float* padded_bias(const float* bias, int64_t count, float padded[kItemRows]) {
  if (count == kItemRows) return bias;
  for (int64_t j = 0; j < kItemRows; ++j) padded[j] = j < count ? bias[j] : 0.0f;
  return padded;
}

// The low-rank changes of all slots: a x, and later a h, for each slot's own expert and adapter.
class SlotLoras {
 public:
  SlotLoras(Workspace& work, const ExpertLoraRows& loras, const Slots& slots, const int32_t* expert_ids, int64_t num_active)
      : work_(work), loras_(loras), num_slots_(slots.num_slots) {
    if (!loras.each) return;
    for (int64_t i = 0; i < loras.count; ++i) {
      const ExpertLora* one = loras.each[i];
      if (!one) continue;
      gate_stride_ = greatest(gate_stride_, one->gate.a.rows);
      up_stride_ = greatest(up_stride_, one->up.a.rows);
      down_stride_ = greatest(down_stride_, one->down.a.rows);
    }
    const int64_t stride = gate_stride_ + up_stride_ + down_stride_;
    if (!stride) return;
    gate_ = work.ranks.get<float>(num_slots_ * (stride + 2));
    up_ = gate_ + num_slots_ * gate_stride_;
    down_ = up_ + num_slots_ * up_stride_;
    token_ = reinterpret_cast<int32_t*>(down_ + num_slots_ * down_stride_);
    expert_ = token_ + num_slots_;
    for (int64_t s = 0; s < num_slots_; ++s) {
      token_[slots.position[s]] = static_cast<int32_t>(s / num_active);
      expert_[slots.position[s]] = expert_ids[s];
    }
  }

  bool has_down() const { return down_stride_ > 0; }

  void read_inputs(const float* x, int64_t x_dim) {
    if (gate_stride_ + up_stride_ == 0) return;
    const bool worth_sharing = num_slots_ * (gate_stride_ + up_stride_) * x_dim >= kLoraWorthSharing;
    work_.pool.for_each(num_slots_, worth_sharing, [&](int64_t s, int) {
      const ExpertLora* one = lora_of_slot(s);
      if (!one) return;
      const float* row = x + token_[s] * x_dim;
      lora_inputs(one->gate, expert_[s], 0, one->gate.a.rows, row, x_dim, 1, gate_ + s * gate_stride_, gate_stride_);
      if (!is_shared(*one))
        lora_inputs(one->up, expert_[s], 0, one->up.a.rows, row, x_dim, 1, up_ + s * up_stride_, up_stride_);
    });
  }

  void read_hidden(const float* h, int64_t hidden_dim) {
    if (!has_down()) return;
    work_.pool.for_each(num_slots_, num_slots_ * down_stride_ * hidden_dim >= kLoraWorthSharing, [&](int64_t s, int) {
      if (const ExpertLora* one = lora_of_slot(s))
        lora_inputs(one->down, expert_[s], 0, one->down.a.rows, h + s * hidden_dim, hidden_dim, 1, down_ + s * down_stride_,
                    down_stride_);
    });
  }

  // 32 rows of gate and up of the slots first .. first+count-1, each [slot][kItemRows].
  OSSIA_INLINE_MEMBER void add_to_gate_up(float* gate, float* up, int64_t item, Tile tile) const {
    if (gate_stride_ + up_stride_ == 0) return;
    for (int64_t t = 0; t < tile.count; ++t) {
      const int64_t s = tile.first + t;
      const ExpertLora* one = lora_of_slot(s);
      if (!one) continue;
      const float* gate_h = gate_ + s * gate_stride_;
      if (one->gate.rows) add_lora(one->gate, expert_[s], item, gate_h, gate + t * kItemRows, kItemRows);
      if (one->up.rows)
        add_lora(one->up, expert_[s], item, is_shared(*one) ? gate_h : up_ + s * up_stride_, up + t * kItemRows, kItemRows);
    }
  }

  OSSIA_INLINE_MEMBER void add_to_down(float* y, int64_t slot, int64_t item, int64_t count) const {
    if (!has_down()) return;
    const ExpertLora* one = lora_of_slot(slot);
    if (one && one->down.rows) add_lora(one->down, expert_[slot], item, down_ + slot * down_stride_, y, count);
  }

 private:
  // Gate and up of PEFT's adapters have one matrix a.
  OSSIA_INLINE_MEMBER static bool is_shared(const ExpertLora& one) {
    return one.up.a.data == one.gate.a.data && one.up.scale == one.gate.scale;
  }
  OSSIA_INLINE_MEMBER const ExpertLora* lora_of_slot(int64_t slot) const {
    const int32_t index = loras_.of_token[token_[slot]];
    return index < 0 ? nullptr : loras_.each[index];
  }

  Workspace& work_;
  const ExpertLoraRows& loras_;
  int64_t num_slots_, gate_stride_ = 0, up_stride_ = 0, down_stride_ = 0;
  float *gate_ = nullptr, *up_ = nullptr, *down_ = nullptr;
  int32_t *token_ = nullptr, *expert_ = nullptr;
};

void moe_pass(Workspace& work, const float* x, const int32_t* expert_ids, const float* weights, const Experts& experts,
              const ExpertLoraRows& loras, float limit, int64_t num_tokens, int64_t num_active, float* out) {
  const int64_t dim = experts.down.rows, hidden_dim = experts.gate.rows, x_dim = experts.gate.cols;
  const Slots slots = sort_slots(work.lists, expert_ids, num_tokens * num_active, experts.num_experts);
  const bool worth_sharing = slots.num_slots * 3 * hidden_dim * x_dim >= kWorthSharing;
  const Activations inputs(work.quantized, experts.gate, slots.num_slots);
  const Activations hidden(work.hidden, experts.down, slots.num_slots);
  float* outputs = work.outputs.get<float>(slots.num_slots * dim);

  SlotLoras changes(work, loras, slots, expert_ids, num_active);
  changes.read_inputs(x, x_dim);
  // What goes through the changes of down is not quantised.
  float* exact = hidden.floats;
  if (hidden.quantized && changes.has_down()) exact = work.exact.get<float>(slots.num_slots * hidden_dim);

  // Each token once, then copied to its slots.
  const int64_t x_blocks = x_dim / kBlock;
  QBlock* rows = inputs.quantized ? work.per_worker.get<QBlock>(work.pool.num_threads() * x_blocks) : nullptr;
  work.pool.for_each(num_tokens, num_tokens * x_dim >= kWorthSharing / 2, [&](int64_t t, int worker) {
    QBlock* row = rows ? rows + worker * x_blocks : nullptr;
    if (row) quantize_row(x + t * x_dim, x_blocks, experts.gate.format, row, 1);
    for (int64_t a = 0; a < num_active; ++a) {
      const int64_t slot = slots.position[t * num_active + a];
      if (!row) {
        std::memcpy(inputs.floats + slot * x_dim, x + t * x_dim, x_dim * sizeof(float));
        continue;
      }
      const int32_t expert = expert_ids[t * num_active + a];
      int64_t u = 0;
      while (slots.used[u] != expert) ++u;
      const Tile tile = tile_of(slot, slots.starts[u], slots.starts[u + 1]);
      QBlock* to = inputs.tile(tile.first) + (slot - tile.first);
      for (int64_t b = 0; b < x_blocks; ++b) to[b * tile.count] = row[b];
    }
  });

  // h[s, f] = swiglu(x[s, i] gate[e, f, i], x[s, i] up[e, f, i])
  const int64_t hidden_items = divide_up(hidden_dim, kItemRows);
  work.pool.for_each(slots.num_used * hidden_items, worth_sharing, [&](int64_t index, int) {
    const int64_t u = index / hidden_items, item = index % hidden_items, row = item * kItemRows;
    const int64_t expert = slots.used[u], count = least(kItemRows, hidden_dim - row);
    const Matrix gate = experts.gate.at(expert), up = experts.up.at(expert);
    float gate_pad[kItemRows], up_pad[kItemRows];
    const float* gate_bias = padded_bias(experts.gate_bias + expert * hidden_dim + row, count, gate_pad);
    const float* up_bias = padded_bias(experts.up_bias + expert * hidden_dim + row, count, up_pad);
    alignas(64) float gate_product[kTokenTile * kItemRows], up_product[kTokenTile * kItemRows];
    for (int64_t first = slots.starts[u]; first < slots.starts[u + 1]; first += kTokenTile) {
      const Tile tile = tile_of(first, first, slots.starts[u + 1]);
      if (count < kItemRows) {
        std::memset(gate_product, 0, sizeof gate_product);
        std::memset(up_product, 0, sizeof up_product);
      }
      gate_up_product(gate, up, item, inputs, tile, gate_product, up_product);
      changes.add_to_gate_up(gate_product, up_product, item, tile);
      for (int64_t t = 0; t < tile.count; ++t) {
        float* h = gate_product + t * kItemRows;
        for (int64_t j = 0; j < kItemRows; j += kLanes)
          store(h + j, swiglu(add(load(h + j), load(gate_bias + j)),
                              add(load(up_product + t * kItemRows + j), load(up_bias + j)), limit));
        if (hidden.quantized) quantize_block(h, experts.down.format, hidden.tile(tile.first) + item * tile.count + t);
        if (exact) std::memcpy(exact + (tile.first + t) * hidden_dim + row, h, count * sizeof(float));
      }
    }
  });

  changes.read_hidden(exact, hidden_dim);

  // y[s, d] = h[s, f] down[e, d, f] + bias
  const int64_t down_items = divide_up(dim, kItemRows);
  work.pool.for_each(slots.num_used * down_items, worth_sharing, [&](int64_t index, int) {
    const int64_t u = index / down_items, item = index % down_items, row = item * kItemRows;
    const int64_t expert = slots.used[u], count = least(kItemRows, dim - row);
    const Matrix down = experts.down.at(expert);
    const float* bias = experts.down_bias + expert * dim + row;
    alignas(64) float product[kTokenTile * kItemRows];
    for (int64_t first = slots.starts[u]; first < slots.starts[u + 1]; first += kTokenTile) {
      const Tile tile = tile_of(first, first, slots.starts[u + 1]);
      item_product(down, item, hidden, tile, product);
      for (int64_t t = 0; t < tile.count; ++t) {
        float* y = outputs + (tile.first + t) * dim + row;
        for (int64_t j = 0; j < count; ++j) y[j] = product[t * kItemRows + j] + bias[j];
        changes.add_to_down(y, tile.first + t, item, count);
      }
    }
  });

  // out[t, d] = weight[t, a] y[slot(t, a), d]
  work.pool.for_each(num_tokens, num_tokens * num_active * dim >= kWorthSharing / 2, [&](int64_t t, int) {
    float* o = out + t * dim;
    for (int64_t a = 0; a < num_active; ++a) {
      const float* y = outputs + slots.position[t * num_active + a] * dim;
      const float weight = weights[t * num_active + a];
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) {
        const Vf product = mul(set1(weight), load(y + d));
        store(o + d, a == 0 ? product : add(load(o + d), product));
      }
      for (; d < dim; ++d) o[d] = a == 0 ? weight * y[d] : o[d] + weight * y[d];
    }
  });
}

}  // namespace

void moe(Workspace& work, const float* x, const int32_t* expert_ids, const float* weights, const Experts& experts,
         const ExpertLoraRows& loras, float limit, int64_t num_tokens, int64_t num_active, float* out) {
  for (int64_t first = 0; first < num_tokens; first += kMaxTokens) {
    const ExpertLoraRows own{loras.each, loras.count, loras.of_token ? loras.of_token + first : nullptr};
    moe_pass(work, x + first * experts.gate.cols, expert_ids + first * num_active, weights + first * num_active, experts, own,
             limit, least(kMaxTokens, num_tokens - first), num_active, out + first * experts.down.rows);
  }
}

}  // namespace ossia::OSSIA_NS
