#include "lshmoe/kernels/cuda/lsh.hpp"

#include "lshmoe/kernels/cuda/launch.cuh"

#include "lshmoe/kernels/cuda/lsh.cuh"

namespace lshmoe::kernels::cuda {

void bucket_keys(std::uint64_t* keys, const float* z, std::int64_t rows, std::int64_t stride,
                 int hashes, int m, Stream stream) {
  launch("bucket_keys", bucket_keys_kernel<kBlock>, grid_for(rows, kBlock), kBlock, 0, stream, keys,
         z, rows, stride, hashes, m);
}

void segment_mean(float* out, const float* x, const std::int64_t* order,
                  const std::int64_t* offsets, std::int64_t segments, std::int64_t columns,
                  Stream stream) {
  const std::int64_t parts = (columns + kBlock - 1) / kBlock;
  launch("segment_mean", segment_mean_kernel<kBlock>, grid_for(segments * parts, 1), kBlock, 0,
         stream, out, x, order, offsets, segments, columns);
}

void half_norms(float* half_norm, const float* centroids, std::int64_t count, std::int64_t columns,
                Stream stream) {
  launch("half_norms", half_norms_kernel<kBlock>, grid_for(count, kBlock), kBlock, 0, stream,
         half_norm, centroids, count, columns);
}

void nearest_centroid(std::int32_t* id, const float* z, const float* mean, const float* centroids,
                      const float* half_norm, std::int64_t rows, std::int64_t count,
                      std::int64_t columns, Stream stream) {
  launch("nearest_centroid", nearest_centroid_kernel<kBlock>, grid_for(rows, 32), kBlock, 0, stream,
         id, z, mean, centroids, half_norm, rows, count, columns);
}

}  // namespace lshmoe::kernels::cuda
