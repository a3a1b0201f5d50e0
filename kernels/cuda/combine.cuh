#pragma once
// segment_sum and its gradients.

#include "lshmoe/kernels/combine.hpp"
#include "lshmoe/kernels/cuda/vector.cuh"

namespace lshmoe::kernels::cuda {

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(Bfloat16 value) { return to_float(value); }
template <class T, class A>
__device__ inline T narrow(A value) {
  if constexpr (sizeof(T) == 2) {
    return to_bfloat16(value);
  } else {
    return value;
  }
}

/// A block a segment; a thread sums kValues neighboring columns at a time.
template <class T, class A, int kValues>
__global__ void segment_sum_kernel(T* out, const T* in, std::int64_t hidden,
                                   const std::int64_t* offset, std::int64_t segments,
                                   const std::int64_t* index, const A* weight) {
  for (std::int64_t s = blockIdx.x; s < segments; s += gridDim.x) {
    const std::int64_t first = offset[s], last = offset[s + 1];
    const bool copy = last - first == 1 && weight == nullptr;
    for (std::int64_t c = threadIdx.x * kValues; c < hidden; c += blockDim.x * kValues) {
      A total[kValues] = {};
      Vector<T, kValues> values{};
      for (std::int64_t j = first; j < last; ++j) {
        const std::int64_t row = index != nullptr ? index[j] : j;
        values = load<kValues>(in + row * hidden + c);
        const A w = weight != nullptr ? weight[row] : A(1);
        for (int i = 0; i < kValues; ++i) total[i] += w * widen(values.value[i]);
      }
      if (!copy) {
        for (int i = 0; i < kValues; ++i) values.value[i] = narrow<T, A>(total[i]);
      }
      store(out + s * hidden + c, values);
    }
  }
}

/// A block a segment: for each of its rows <grad_out[s], in[r]> and weight[r] * grad_out[s].
template <class T, class A, int kValues>
__global__ void segment_sum_backward_kernel(T* grad_in, A* grad_weight, const T* grad_out,
                                            const T* in, std::int64_t hidden,
                                            const std::int64_t* offset, std::int64_t segments,
                                            const std::int64_t* index, const A* weight) {
  __shared__ A part[kBlock / 32];
  for (std::int64_t s = blockIdx.x; s < segments; s += gridDim.x) {
    const T* grad = grad_out + s * hidden;
    for (std::int64_t j = offset[s]; j < offset[s + 1]; ++j) {
      const std::int64_t row = index != nullptr ? index[j] : j;
      const A w = weight != nullptr ? weight[row] : A(1);
      A dot = 0;
      for (std::int64_t c = threadIdx.x * kValues; c < hidden; c += blockDim.x * kValues) {
        const Vector<T, kValues> g = load<kValues>(grad + c);
        if (grad_weight != nullptr) {
          const Vector<T, kValues> x = load<kValues>(in + row * hidden + c);
          for (int i = 0; i < kValues; ++i) dot += widen(g.value[i]) * widen(x.value[i]);
        }
        if (grad_in != nullptr) {
          Vector<T, kValues> out;
          for (int i = 0; i < kValues; ++i) out.value[i] = narrow<T, A>(w * widen(g.value[i]));
          store(grad_in + row * hidden + c, out);
        }
      }
      if (grad_weight == nullptr) continue;
      for (int half = 16; half > 0; half /= 2) dot += __shfl_down_sync(kAllLanes, dot, half);
      if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = dot;
      __syncthreads();
      if (threadIdx.x == 0) {
        A sum = 0;
        for (int i = 0; i < kBlock / 32; ++i) sum += part[i];
        grad_weight[row] = sum;
      }
      __syncthreads();
    }
  }
}

}  // namespace lshmoe::kernels::cuda
