// The codecs of a GPU in a build without CUDA.

#include "lshmoe/compress/cuda/codec.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {

std::shared_ptr<Codec> make_codec(const CodecOptions& /*options*/, const CodecContext& context) {
  throw NotConfigured(detail::message("codec on device ", context.device,
                                      " (this lshmoe was built without CUDA): rebuild with "
                                      "-DLSHMOE_CUDA=ON, or keep the rows on the CPU"));
}

}  // namespace lshmoe::cuda
