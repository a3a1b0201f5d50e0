#pragma once
// Which device and which transport a run takes.

#include <torch/torch.h>

#include <memory>

#include "lshmoe/comm/session.hpp"
#include "lshmoe/launch/train_options.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {

/// Sets options.device to cpu or cuda and options.comm_backend to mpi or nccl. With cuda, takes
/// this rank's GPU, and sets torch to algorithms that give equal bits in every run. Options as
/// validated. Throws InvalidArgument, the same on all ranks, where a rank finds no GPU that was
/// asked for. Collective over the session's world.
void resolve_device(const Session& session, TrainOptions& options);

/// The world whose groups the model is made for: the session's, or nccl over it. Local.
[[nodiscard]] std::shared_ptr<Communicator> training_world(const Session& session,
                                                           const TrainOptions& options);

/// Where model and data are: the CPU, or the current GPU. Local.
[[nodiscard]] at::Device device_of(const TrainOptions& options);

/// `windows` (CPU) there: a GPU copies them from pinned memory while the host goes on. Local.
[[nodiscard]] at::Tensor on_device(const at::Tensor& windows, at::Device device);

}  // namespace lshmoe::launch
