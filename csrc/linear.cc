// out[t, o] = x[t, i] w[o, i] + bias[o] + the change of the token's adapter, for quantised and float weights; and packing
// of 8-bit weights.
//
// Q8: 32 inputs of a row share a float16 scale, values round(w / scale) in -127 .. 127 (the arithmetic of GGUF's Q8_0).
#include "linear.h"

#include "dot.h"
#include "lora.h"

namespace ossia::OSSIA_NS {
namespace {

constexpr int64_t kWorthSharing = 1 << 17;  // multiply-accumulates; some 3 microseconds
constexpr int64_t kLoraWorthSharing = 1 << 14;
constexpr int64_t kItemRows = 32;           // rows of a piece of work
static_assert(kItemRows == kLoraRows);

// h[t, r] of every token whose adapter changes this matrix.
class LoraInputs {
 public:
  LoraInputs(Workspace& work, const float* x, int64_t cols, const LoraRows& loras, int64_t num_tokens) : loras_(loras) {
    if (!loras.each) return;
    for (int64_t i = 0; i < loras.count; ++i)
      if (loras.each[i]) stride_ = greatest(stride_, loras.each[i]->a.rows);
    if (!stride_) return;
    h_ = work.ranks.get<float>(num_tokens * stride_);
    const int64_t rank_items = divide_up(stride_, kLoraRanks);
    const bool worth_sharing = num_tokens * stride_ * cols >= kLoraWorthSharing;
    work.pool.for_each(divide_up(num_tokens, kLoraTokens) * rank_items, worth_sharing, [&](int64_t item, int) {
      const int64_t rank = item % rank_items * kLoraRanks;
      const int64_t end = least(num_tokens, (item / rank_items + 1) * kLoraTokens);
      int64_t next;
      for (int64_t t = item / rank_items * kLoraTokens; t < end; t = next) {
        for (next = t + 1; next < end && loras.of_token[next] == loras.of_token[t];) ++next;
        const Lora* lora = lora_of(loras, t);
        if (lora && rank < lora->a.rows)
          lora_inputs(*lora, 0, rank, least(kLoraRanks, lora->a.rows - rank), x + t * cols, cols, next - t, h_ + t * stride_,
                      stride_);
      }
    });
  }

  // Rows 32 item .. 32 item + count-1 of the tokens first .. first+num_tokens-1; `out` is the first of them.
  OSSIA_INLINE_MEMBER void add_to(float* out, int64_t out_stride, int64_t item, int64_t count, int64_t first,
                                  int64_t num_tokens) const {
    if (!h_) return;
    for (int64_t t = first; t < first + num_tokens; ++t)
      if (const Lora* lora = lora_of(loras_, t))
        add_lora(*lora, 0, item, h_ + t * stride_, out + (t - first) * out_stride, count);
  }

 private:
  const LoraRows& loras_;
  int64_t stride_ = 0;
  float* h_ = nullptr;
};

void quantized_linear(Workspace& work, const float* x, const Matrix& w, const float* bias, const LoraRows& loras,
                      int64_t num_tokens, float* out) {
  const LoraInputs changes(work, x, w.cols, loras, num_tokens);
  const int64_t num_blocks = w.cols / kBlock;
  const bool worth_sharing = num_tokens * w.rows * w.cols >= kWorthSharing;
  QBlock* quantized = work.quantized.get<QBlock>(num_tokens * num_blocks);
  const auto token_tile = [&](int64_t first) { return least<int64_t>(kTokenTile, num_tokens - first); };
  work.pool.for_each(num_tokens, num_tokens * w.cols >= kWorthSharing / 2, [&](int64_t t, int) {
    const int64_t first = t / kTokenTile * kTokenTile;
    quantize_row(x + t * w.cols, num_blocks, w.format, quantized + first * num_blocks + (t - first), token_tile(first));
  });
  const int64_t num_tiles = num_row_tiles(w), tiles_per_item = kItemRows / kTileRows;
  work.pool.for_each(divide_up(num_tiles, tiles_per_item), worth_sharing, [&](int64_t item, int) {
    for (int64_t first = 0; first < num_tokens; first += kTokenTile) {
      const int64_t count = token_tile(first), end_tile = least(num_tiles, (item + 1) * tiles_per_item);
      for_tiles(w, item * tiles_per_item, end_tile, quantized + first * num_blocks, count, [&](int64_t tile, const float* sums) {
        const RowTile rows = row_tile(w, tile);
        for (int64_t t = 0; t < count; ++t)
          for (int lane = rows.first_lane; lane < rows.end_lane; ++lane) {
            const int64_t row = rows.first_row + lane;
            const float sum = sums[t * kTileRows + lane];
            out[(first + t) * w.rows + row] = bias ? sum + bias[row] : sum;
          }
      });
      const int64_t row = item * kItemRows;
      changes.add_to(out + first * w.rows + row, w.rows, item, least(kItemRows, w.rows - row), first, count);
    }
  });
}

void float_linear(Workspace& work, const float* x, const Matrix& w, const float* bias, const LoraRows& loras,
                  int64_t num_tokens, float* out) {
  const LoraInputs changes(work, x, w.cols, loras, num_tokens);
  const bool worth_sharing = num_tokens * w.rows * w.cols >= kWorthSharing;
  work.pool.for_each(divide_up(w.rows, kItemRows), worth_sharing, [&](int64_t item, int) {
    const int64_t row = item * kItemRows, count = least(kItemRows, w.rows - row);
    // A few tokens at a time, so that they stay in the nearest cache while the rows pass by.
    for (int64_t first = 0; first < num_tokens; first += 12)
      float_rows(w, row, count, x + first * w.cols, w.cols, least<int64_t>(12, num_tokens - first),
                 out + first * w.rows + row, w.rows);
    for (int64_t t = 0; bias && t < num_tokens; ++t)
      for (int64_t j = row; j < row + count; ++j) out[t * w.rows + j] += bias[j];
    changes.add_to(out + row, w.rows, item, count, 0, num_tokens);
  });
}

// 32 numbers of a row to integers and a scale.
void pack_block(const Matrix& source, int64_t row, int64_t b, int8_t* q, uint16_t* scale) {
  const uint8_t* from = source.data + row * source.row_stride;
  if (source.format == Format::kQ8) {
    std::memcpy(q, from + b * source.block_stride, kBlock);
    *scale = load_u16(source.scales + row * source.scale_row_stride + b * source.scale_block_stride);
    return;
  }
  float x[kBlock];
  for (int i = 0; i < kBlock; i += kLanes) {
    const int64_t at = b * kBlock + i;
    switch (source.format) {
      case Format::kF32: store(x + i, Numbers<Format::kF32>::vector(from + at * 4)); break;
      case Format::kBf16: store(x + i, Numbers<Format::kBf16>::vector(from + at * 2)); break;
      default: store(x + i, Numbers<Format::kF16>::vector(from + at * 2)); break;
    }
  }
  uint32_t top = 0;
  for (int i = 0; i < kBlock; ++i) top = greatest(top, bits_as<uint32_t>(x[i]) & 0x7fffffffu);
  std::memset(q, 0, kBlock);
  // What no float16 scale can express is NaN for everyone to see.
  *scale = top >= 0x7f800000u ? 0x7e00 : float_to_half(bits_as<float>(top) / 127.0f);
  if (*scale >= 0x7c00) *scale = 0x7e00;
  if (*scale == 0 || *scale == 0x7e00) return;
  // Divided by the scale as it was rounded; that may leave the largest number a little above 127.
  const float inverse = 1.0f / half_to_float(*scale);
  int32_t rounded[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const float limited = least(127.0f, greatest(-127.0f, x[i] * inverse));
    rounded[i] = bits_as<int32_t>(limited + 12582912.0f) - 0x4b400000;
  }
  for (int i = 0; i < kBlock; ++i) q[i] = static_cast<int8_t>(rounded[i]);
}

}  // namespace

void linear(Workspace& work, const float* x, const Matrix& w, const float* bias, const LoraRows& loras, int64_t num_tokens,
            float* out) {
  if (is_quantized(w.format)) {
    quantized_linear(work, x, w, bias, loras, num_tokens, out);
  } else {
    float_linear(work, x, w, bias, loras, num_tokens, out);
  }
}

void pack_q8(Workspace& work, const Matrix& source, int64_t first_row, int8_t* data, uint16_t* scales) {
  const int64_t num_blocks = source.cols / kBlock, num_tiles = divide_up(source.rows, kTileRows);
  const int64_t first_tile = first_row / kTileRows;
  work.pool.for_each(num_tiles, true, [&](int64_t tile, int) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t at = (first_tile + tile) * num_blocks + b;
      int8_t* to = data + at * kTileRows * kBlock;
      for (int lane = 0; lane < kTileRows; ++lane) {
        int8_t q[kBlock] = {};
        uint16_t scale = 0;
        const int64_t row = tile * kTileRows + lane;
        if (row < source.rows) pack_block(source, row, b, q, &scale);
        scales[at * kTileRows + lane] = scale;
        for (int g = 0; g < kBlock / 4; ++g) std::memcpy(to + (g * kTileRows + lane) * 4, q + 4 * g, 4);
      }
    }
  });
}

}  // namespace ossia::OSSIA_NS
