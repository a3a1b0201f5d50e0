#include "lshmoe/kernels/checksum.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace lshmoe::kernels {
namespace {
std::uint64_t load(const unsigned char* bytes) {
  std::uint64_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}
}  // namespace

std::uint32_t checksum(const void* data, std::size_t size, std::uint64_t seed) {
  using Lanes = ChecksumLanes;
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::uint64_t lanes[4];
  for (int lane = 0; lane < 4; ++lane) lanes[lane] = Lanes::start(lane, seed);
  std::size_t left = size;
  for (; left >= 32; left -= 32, bytes += 32) {
    for (int lane = 0; lane < 4; ++lane) {
      lanes[lane] = Lanes::round(lanes[lane], load(bytes + 8 * lane));
    }
  }
  std::uint64_t hash = Lanes::fold(lanes, size);
  for (; left > 0;) {
    const std::size_t take = left < 8 ? left : 8;
    std::uint64_t value = 0;
    std::memcpy(&value, bytes, take);
    hash = Lanes::rest(hash, value);
    bytes += take;
    left -= take;
  }
  return Lanes::finish(hash);
}

std::uint32_t block_checksum(const void* data, std::size_t size, std::uint64_t seed) {
  if (size <= kChecksumBlock) return checksum(data, size, seed);
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::vector<std::uint32_t> sums;
  sums.reserve((size + kChecksumBlock - 1) / kChecksumBlock);
  for (std::size_t first = 0; first < size; first += kChecksumBlock) {
    sums.push_back(checksum(bytes + first, std::min(kChecksumBlock, size - first)));
  }
  return block_checksum(sums.data(), sums.size() * sizeof(std::uint32_t), seed);
}

}  // namespace lshmoe::kernels
