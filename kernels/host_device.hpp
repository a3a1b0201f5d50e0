#pragma once
// Marks the element functors that .cu files share with the CPU loops.

#if defined(__CUDACC__)
#define LSHMOE_HOST_DEVICE __host__ __device__
#else
#define LSHMOE_HOST_DEVICE
#endif
