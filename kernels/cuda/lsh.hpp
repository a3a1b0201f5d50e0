#pragma once
// kernels/lsh.hpp on the GPU. Launchers (stream.hpp); the same bits as on the CPU for equal input.

#include <cstdint>

#include "lshmoe/kernels/cuda/stream.hpp"

namespace lshmoe::kernels::cuda {

/// out [rows, columns] = x [rows, inner] matrix [inner, columns], in fp32 without TF32. The order
/// of the sums is the library's: other bits than the CPU's. Owns a cuBLAS handle.
class Product {
 public:
  Product();
  ~Product();
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;
  void operator()(float* out, const float* x, const float* matrix, std::int64_t rows,
                  std::int64_t inner, std::int64_t columns, Stream stream) const;

 private:
  void* handle_ = nullptr;
};

/// keys [rows] of z [rows, stride].
void bucket_keys(std::uint64_t* keys, const float* z, std::int64_t rows, std::int64_t stride,
                 int hashes, int m, Stream stream);

/// Bytes of scratch that sort_by_key takes for `rows` keys.
std::size_t sort_scratch(std::int64_t rows);
/// order [rows]: the rows by ascending key, equal keys in row order; sorted [rows]: their keys.
/// Keys are below 2^bits, bits 1 to 64.
void sort_by_key(std::int64_t* order, std::uint64_t* sorted, const std::uint64_t* keys,
                 std::int64_t rows, int bits, void* scratch, std::size_t scratch_bytes,
                 Stream stream);

/// out [segments, columns], as kernels::segment_mean.
void segment_mean(float* out, const float* x, const std::int64_t* order,
                  const std::int64_t* offsets, std::int64_t segments, std::int64_t columns,
                  Stream stream);

/// half_norm [count]: |c|^2 / 2 of centroids [count, columns].
void half_norms(float* half_norm, const float* centroids, std::int64_t count, std::int64_t columns,
                Stream stream);
/// id [rows]: 1 + the centroid nearest to z less mean (null: z); 0 where the origin is as near or
/// nearer. As kernels::nearest_centroid with or_none.
void nearest_centroid(std::int32_t* id, const float* z, const float* mean, const float* centroids,
                      const float* half_norm, std::int64_t rows, std::int64_t count,
                      std::int64_t columns, Stream stream);

}  // namespace lshmoe::kernels::cuda
