#pragma once
// Random streams of the initial weights: named by numbers, so that no layout changes them.

#include <torch/torch.h>

#include <cstdint>
#include <initializer_list>

namespace lshmoe {

/// A generator whose stream depends only on the numbers given, e.g. {seed, layer, expert}. CPU.
[[nodiscard]] at::Generator make_stream(std::initializer_list<uint64_t> name);

/// A new fp32 tensor of U(-1/sqrt(fan_in), 1/sqrt(fan_in)), drawn from `stream`.
[[nodiscard]] at::Tensor uniform_fan_in(at::IntArrayRef sizes, int64_t fan_in,
                                        at::Generator& stream);

}  // namespace lshmoe
