#pragma once
// kinds fp8, int8 and int4: fixed formats, the same number of bytes for every row.

#include <memory>

#include "lshmoe/compress/codec.hpp"

namespace lshmoe {

/// For kinds fp8 (e4m3, an fp32 scale per 128 elements), int8 (an fp32 scale a row) and int4
/// (rotated by Hadamard matrices of 128, a bfloat16 scale each). Local.
[[nodiscard]] std::shared_ptr<Codec> make_format_codec(const CodecOptions& options,
                                                       const CodecContext& context);

}  // namespace lshmoe
