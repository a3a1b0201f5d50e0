#pragma once
// kind lsh: clusters by cross-polytope hashing, residuals within a hard bound. codec.md, steps 1-8.

#include <cstdint>
#include <memory>
#include <vector>

#include "lshmoe/compress/codec.hpp"

namespace lshmoe {

/// For kind lsh, both kinds of restore. Local.
[[nodiscard]] std::shared_ptr<Codec> make_lsh_codec(const CodecOptions& options,
                                                    const CodecContext& context);

/// R [hidden_size, projection] of one layer, row-major: a function of (seed, layer) and the sizes
/// alone, the same bits on every rank and machine.
[[nodiscard]] std::vector<float> projection_matrix(const CodecOptions& options,
                                                   std::int64_t hidden_size, std::int64_t layer);

}  // namespace lshmoe
