// The table of one instruction set.
#include "attention.h"
#include "dot.h"
#include "elementwise.h"
#include "linear.h"
#include "moe.h"
#include "training.h"
#include "training_attention.h"

#define OSSIA_TEXT_OF(name) #name
#define OSSIA_TEXT(name) OSSIA_TEXT_OF(name)

namespace ossia::OSSIA_NS {

extern const Kernels kernels;
const Kernels kernels = {OSSIA_TEXT(OSSIA_NS), kTileRows, embed, rms_norm, rope, linear, moe, attention, pack_q8, dequantize,
                         rms_norm_backward, swiglu, swiglu_backward, take_rows, add_rows, round_mxfp4,
                         training_attention, training_attention_backward, integer_products};

}  // namespace ossia::OSSIA_NS
