// Device memory in a build without CUDA.

#include <utility>

#include "lshmoe/comm/cuda/device.hpp"
#include "lshmoe/comm/cuda/staging.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {
namespace {
constexpr const char* kWhy = "this lshmoe was built without CUDA";
[[noreturn]] void refuse() {
  throw NotConfigured(detail::message("memory of a GPU (", kWhy,
                                      "): rebuild with -DLSHMOE_CUDA=ON, or stay on the CPU"));
}
}  // namespace

bool configured() { return false; }
VisibleDevices visible_devices() {
  return {0, detail::message(kWhy, ": rebuild with -DLSHMOE_CUDA=ON")};
}
std::array<std::uint8_t, 16> device_uuid(int /*device*/) { refuse(); }
void use_device(int /*device*/) { refuse(); }
void check(int /*code*/, const char* /*what*/) { refuse(); }

PinnedBuffer::~PinnedBuffer() = default;
PinnedBuffer::PinnedBuffer(PinnedBuffer&& /*other*/) noexcept {}
PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& /*other*/) noexcept { return *this; }
std::byte* PinnedBuffer::get(std::size_t /*bytes*/) { refuse(); }

Staging::Staging() { refuse(); }
Staging::~Staging() = default;
void Staging::wait() { refuse(); }
std::byte* Staging::to_host(const void* /*device*/, std::size_t /*bytes*/,
                            kernels::cuda::Stream /*stream*/) {
  refuse();
}
std::byte* Staging::room(std::size_t /*bytes*/) { refuse(); }
void Staging::to_device(void* /*device*/, const std::byte* /*host*/, std::size_t /*bytes*/,
                        kernels::cuda::Stream /*stream*/) {
  refuse();
}

}  // namespace lshmoe::cuda
