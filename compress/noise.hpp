#pragma once
// Noise of stochastic rounding: a function of the seed, the place and the row, so that equal input
// gives equal bytes.

#include <array>
#include <cstddef>
#include <cstdint>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/kernels/checksum.hpp"
#include "lshmoe/kernels/formats.hpp"

namespace lshmoe {

/// The stream of one direction of one layer.
inline std::uint64_t noise_stream(std::uint64_t seed, const CodecContext& context) {
  const std::array<std::uint64_t, 2> place{static_cast<std::uint64_t>(context.layer),
                                           static_cast<std::uint64_t>(context.direction)};
  const std::uint64_t low = kernels::checksum(place.data(), sizeof place, seed);
  return low | std::uint64_t{kernels::checksum(place.data(), sizeof place, ~seed)} << 32;
}

/// The key of one row: equal rows get equal noise.
inline kernels::NoiseKey noise_key(std::uint64_t stream, const void* row, std::size_t bytes) {
  const std::uint32_t low = kernels::checksum(row, bytes, stream);
  return {low, kernels::checksum(&low, sizeof low, ~stream)};
}

}  // namespace lshmoe
