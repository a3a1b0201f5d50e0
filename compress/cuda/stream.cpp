#include <c10/cuda/CUDAStream.h>

#include "lshmoe/compress/cuda/support.hpp"

namespace lshmoe::cuda {

launchers::Stream current_stream(at::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

}  // namespace lshmoe::cuda
