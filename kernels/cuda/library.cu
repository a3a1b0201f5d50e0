// What CUB and cuBLAS do. The tests on the host have standard algorithms in place of this file.

#include <cublas_v2.h>

#include <thrust/iterator/counting_iterator.h>
#include <cub/device/device_radix_sort.cuh>

#include "lshmoe/kernels/cuda/launch.cuh"
#include "lshmoe/kernels/cuda/lsh.hpp"

namespace lshmoe::kernels::cuda {
namespace {
void check_blas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw CudaError(lshmoe::detail::message(what, ": ", cublasGetStatusString(status),
                                          " (cuBLAS error ", static_cast<int>(status), ")"));
}

__global__ void count_up(std::int64_t* out, std::int64_t count) {
  const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    out[i] = i;
  }
}

std::size_t rounded(std::int64_t rows) {
  return (static_cast<std::size_t>(rows) * 8 + 255) / 256 * 256;
}
}  // namespace

Product::Product() {
  cublasHandle_t handle = nullptr;
  check_blas(cublasCreate(&handle), "cublasCreate");
  handle_ = handle;
  // fp32 sums of fp32 products: rows are grouped by the result.
  check_blas(cublasSetMathMode(handle, CUBLAS_PEDANTIC_MATH), "cublasSetMathMode");
}
Product::~Product() { cublasDestroy(static_cast<cublasHandle_t>(handle_)); }

void Product::operator()(float* out, const float* x, const float* matrix, std::int64_t rows,
                         std::int64_t inner, std::int64_t columns, Stream stream) const {
  if (rows == 0 || columns == 0) return;
  auto* handle = static_cast<cublasHandle_t>(handle_);
  const float one = 1, zero = 0;
  check_blas(cublasSetStream(handle, stream), "cublasSetStream");
  // Column-major: the transposed product of the transposed.
  check_blas(cublasSgemm_64(handle, CUBLAS_OP_N, CUBLAS_OP_N, columns, rows, inner, &one, matrix,
                            columns, x, inner, &zero, out, columns),
             "cublasSgemm");
}

std::size_t sort_scratch(std::int64_t rows) {
  std::size_t bytes = 0;
  check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<const std::uint64_t*>(nullptr),
                                        static_cast<std::uint64_t*>(nullptr),
                                        static_cast<const std::int64_t*>(nullptr),
                                        static_cast<std::int64_t*>(nullptr), rows, 0, 64),
        "sort_by_key");
  return rounded(rows) + bytes;
}

void sort_by_key(std::int64_t* order, std::uint64_t* sorted, const std::uint64_t* keys,
                 std::int64_t rows, int bits, void* scratch, std::size_t scratch_bytes,
                 Stream stream) {
  if (rows == 0) return;
  auto* numbers = static_cast<std::int64_t*>(scratch);
  std::size_t bytes = scratch_bytes - rounded(rows);
  launch("count_up", count_up, grid_for(rows, 256), 256, 0, stream, numbers, rows);
  check(cub::DeviceRadixSort::SortPairs(static_cast<char*>(scratch) + rounded(rows), bytes, keys,
                                        sorted, numbers, order, rows, 0, bits, stream),
        "sort_by_key");
}

}  // namespace lshmoe::kernels::cuda
