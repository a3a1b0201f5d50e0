#include "lshmoe/kernels/cuda/basis.hpp"

#include "lshmoe/kernels/cuda/launch.cuh"

#include "lshmoe/kernels/cuda/basis.cuh"

namespace lshmoe::kernels::cuda {

template <class T>
void basis_residuals(float* out, const RowsOf<T>& rows, std::int64_t first, std::int64_t count,
                     std::int64_t stride, const CodedGroup* groups, std::int64_t group_count,
                     const float* bases, const std::int32_t* id, Stream stream) {
  launch("basis_residuals", basis_residuals_kernel<T, kBlock>, grid_for(count, 1), kBlock, 0,
         stream, out, rows, first, count, stride, groups, group_count, bases, id);
}

void coefficient_bounds(double* coded, const double* bound, const double* squared, double stretch,
                        bool to_bfloat16, std::int64_t rows, std::int64_t hidden, Stream stream) {
  launch("coefficient_bounds", coefficient_bounds_kernel<kBlock>, grid_for(rows, kBlock), kBlock, 0,
         stream, coded, bound, squared, stretch, to_bfloat16, rows, hidden);
}
void coefficient_errors(double* error, const double* bound, const double* squared,
                        const std::uint8_t* whole, double stretch, bool to_bfloat16,
                        std::int64_t rows, std::int64_t hidden, Stream stream) {
  launch("coefficient_errors", coefficient_errors_kernel<kBlock>, grid_for(rows, kBlock), kBlock, 0,
         stream, error, bound, squared, whole, stretch, to_bfloat16, rows, hidden);
}

template <class T>
void add_bases(T* out, const std::int64_t* index, const float* residual,
               const std::int32_t* base_id, const CodedGroup* groups, std::int64_t group_count,
               std::int64_t rows, std::int64_t hidden, Stream stream) {
  launch("add_bases", add_bases_kernel<T, kBlock>, grid_for(rows, 1), kBlock, 0, stream, out, index,
         residual, base_id, groups, group_count, rows, hidden);
}

#define LSHMOE_INSTANTIATE(T)                                                                   \
  template void basis_residuals<T>(float*, const RowsOf<T>&, std::int64_t, std::int64_t,        \
                                   std::int64_t, const CodedGroup*, std::int64_t, const float*, \
                                   const std::int32_t*, Stream);                                \
  template void add_bases<T>(T*, const std::int64_t*, const float*, const std::int32_t*,        \
                             const CodedGroup*, std::int64_t, std::int64_t, std::int64_t, Stream);
LSHMOE_INSTANTIATE(float)
LSHMOE_INSTANTIATE(Bfloat16)
#undef LSHMOE_INSTANTIATE

}  // namespace lshmoe::kernels::cuda
