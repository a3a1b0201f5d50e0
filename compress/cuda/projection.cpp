#include "lshmoe/compress/cuda/projection.hpp"

#include <algorithm>

#include "lshmoe/compress/cuda/support.hpp"
#include "lshmoe/compress/lsh_codec.hpp"

namespace lshmoe::cuda {

template <class T>
at::Tensor Projection::operator()(const launchers::RowsOf<T>& rows, at::Device device) const {
  const std::int64_t columns = options_.projection(), hidden = rows.hidden;
  const launchers::Stream stream = current_stream(device);
  const std::lock_guard lock(mutex_);
  if (!product_) product_ = std::make_unique<launchers::Product>();
  if (!matrix_.defined()) {
    matrix_ = upload(projection_matrix(options_, hidden, context_.layer), device);
    wait_for_stream(device);  // any stream may use it
  }
  // As fp32, some rows at a time. All of them in one product size, so that equal rows get equal
  // products in every call.
  constexpr std::int64_t kChunk = 4096;
  at::Tensor z = room<float>(rows.rows * columns, device);
  at::Tensor wide;
  if (sizeof(T) == 2 || rows.index != nullptr) {
    wide = room<float>(std::min(kChunk, rows.rows) * hidden, device);
  }
  for (std::int64_t first = 0; first < rows.rows; first += kChunk) {
    const std::int64_t count = std::min(kChunk, rows.rows - first);
    const float* x = as<const float>(wide);
    if (wide.defined()) {
      launchers::widen_rows<T>(as<float>(wide), rows, first, count, stream);
    } else if constexpr (sizeof(T) == 4) {
      x = rows.x + first * hidden;
    }
    (*product_)(as<float>(z) + first * columns, x, as<const float>(matrix_), count, hidden, columns,
                stream);
  }
  return z;
}

void Projection::multiply(const at::Tensor& out, const at::Tensor& x, const at::Tensor& matrix,
                          std::int64_t rows, std::int64_t inner, std::int64_t columns) const {
  const std::lock_guard lock(mutex_);
  if (!product_) product_ = std::make_unique<launchers::Product>();
  (*product_)(as<float>(out), as<const float>(x), as<const float>(matrix), rows, inner, columns,
              current_stream(out.device()));
}

template at::Tensor Projection::operator()<float>(const launchers::RowsOf<float>&,
                                                  at::Device) const;
template at::Tensor Projection::operator()<kernels::Bfloat16>(
    const launchers::RowsOf<kernels::Bfloat16>&, at::Device) const;

}  // namespace lshmoe::cuda
