// Ternary products on a GPU: integer_product.cuh on tensor cores, plain.cuh without.
#include "cuda/launchers.cuh"

namespace lowbit {
namespace cuda {

template cudaError_t launch_integer<kTrit>(const MatmulPlan&, const DecodeArguments&, cudaStream_t);
template cudaError_t launch_plain<kTrit>(const PlainArguments&, cudaStream_t);

}  // namespace cuda
}  // namespace lowbit
