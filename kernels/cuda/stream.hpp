#pragma once
// What every launcher takes last: the CUDA stream that its kernels are queued on.
//
// Launchers return before the kernels have run; pointers are device memory and must live until
// then. They throw CudaError when a launch is refused, and NotConfigured in a build without CUDA.

struct CUstream_st;

#include "lshmoe/runtime/error.hpp"

namespace lshmoe::kernels::cuda {

/// A cudaStream_t; null is the default stream.
using Stream = CUstream_st*;

}  // namespace lshmoe::kernels::cuda
