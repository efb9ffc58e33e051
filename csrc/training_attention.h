#pragma once

#include "kernels.h"

namespace ossia::OSSIA_NS {

void training_attention(Workspace&, const TrainingAttention& args);
void training_attention_backward(Workspace&, const TrainingAttention& args);

}  // namespace ossia::OSSIA_NS
