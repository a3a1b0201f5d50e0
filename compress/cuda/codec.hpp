#pragma once
// Codecs of rows in the memory of a GPU.

#include <memory>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {

/// For a context whose device is a GPU; options and context are checked. Local.
/// What the GPU's kernels do not code is copied to the host, coded by the CPU's codec and copied
/// back; CodecStats::staged_bytes counts those bytes.
/// Throws NotConfigured in a build without CUDA.
[[nodiscard]] std::shared_ptr<Codec> make_codec(const CodecOptions& options,
                                                const CodecContext& context);

}  // namespace lshmoe::cuda
