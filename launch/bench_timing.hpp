#pragma once
// Timing of lshmoe-bench: medians, the clock on the wall, events on a GPU's stream.

#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

namespace lshmoe::launch {

/// Runs `part` on a GPU and returns the seconds between two events around it on the stream.
template <class Part>
double stream_time(Part part, at::Device device) {
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  c10::Event begin(device.type(), c10::EventFlag::BACKEND_DEFAULT);
  c10::Event end(device.type(), c10::EventFlag::BACKEND_DEFAULT);
  begin.record(stream);
  part();
  end.record(stream);
  end.synchronize();
  return 1e-3 * begin.elapsedTime(end);
}
/// Runs `part` and returns its seconds, by the clock on the wall. On a GPU: stream_time.
template <class Part>
double wall_time(Part part, at::Device device) {
  if (!device.is_cpu()) return stream_time(part, device);
  const auto start = std::chrono::steady_clock::now();
  part();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace lshmoe::launch
