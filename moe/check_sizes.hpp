#pragma once
// A parameter's sizes before it is used: torch::load gives it those of the file, whatever they are.

#include <ATen/core/Tensor.h>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Throws InvalidArgument naming both sizes where `tensor` has not the sizes `wanted`.
inline void check_sizes(const char* name, const at::Tensor& tensor, at::IntArrayRef wanted) {
  LSHMOE_VALIDATE(tensor.sizes() == wanted, name, " is ", tensor.sizes(), ", but this layer's is ",
                  wanted,
                  " (were its parameters loaded from a file of another ep_size, or of another "
                  "model?): load a file that this layer's options and ep_size wrote");
}

}  // namespace lshmoe
