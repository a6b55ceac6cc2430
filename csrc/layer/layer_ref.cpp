// The layer's three kernels on plain C++.
#include "cpu/lanes_ref.h"
#include "layer/decode_attention.h"
#include "layer/rms_norm.h"
#include "layer/silu_mul.h"

namespace lowbit {
using Lanes = LanesRef;

LOWBIT_BY_DTYPE(rms_norm__ref, rms_norm, RmsNorm)
LOWBIT_BY_DTYPE(silu_mul__ref, silu_mul, SiluMul)
LOWBIT_BY_DTYPE(decode_attention__ref, decode_attention, lowbit_decode_step)

}  // namespace lowbit
