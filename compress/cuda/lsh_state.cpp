#include "lshmoe/compress/cuda/lsh_state.hpp"

#include <algorithm>

#include "lshmoe/kernels/cuda/lsh.hpp"

namespace lshmoe::cuda {
namespace {

/// The matrix as it was before it was packed: its products with unit vectors.
at::Tensor unpacked(const kernels::PackedMatrix& matrix, at::Device device) {
  const at::Tensor unit = at::eye(matrix.inner(), at::kFloat);
  at::Tensor out = at::empty({matrix.inner(), matrix.columns()}, at::kFloat);
  matrix.multiply(out.mutable_data_ptr<float>(), unit.const_data_ptr<float>(), matrix.inner());
  return out.to(device);
}

}  // namespace

DeviceState DeviceStates::get(const LearnedState& state, std::int64_t projection,
                              at::Device device) const {
  const std::lock_guard lock(mutex_);
  for (const DeviceState& known : known_) {
    if (known.version == state.version) return known;
  }
  DeviceState made;
  made.version = state.version;
  made.centroids = state.centroids;
  const bool basis = state.basis.defined();
  made.bases = upload(basis ? state.bases : state.ordered_bases, device);
  if (basis) {
    made.to_coefficients = unpacked(state.to_coefficients, device);
    made.to_residual = unpacked(state.to_residual, device);
    made.stretch = state.stretch;
  } else if (!state.order.empty()) {
    std::vector<std::int32_t> place(state.order.size());
    for (std::size_t j = 0; j < place.size(); ++j) {
      place[static_cast<std::size_t>(state.order[j])] = static_cast<std::int32_t>(j);
    }
    made.order = upload(state.order, device);
    made.place = upload(place, device);
  }
  made.mean_z = upload(state.mean_z, device);
  made.centroids_z = upload(state.centroids_z, device);
  made.half_norms = room<float>(state.centroids, device);
  launchers::half_norms(as<float>(made.half_norms), as<const float>(made.centroids_z),
                        state.centroids, projection, current_stream(device));
  wait_for_stream(device);
  known_.push_back(made);
  return made;
}

void DeviceStates::forget_oldest() {
  const std::lock_guard lock(mutex_);
  if (known_.size() < 2) return;
  known_.erase(std::min_element(
      known_.begin(), known_.end(),
      [](const DeviceState& a, const DeviceState& b) { return a.version < b.version; }));
}

}  // namespace lshmoe::cuda
