#pragma once
// The order of the channels in which residuals are coded, and how it travels: as every channel's
// band.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Channels by falling energy, cut into bands, ascending within a band. Empty when there is one
/// band only. energy [hidden].
[[nodiscard]] std::vector<std::int32_t> order_by_energy(const std::vector<float>& energy);

/// Bytes of an order of `hidden` channels in `bands` bands.
[[nodiscard]] std::size_t order_bytes(std::int64_t hidden, std::int64_t bands);
/// Writes an order as order_by_energy gives it to order_bytes at `out`.
void write_order(std::uint8_t* out, const std::vector<std::int32_t>& order, std::int64_t bands);
/// The inverse. Throws InvalidArgument for bytes that write_order never writes.
[[nodiscard]] std::vector<std::int32_t> read_order(const std::uint8_t* in, std::int64_t hidden,
                                                   std::int64_t bands);

}  // namespace lshmoe
