#pragma once

#include "kernels.h"

namespace ossia::OSSIA_NS {

void linear(Workspace&, const float* x, const Matrix& weight, const float* bias, const LoraRows& loras,
            int64_t num_tokens, float* out);
void pack_q8(Workspace&, const Matrix& source, int64_t first_row, int8_t* data, uint16_t* scales);

}  // namespace ossia::OSSIA_NS
