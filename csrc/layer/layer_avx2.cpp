// The layer's three kernels on AVX2.
#include "cpu/lanes_avx2.h"
#include "layer/decode_attention.h"
#include "layer/rms_norm.h"
#include "layer/silu_mul.h"

namespace lowbit {
using Lanes = LanesAvx2;

LOWBIT_BY_DTYPE(rms_norm__avx2, rms_norm, RmsNorm)
LOWBIT_BY_DTYPE(silu_mul__avx2, silu_mul, SiluMul)
LOWBIT_BY_DTYPE(decode_attention__avx2, decode_attention, lowbit_decode_step)

}  // namespace lowbit
