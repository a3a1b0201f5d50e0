#pragma once
// What library.cpp registers. One file does it all, in one order: a kernel can be registered only
// after the class its arguments name, and the order of different files' initializers is open.

#include <torch/library.h>

namespace lshmoe::ops {

// For the CPU and for CUDA: they look at their rows' device.
void register_dispatch(torch::Library& library);
void register_combine(torch::Library& library);
void register_swap_rows(torch::Library& library);
void register_codec(torch::Library& library);
void register_autograd(torch::Library& library);

}  // namespace lshmoe::ops
