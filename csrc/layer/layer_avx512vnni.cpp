// The layer's three kernels on AVX-512.
#include "cpu/lanes_avx512.h"
#include "layer/decode_attention.h"
#include "layer/rms_norm.h"
#include "layer/silu_mul.h"

namespace lowbit {
using Lanes = LanesAvx512;

LOWBIT_BY_DTYPE(rms_norm__avx512vnni, rms_norm, RmsNorm)
LOWBIT_BY_DTYPE(silu_mul__avx512vnni, silu_mul, SiluMul)
LOWBIT_BY_DTYPE(decode_attention__avx512vnni, decode_attention, lowbit_decode_step)

}  // namespace lowbit
