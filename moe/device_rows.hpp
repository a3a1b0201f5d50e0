#pragma once
// Rows and their numbers on either device: the CPU's loops, or the GPU's kernels on the current
// stream. Nothing here waits for a GPU but to_host.

#include <torch/torch.h>

#include <vector>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/kernels/combine.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Throws InvalidArgument for a dtype that is none of rows.
[[nodiscard]] kernels::RowType row_type(at::ScalarType dtype);

/// The stream that torch queues work of a GPU on.
[[nodiscard]] DeviceStream current_stream(at::Device device);

/// int64 vectors of the CPU on `device`, by one copy that nothing waits for; on the CPU themselves.
[[nodiscard]] std::vector<at::Tensor> to_device(const std::vector<at::Tensor>& vectors,
                                                at::Device device);
/// Tensors of any shape and dtype on the CPU, contiguous; those of a GPU (all of one, if any) by
/// one copy that is waited for.
[[nodiscard]] std::vector<at::Tensor> to_host(const std::vector<at::Tensor>& tensors);

/// to[to_index[i]] = from[from_index[i]]; rows of equal length and dtype on one device, indices
/// int64 on the CPU. The rows read and those written may be of one tensor, if they are not the
/// same.
void copy_rows(at::Tensor& to, const at::Tensor& to_index, const at::Tensor& from,
               const at::Tensor& from_index);

/// See kernels::segment_sum. offset and index are on the rows' device; weight undefined: ones.
[[nodiscard]] at::Tensor segment_sum(const at::Tensor& in, const at::Tensor& offset,
                                     const at::Tensor& index, const at::Tensor& weight);
/// See kernels::segment_sum_backward; likewise.
void segment_sum_backward(at::Tensor& grad_in, at::Tensor& grad_weight, const at::Tensor& grad_out,
                          const at::Tensor& in, const at::Tensor& offset, const at::Tensor& index,
                          const at::Tensor& weight);

}  // namespace lshmoe
