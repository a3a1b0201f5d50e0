#include "lshmoe/moe/device_rows.hpp"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>

#include "lshmoe/kernels/cuda/combine.hpp"
#include "lshmoe/kernels/cuda/rows.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

/// uint8 [bytes] that the GPU copies to and from by itself.
at::Tensor pinned(int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions(at::kByte).pinned_memory(true));
}

const int64_t* data(const at::Tensor& index) { return index.const_data_ptr<int64_t>(); }
const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

}  // namespace

kernels::RowType row_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return kernels::RowType::f32;
    case at::kBFloat16:
      return kernels::RowType::bf16;
    case at::kDouble:
      return kernels::RowType::f64;
    default:
      throw InvalidArgument(
          detail::message("rows of dtype ", dtype, " (use float32, bfloat16 or float64)"));
  }
}

DeviceStream current_stream(at::Device device) {
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  return {static_cast<kernels::cuda::Stream>(stream.native_handle())};
}

std::vector<at::Tensor> to_device(const std::vector<at::Tensor>& vectors, at::Device device) {
  if (device.is_cpu()) return vectors;
  int64_t count = 0;
  for (const at::Tensor& vector : vectors) count += vector.numel();
  const at::Tensor host = pinned(count * 8);
  auto* to = static_cast<std::byte*>(host.mutable_data_ptr());
  for (const at::Tensor& vector : vectors) {
    if (vector.numel() > 0) std::memcpy(to, vector.const_data_ptr(), vector.nbytes());
    to += vector.nbytes();
  }
  // The allocator of pinned memory keeps `host` until the copy has run.
  const at::Tensor all = host.view(at::kLong).to(device, /*non_blocking=*/true);
  std::vector<at::Tensor> copies;
  int64_t first = 0;
  for (const at::Tensor& vector : vectors) {
    copies.push_back(all.narrow(0, first, vector.numel()));
    first += vector.numel();
  }
  return copies;
}

std::vector<at::Tensor> to_host(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> parts, copies;
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.is_cpu())
      parts.push_back(tensor.detach().contiguous().reshape({-1}).view(at::kByte));
  }
  at::Tensor host;
  if (!parts.empty()) {
    const at::Tensor all = at::cat(parts);
    host = pinned(all.numel());
    host.copy_(all, /*non_blocking=*/true);
    c10::impl::VirtualGuardImpl(all.device().type()).getStream(all.device()).synchronize();
  }
  int64_t first = 0;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.is_cpu()) {
      copies.push_back(tensor.detach().contiguous());
      continue;
    }
    const auto bytes = static_cast<int64_t>(tensor.nbytes());
    // A copy: a part may stand where its dtype must not.
    at::Tensor copy = at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
    if (bytes > 0) {
      std::memcpy(copy.mutable_data_ptr(),
                  static_cast<const std::byte*>(host.const_data_ptr()) + first,
                  static_cast<std::size_t>(bytes));
    }
    first += bytes;
    copies.push_back(copy);
  }
  return copies;
}

void copy_rows(at::Tensor& to, const at::Tensor& to_index, const at::Tensor& from,
               const at::Tensor& from_index) {
  const int64_t rows = to_index.numel();
  if (rows == 0) return;
  const std::size_t row_bytes =
      static_cast<std::size_t>(to.size(1)) * static_cast<std::size_t>(to.element_size());
  if (to.is_cpu()) {
    auto* out = static_cast<std::byte*>(to.mutable_data_ptr());
    const auto* in = static_cast<const std::byte*>(from.const_data_ptr());
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(out + static_cast<std::size_t>(data(to_index)[i]) * row_bytes,
                  in + static_cast<std::size_t>(data(from_index)[i]) * row_bytes, row_bytes);
    }
    return;
  }
  const c10::DeviceGuard guard(to.device());
  const auto index = to_device({to_index, from_index}, to.device());
  const kernels::cuda::Stream stream = current_stream(to.device()).handle;
  at::Tensor picked = at::empty({rows, to.size(1)}, to.options());
  kernels::cuda::gather_rows(picked.mutable_data_ptr(), from.const_data_ptr(), data(index[1]), rows,
                             row_bytes, stream);
  kernels::cuda::scatter_rows(to.mutable_data_ptr(), data(index[0]), picked.const_data_ptr(), rows,
                              row_bytes, stream);
}

at::Tensor segment_sum(const at::Tensor& in, const at::Tensor& offset, const at::Tensor& index,
                       const at::Tensor& weight) {
  const int64_t segments = offset.size(0) - 1, hidden = in.size(1);
  at::Tensor out = at::empty({segments, hidden}, in.options());
  const kernels::RowType type = row_type(in.scalar_type());
  if (in.is_cpu()) {
    kernels::segment_sum(type, out.mutable_data_ptr(), in.const_data_ptr(), hidden, data(offset),
                         segments, data(index), data_or_null(weight));
  } else {
    const c10::DeviceGuard guard(in.device());
    kernels::cuda::segment_sum(type, out.mutable_data_ptr(), in.const_data_ptr(), hidden,
                               data(offset), segments, data(index), data_or_null(weight),
                               current_stream(in.device()).handle);
  }
  return out;
}

void segment_sum_backward(at::Tensor& grad_in, at::Tensor& grad_weight, const at::Tensor& grad_out,
                          const at::Tensor& in, const at::Tensor& offset, const at::Tensor& index,
                          const at::Tensor& weight) {
  const int64_t segments = offset.size(0) - 1, hidden = in.size(1);
  const kernels::RowType type = row_type(in.scalar_type());
  if (in.is_cpu()) {
    kernels::segment_sum_backward(type, grad_in.mutable_data_ptr(), grad_weight.mutable_data_ptr(),
                                  grad_out.const_data_ptr(), in.const_data_ptr(), hidden,
                                  data(offset), segments, data(index), data_or_null(weight));
  } else {
    const c10::DeviceGuard guard(in.device());
    kernels::cuda::segment_sum_backward(
        type, grad_in.mutable_data_ptr(), grad_weight.mutable_data_ptr(), grad_out.const_data_ptr(),
        in.const_data_ptr(), hidden, data(offset), segments, data(index), data_or_null(weight),
        current_stream(in.device()).handle);
  }
}

}  // namespace lshmoe
