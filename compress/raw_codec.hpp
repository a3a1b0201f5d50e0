#pragma once
// kind none: rows in their dtype. kind bf16: rows rounded to bfloat16.

#include <memory>

#include "lshmoe/compress/codec.hpp"

namespace lshmoe {

/// For kinds none and bf16. Local.
[[nodiscard]] std::shared_ptr<Codec> make_raw_codec(const CodecOptions& options,
                                                    const CodecContext& context);

}  // namespace lshmoe
