// The nccl backend in a build without NCCL or CUDA.

#include "lshmoe/comm/nccl/communicator.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

std::shared_ptr<Communicator> make_nccl_communicator(std::shared_ptr<Communicator> /*control*/) {
  throw NotConfigured(
      "the nccl backend (this lshmoe was built without NCCL or without CUDA): rebuild with "
      "-DLSHMOE_CUDA=ON where NCCL is found, or use the mpi backend");
}

bool nccl_configured() { return false; }

}  // namespace lshmoe
