#pragma once
// Collectives of device memory against what they must give, for any backend.

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <span>
#include <vector>

#include "lshmoe/comm/communicator.hpp"

namespace lshmoe::testing {

/// The CPU stands for a GPU where its functions are pretended (nccl_on_host_test.cpp).
inline DeviceStream current_stream(const at::Device& device) {
  if (device.is_cpu()) return {};
  return {static_cast<kernels::cuda::Stream>(
      c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle())};
}

inline at::Tensor bytes_of_pair(int from, int to, std::int64_t count) {
  return (at::arange(count, at::kLong) * 3 + (31 * from + 7 * to + 1)).remainder(251).to(at::kByte);
}

/// Twice in a row without a wait between: the second must not disturb the first.
template <class SizeOf>
void check_device_all_to_all_v(Communicator& comm, at::Device device, SizeOf size_of) {
  std::vector<std::int64_t> send_bytes, recv_bytes;
  std::vector<at::Tensor> send, expected;
  for (int r = 0; r < comm.size(); ++r) {
    send_bytes.push_back(size_of(comm.rank(), r));
    recv_bytes.push_back(size_of(r, comm.rank()));
    send.push_back(bytes_of_pair(comm.rank(), r, send_bytes.back()));
    expected.push_back(bytes_of_pair(r, comm.rank(), recv_bytes.back()));
  }
  const at::Tensor whole = at::cat(expected);
  const at::Tensor from = at::cat(send).to(device), again = from + 1;
  at::Tensor to = at::zeros({whole.numel()}, from.options()), to_again = at::zeros_like(to);
  const Traffic before = comm.traffic(Purpose::dispatch);
  for (const auto& [in, out] : {std::pair(from, to), std::pair(again, to_again)}) {
    comm.all_to_all_v(in.const_data_ptr(), send_bytes, out.data_ptr(), recv_bytes,
                      Purpose::dispatch, current_stream(device));
  }
  EXPECT_TRUE(at::equal(to.cpu(), whole));
  EXPECT_TRUE(at::equal(to_again.cpu(), whole + 1));
  const Traffic after = comm.traffic(Purpose::dispatch);
  const auto own = static_cast<std::uint64_t>(send_bytes[static_cast<std::size_t>(comm.rank())]);
  EXPECT_EQ(after.bytes_sent - before.bytes_sent,
            2 * (static_cast<std::uint64_t>(from.numel()) - own));
  EXPECT_EQ(after.bytes_received - before.bytes_received,
            2 * (static_cast<std::uint64_t>(whole.numel()) - own));
}

/// The bits that host memory gives.
template <class T>
void check_device_all_reduce(Communicator& comm, at::Device device, std::int64_t count) {
  const auto dtype = c10::CppTypeToScalarType<T>::value;
  at::Generator stream = at::make_generator<at::CPUGeneratorImpl>(
      static_cast<std::uint64_t>(17 * comm.rank() + count % 1000));
  at::Tensor host = at::empty({count}, dtype).uniform_(-1, 1, stream);
  at::Tensor data = host.to(device, /*non_blocking=*/false, /*copy=*/true);
  const auto span = [&](at::Tensor& tensor) {
    return std::span(tensor.data_ptr<T>(), static_cast<std::size_t>(count));
  };
  comm.all_reduce(span(data), Purpose::gradients, current_stream(device));
  comm.all_reduce(span(host), ReduceOp::sum, Purpose::gradients);
  EXPECT_TRUE(at::equal(data.cpu(), host)) << count << " elements";
}

inline void check_device_broadcast(Communicator& comm, at::Device device, std::int64_t count) {
  for (int root = 0; root < comm.size(); ++root) {
    const at::Tensor expected = bytes_of_pair(root, 0, count);
    at::Tensor data = comm.rank() == root ? expected.to(device, false, true)
                                          : at::zeros({count}, at::dtype(at::kByte).device(device));
    comm.broadcast(data.data_ptr(), static_cast<std::size_t>(count), root, Purpose::control,
                   current_stream(device));
    EXPECT_TRUE(at::equal(data.cpu(), expected)) << "root " << root;
  }
}

inline void check_device_collectives(Communicator& comm, at::Device device) {
  const c10::DeviceGuard guard(device);
  check_device_all_to_all_v(comm, device, [](int from, int to) { return 5 * from + 3 * to + 1; });
  check_device_all_to_all_v(comm, device, [](int, int) { return 0; });
  // Some pairs send nothing, some much.
  check_device_all_to_all_v(comm, device,
                            [](int from, int to) { return (from + to) % 2 == 0 ? 0 : 3'000'001; });
  check_device_all_to_all_v(comm, device, [](int, int to) { return to == 0 ? 70'001 : 0; });
  for (const std::int64_t count : {0, 1, 1000, 1024, 5000, 100'003}) {
    check_device_all_reduce<float>(comm, device, count);
    check_device_all_reduce<double>(comm, device, count);
  }
  // More than one piece of the nccl backend's.
  check_device_all_reduce<float>(comm, device, 20'000'011);
  for (const std::int64_t count : {0, 1, 1'000'003}) check_device_broadcast(comm, device, count);
}

}  // namespace lshmoe::testing
