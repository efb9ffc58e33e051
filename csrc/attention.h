#pragma once

#include "kernels.h"

namespace ossia::OSSIA_NS {

void attention(Workspace&, const AttentionArgs&);

}  // namespace ossia::OSSIA_NS
