#pragma once

#include "kernels.h"

namespace ossia::OSSIA_NS {

void embed(Workspace&, const Matrix& table, const int32_t* ids, int64_t num_tokens, float* out);
void rms_norm(Workspace&, const float* x, const float* scale, float eps, int64_t num_tokens, int64_t dim, float* out);
void dequantize(Workspace&, const Matrix& source, float* floats, uint16_t* bf16);
void rope(Workspace&, const Rows& x, const float* cos, const float* sin, int64_t num_tokens, int64_t heads, int64_t dim,
          const Rows& out);

}  // namespace ossia::OSSIA_NS
