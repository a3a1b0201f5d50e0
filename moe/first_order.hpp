#pragma once
// Nodes whose backward is no differentiable function itself.

#include <torch/torch.h>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// First line of such a backward. Throws InvalidArgument when a graph of it is asked for: its
/// second derivatives would silently be wrong.
inline void check_first_order() {
  LSHMOE_VALIDATE(!at::GradMode::is_enabled(),
                  "second derivatives of an MoE layer are asked for (its backward builds no "
                  "graph): call backward without create_graph");
}

}  // namespace lshmoe
