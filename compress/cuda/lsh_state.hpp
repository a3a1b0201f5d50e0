#pragma once
// Learned states of kind lsh in device memory.

#include <cstdint>
#include <mutex>
#include <vector>

#include "lshmoe/compress/cuda/support.hpp"
#include "lshmoe/compress/learned_state.hpp"

namespace lshmoe::cuda {

/// A learned state in device memory.
struct DeviceState {
  std::uint32_t version = 0;
  std::int64_t centroids = 0;
  at::Tensor bases, order, place, mean_z, centroids_z, half_norms;
  // With a basis: its bases are in the channels' own order, and there is no other.
  at::Tensor to_coefficients, to_residual;
  double stretch = 1;
  [[nodiscard]] bool has_basis() const { return to_residual.defined(); }
};

/// The states that a codec still needs. Thread-safe.
class DeviceStates {
 public:
  /// The state on the device, copied there when first asked for: then it waits for the stream, so
  /// that any stream may use it. projection: columns of z.
  [[nodiscard]] DeviceState get(const LearnedState& state, std::int64_t projection,
                                at::Device device) const;
  /// After a refresh: a codec knows two versions.
  void forget_oldest();

 private:
  mutable std::mutex mutex_;
  mutable std::vector<DeviceState> known_;
};

}  // namespace lshmoe::cuda
