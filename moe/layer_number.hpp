#pragma once
// Numbers of layers: they separate random streams, and name a layer in error texts.

#include <cstdint>
#include <optional>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Throws InvalidArgument for a number that is neither 0 .. 2^31 - 1 nor drawn before.
void validate_layer_number(std::optional<std::int64_t> number);

/// `given`; or, where there is none, a number that no layer has had and none can be given
/// (kDrawnLayers and up, in the order of the calls in this process). So every rank must make its
/// layers in the same order; the first exchange of two that are not the same is refused.
/// Thread-safe. Throws as validate_layer_number.
[[nodiscard]] std::int64_t layer_number(std::optional<std::int64_t> given);

/// The options with a layer number.
template <class Options>
[[nodiscard]] Options numbered(Options options) {
  options.layer(layer_number(options.layer()));
  return options;
}

}  // namespace lshmoe
