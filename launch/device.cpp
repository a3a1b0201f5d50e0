#include "lshmoe/launch/device.hpp"

#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdlib>

#include "lshmoe/comm/cuda/device.hpp"
#include "lshmoe/comm/nccl/communicator.hpp"
#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/log.hpp"

namespace lshmoe::launch {
namespace {

/// Equal bits in every run. Before the first use of cuBLAS, which reads the variable then.
void be_reproducible() {
  ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
  // Not warnings only: attention would then take its other algorithms.
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  // It would fill every new tensor, to show reads of memory that nobody wrote.
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

}  // namespace

void resolve_device(const Session& session, TrainOptions& options) {
  if (options.device == "cpu") {
    options.comm_backend = "mpi";
    return;
  }
  const DeviceChoice choice = session.choose_device(options.share_gpu);
  const bool found = choice.problem.empty();
  // What was asked for by name must be there.
  LSHMOE_VALIDATE(
      found || (options.device == "auto" && options.comm_backend != "nccl" && !options.share_gpu),
      choice.problem);
  if (!found && session.world()->rank() == 0 && cuda::visible_devices().count > 0) {
    log_warn("device auto takes the CPU: " + choice.problem);
  }
  options.device = found ? "cuda" : "cpu";
  if (options.comm_backend == "auto") {
    options.comm_backend = found && nccl_configured() && !options.share_gpu ? "nccl" : "mpi";
  }
  if (found) be_reproducible();
}

std::shared_ptr<Communicator> training_world(const Session& session, const TrainOptions& options) {
  return options.comm_backend == "nccl" ? make_nccl_communicator(session.world()) : session.world();
}

at::Device device_of(const TrainOptions& options) {
  if (options.device != "cuda") return at::kCPU;
  return c10::impl::VirtualGuardImpl(at::kCUDA).getDevice();
}

at::Tensor on_device(const at::Tensor& windows, at::Device device) {
  if (device.is_cpu()) return windows;
  return windows.pin_memory().to(device, /*non_blocking=*/true);
}

}  // namespace lshmoe::launch
