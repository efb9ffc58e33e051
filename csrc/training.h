#pragma once

#include "kernels.h"

namespace ossia::OSSIA_NS {

void rms_norm_backward(Workspace&, const float* x, const float* scale, float eps, const float* g, int64_t num_tokens,
                       int64_t dim, float* dx, float* dscale);
void swiglu(Workspace&, const Rows& gate_up, float limit, int64_t rows, int64_t dim, const Rows& inner);
void swiglu_backward(Workspace&, const Rows& gate_up, const Rows& dinner, const float* weights, float limit, int64_t rows,
                     int64_t dim, const Rows& dpre, float* dots);
void take_rows(Workspace&, const Rows& source, const int64_t* indices, const float* weights, int64_t count,
               int64_t num_out, int64_t dim, const Rows& out);
void add_rows(Workspace&, const Rows& rows, const int64_t* indices, const float* weights, int64_t count, int64_t dim,
              float* out);
void round_mxfp4(Workspace&, const float* x, int64_t num_blocks, float* out);

}  // namespace ossia::OSSIA_NS
