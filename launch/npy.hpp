#pragma once
// Reading .npy files (NumPy's format 1, 2 and 3).

#include <torch/torch.h>

#include <string>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {

/// A C-ordered little-endian float16, float32 or bfloat16 array of two dimensions, neither of
/// them 0, as a tensor of its own dtype. bfloat16 has no name in NumPy: two opaque bytes ('V2') are
/// taken for it. Throws InvalidArgument for anything else, and for a file shorter or longer than
/// its header says.
[[nodiscard]] at::Tensor read_npy(const std::string& path);

}  // namespace lshmoe::launch
