#include "lshmoe/kernels/cuda/combine.hpp"

#include "lshmoe/kernels/cuda/launch.cuh"

#include "lshmoe/kernels/cuda/combine.cuh"

namespace lshmoe::kernels::cuda {
namespace {

/// Calls f(element, accumulator, values at a time).
template <class F>
void with_types(RowType type, bool aligned, F f) {
  const auto with = [&](auto row, auto accumulate) {
    constexpr int kValues = 16 / sizeof(row);
    if (aligned) {
      f(row, accumulate, std::integral_constant<int, kValues>{});
    } else {
      f(row, accumulate, std::integral_constant<int, 1>{});
    }
  };
  switch (type) {
    case RowType::f32:
      return with(float{}, float{});
    case RowType::bf16:
      return with(Bfloat16{}, float{});
    case RowType::f64:
      return with(double{}, double{});
  }
}

std::size_t bytes_of(RowType type) {
  return type == RowType::f32 ? 4 : type == RowType::bf16 ? 2 : 8;
}

}  // namespace

void segment_sum(RowType type, void* out, const void* in, std::int64_t hidden,
                 const std::int64_t* offset, std::int64_t segments, const std::int64_t* index,
                 const void* weight, Stream stream) {
  const auto row_bytes = static_cast<std::size_t>(hidden) * bytes_of(type);
  with_types(type, aligned16(row_bytes, out, in), [&](auto row, auto accumulate, auto values) {
    using T = decltype(row);
    using A = decltype(accumulate);
    launch("segment_sum", segment_sum_kernel<T, A, values()>, grid_for(segments, 1), kBlock, 0,
           stream, static_cast<T*>(out), static_cast<const T*>(in), hidden, offset, segments, index,
           static_cast<const A*>(weight));
  });
}

void segment_sum_backward(RowType type, void* grad_in, void* grad_weight, const void* grad_out,
                          const void* in, std::int64_t hidden, const std::int64_t* offset,
                          std::int64_t segments, const std::int64_t* index, const void* weight,
                          Stream stream) {
  const auto row_bytes = static_cast<std::size_t>(hidden) * bytes_of(type);
  with_types(type, aligned16(row_bytes, grad_in, grad_out, in),
             [&](auto row, auto accumulate, auto values) {
               using T = decltype(row);
               using A = decltype(accumulate);
               launch("segment_sum_backward", segment_sum_backward_kernel<T, A, values()>,
                      grid_for(segments, 1), kBlock, 0, stream, static_cast<T*>(grad_in),
                      static_cast<A*>(grad_weight), static_cast<const T*>(grad_out),
                      static_cast<const T*>(in), hidden, offset, segments, index,
                      static_cast<const A*>(weight));
             });
}

}  // namespace lshmoe::kernels::cuda
