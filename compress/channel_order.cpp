#include "lshmoe/compress/channel_order.hpp"

#include <algorithm>
#include <bit>
#include <numeric>

#include "lshmoe/kernels/bands.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
int class_bits(std::int64_t bands) {
  return static_cast<int>(std::bit_width(static_cast<std::uint64_t>(bands - 1)));
}
}  // namespace

std::vector<std::int32_t> order_by_energy(const std::vector<float>& energy) {
  if (energy.size() <= kernels::kBandValues) return {};
  std::vector<std::int32_t> order(energy.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return energy[static_cast<std::size_t>(a)] > energy[static_cast<std::size_t>(b)];
  });
  for (std::size_t band = 0; band < order.size(); band += kernels::kBandValues) {
    std::sort(order.begin() + static_cast<std::ptrdiff_t>(band),
              order.begin() +
                  static_cast<std::ptrdiff_t>(std::min(order.size(), band + kernels::kBandValues)));
  }
  return order;
}

std::size_t order_bytes(std::int64_t hidden, std::int64_t bands) {
  return static_cast<std::size_t>((hidden * class_bits(bands) + 7) / 8);
}

void write_order(std::uint8_t* out, const std::vector<std::int32_t>& order, std::int64_t bands) {
  std::vector<std::uint32_t> band(order.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    band[static_cast<std::size_t>(order[i])] = static_cast<std::uint32_t>(i / kernels::kBandValues);
  }
  const int bits = class_bits(bands);
  std::uint64_t word = 0;
  int filled = 0;
  for (const std::uint32_t value : band) {
    word |= std::uint64_t{value} << filled;
    for (filled += bits; filled >= 8; filled -= 8, word >>= 8)
      *out++ = static_cast<std::uint8_t>(word);
  }
  if (filled > 0) *out = static_cast<std::uint8_t>(word);
}

std::vector<std::int32_t> read_order(const std::uint8_t* in, std::int64_t hidden,
                                     std::int64_t bands) {
  const int bits = class_bits(bands);
  std::vector<std::int32_t> next(static_cast<std::size_t>(bands));
  for (std::size_t band = 0; band < next.size(); ++band) {
    next[band] = static_cast<std::int32_t>(band) * kernels::kBandValues;
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(hidden));
  std::uint64_t word = 0;
  int filled = 0;
  for (std::int64_t channel = 0; channel < hidden; ++channel) {
    for (; filled < bits; filled += 8) word |= std::uint64_t{*in++} << filled;
    const std::uint64_t band = word & ((std::uint64_t{1} << bits) - 1);
    word >>= bits;
    filled -= bits;
    LSHMOE_VALIDATE(band < static_cast<std::uint64_t>(bands),
                    "decode: a channel's band does not exist (damaged parcel)");
    const std::int64_t end = std::min<std::int64_t>(
        hidden, (static_cast<std::int64_t>(band) + 1) * kernels::kBandValues);
    LSHMOE_VALIDATE(next[band] < end, "decode: a band has too many channels (damaged parcel)");
    order[static_cast<std::size_t>(next[band]++)] = static_cast<std::int32_t>(channel);
  }
  return order;
}

}  // namespace lshmoe
