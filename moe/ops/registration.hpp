#pragma once
// What library.cpp registers. One file does it all, in one order: a kernel can be registered only
// after the class its arguments name, and the order of different files' initialisers is open.

#include <torch/library.h>

namespace lshmoe::ops {

void register_dispatch_cpu(torch::Library& library);
void register_combine_cpu(torch::Library& library);
void register_swap_rows_cpu(torch::Library& library);
void register_codec_cpu(torch::Library& library);
void register_autograd(torch::Library& library);

}  // namespace lshmoe::ops
