// int2 products on a GPU: the kernels of decode.cuh, tile.cuh and plain.cuh for this format.
#include "cuda/launchers.cuh"

namespace lowbit {
namespace cuda {

template cudaError_t launch_decode<2>(const MatmulPlan&, const DecodeArguments&, cudaStream_t);
template cudaError_t launch_integer<2>(const MatmulPlan&, const DecodeArguments&, cudaStream_t);
template cudaError_t launch_tile<2>(const MatmulPlan&, const TileArguments&, cudaStream_t);
template cudaError_t launch_plain<2>(const PlainArguments&, cudaStream_t);

}  // namespace cuda
}  // namespace lowbit
