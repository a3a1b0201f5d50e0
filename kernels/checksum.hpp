#pragma once
// Checksum of parcels.

#include <cstddef>
#include <cstdint>

namespace lshmoe::kernels {

/// 32 bits over `size` bytes: four 64-bit lanes in the manner of xxHash64, folded. Finds damage on
/// the way, not forgery. The same on every machine (bytes are read little-endian).
[[nodiscard]] std::uint32_t checksum(const void* data, std::size_t size, std::uint64_t seed = 0);

}  // namespace lshmoe::kernels
