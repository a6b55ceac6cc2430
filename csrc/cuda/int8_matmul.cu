// int8 products on a GPU: the kernels of decode.cuh, tile.cuh and plain.cuh for this format.
#include "cuda/launchers.cuh"

namespace lowbit {
namespace cuda {

template cudaError_t launch_decode<8>(const MatmulPlan&, const DecodeArguments&, cudaStream_t);
template cudaError_t launch_integer<8>(const MatmulPlan&, const DecodeArguments&, cudaStream_t);
template cudaError_t launch_tile<8>(const MatmulPlan&, const TileArguments&, cudaStream_t);
template cudaError_t launch_plain<8>(const PlainArguments&, cudaStream_t);

}  // namespace cuda
}  // namespace lowbit
