#pragma once
// A limit on how much of a GPU the kernels take.

namespace lshmoe::kernels::cuda {

/// Blocks that a launch has at most; the kernels loop over the rest. Results do not depend on it.
/// For a part of the multiprocessors: their number times 8 or so. 0: no limit. For the process.
void set_grid_limit(int blocks);

}  // namespace lshmoe::kernels::cuda
