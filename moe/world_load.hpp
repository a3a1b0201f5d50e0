#pragma once
// Counts of choices, summed over ranks.

#include <ATen/ATen.h>

#include <cstdint>
#include <span>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/comm/keep_buffer.hpp"

namespace lshmoe {

/// The sum over `world` of counts, int64 [n] on any device; on the CPU. Collective.
inline at::Tensor sum_over(Communicator& world, const at::Tensor& counts) {
  at::Tensor sum = counts.to(at::kCPU, at::kLong, /*non_blocking=*/false, /*copy=*/true);
  keep_buffer_on_error(sum, [&] {
    world.all_reduce(std::span(sum.data_ptr<int64_t>(), static_cast<std::size_t>(sum.numel())),
                     ReduceOp::sum, Purpose::control);
  });
  return sum;
}

}  // namespace lshmoe
