#include "lshmoe/kernels/checksum.hpp"

#include <cstring>

namespace lshmoe::kernels {
namespace {
constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9u;

std::uint64_t rotate(std::uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

std::uint64_t load(const unsigned char* bytes) {
  std::uint64_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

std::uint64_t round(std::uint64_t lane, std::uint64_t value) {
  return rotate(lane + value * kPrime2, 31) * kPrime1;
}
}  // namespace

std::uint32_t checksum(const void* data, std::size_t size, std::uint64_t seed) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::uint64_t lanes[4] = {seed + kPrime1 + kPrime2, seed + kPrime2, seed, seed - kPrime1};
  std::size_t left = size;
  for (; left >= 32; left -= 32, bytes += 32) {
    for (int lane = 0; lane < 4; ++lane) lanes[lane] = round(lanes[lane], load(bytes + 8 * lane));
  }
  std::uint64_t hash = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) +
                       rotate(lanes[3], 18) + size;
  for (; left > 0;) {
    const std::size_t take = left < 8 ? left : 8;
    std::uint64_t value = 0;
    std::memcpy(&value, bytes, take);
    hash = rotate(hash ^ round(0, value), 27) * kPrime1 + kPrime3;
    bytes += take;
    left -= take;
  }
  hash = (hash ^ hash >> 33) * kPrime2;
  hash = (hash ^ hash >> 29) * kPrime3;
  return static_cast<std::uint32_t>(hash ^ hash >> 32);
}

}  // namespace lshmoe::kernels
