#pragma once

#include "kernels.h"

namespace ossia::OSSIA_NS {

void moe(Workspace&, const float* x, const int32_t* expert_ids, const float* weights, const Experts& experts,
         const ExpertLoraRows& loras, float limit, int64_t num_tokens, int64_t num_active, float* out);

}  // namespace ossia::OSSIA_NS
