#include "lshmoe/moe/layer_number.hpp"

#include <atomic>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
std::atomic<std::int64_t>& next_drawn() {
  static std::atomic<std::int64_t> next{kDrawnLayers};
  return next;
}
}  // namespace

void validate_layer_number(std::optional<std::int64_t> number) {
  LSHMOE_VALIDATE(!number || (*number >= 0 && *number < next_drawn()), "layer is ", *number,
                  " (must be 0 .. 2^31 - 1; unset, each layer gets a number of its own)");
}

std::int64_t layer_number(std::optional<std::int64_t> given) {
  validate_layer_number(given);
  return given ? *given : next_drawn()++;
}

}  // namespace lshmoe
