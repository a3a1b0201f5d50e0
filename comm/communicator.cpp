#include "lshmoe/comm/communicator.hpp"

#include <numeric>

#include "lshmoe/comm/cuda/staging.hpp"
#include "lshmoe/comm/keep_buffer.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
void check_root(const Communicator& comm, int root) {
  LSHMOE_VALIDATE(root >= 0 && root < comm.size(), "root ", root, " is no rank of '", comm.name(),
                  "' (", detail::counted(comm.size(), "rank"), "): pass 0 .. ", comm.size() - 1);
}
}  // namespace

std::string_view name_of(Purpose purpose) {
  switch (purpose) {
    case Purpose::control:
      return "control";
    case Purpose::plan:
      return "plan";
    case Purpose::dispatch:
      return "dispatch";
    case Purpose::combine:
      return "combine";
    case Purpose::combine_backward:
      return "combine_backward";
    case Purpose::dispatch_backward:
      return "dispatch_backward";
    case Purpose::gradients:
      return "gradients";
    case Purpose::codec_state:
      return "codec_state";
    case Purpose::checkpoint:
      return "checkpoint";
    case Purpose::count_:
      break;
  }
  return "unknown";
}

Communicator::Communicator() = default;
Communicator::~Communicator() = default;

Communicator::Turn::Turn(const Communicator& comm) {
  if (comm.size() == 1) {
    lock_ = std::unique_lock(comm.turn_);
    return;
  }
  // One for all communicators: MPI, too, is used by one thread at a time.
  static std::recursive_mutex several;
  lock_ = std::unique_lock(several, std::try_to_lock);
  LSHMOE_VALIDATE(lock_.owns_lock(),
                  "two threads of this rank are in collectives of several ranks "
                  "at a time, one of them of '",
                  comm.name(),
                  "' (the other ranks could not follow the order of their calls): call them from "
                  "one thread");
}

std::shared_ptr<Communicator> Communicator::split(int color, int key, const std::string& name) {
  LSHMOE_VALIDATE(color >= 0, "color ", color, " of split '", name,
                  "' is negative (every rank joins a group): number the groups from 0");
  const Turn turn(*this);
  return do_split(color, key, name);
}

void Communicator::barrier(Purpose purpose) {
  const Turn turn(*this);
  do_barrier(purpose);
}

void Communicator::all_reduce(std::span<float> data, ReduceOp op, Purpose purpose) {
  const Turn turn(*this);
  do_all_reduce(data.data(), data.size(), Element::f32, op, purpose);
}
void Communicator::all_reduce(std::span<double> data, ReduceOp op, Purpose purpose) {
  const Turn turn(*this);
  do_all_reduce(data.data(), data.size(), Element::f64, op, purpose);
}
void Communicator::all_reduce(std::span<std::int64_t> data, ReduceOp op, Purpose purpose) {
  const Turn turn(*this);
  do_all_reduce(data.data(), data.size(), Element::i64, op, purpose);
}

void Communicator::all_reduce(std::span<float> data, Purpose purpose, DeviceStream stream) {
  const Turn turn(*this);
  do_device_all_reduce(data.data(), data.size(), Element::f32, purpose, stream);
}
void Communicator::all_reduce(std::span<double> data, Purpose purpose, DeviceStream stream) {
  const Turn turn(*this);
  do_device_all_reduce(data.data(), data.size(), Element::f64, purpose, stream);
}

void Communicator::broadcast(void* data, std::size_t bytes, int root, Purpose purpose) {
  check_root(*this, root);
  const Turn turn(*this);
  do_broadcast(data, bytes, root, purpose);
}
void Communicator::broadcast(void* data, std::size_t bytes, int root, Purpose purpose,
                             DeviceStream stream) {
  check_root(*this, root);
  const Turn turn(*this);
  do_device_broadcast(data, bytes, root, purpose, stream);
}

std::vector<std::vector<std::byte>> Communicator::gather(std::span<const std::byte> data, int root,
                                                         Purpose purpose) {
  check_root(*this, root);
  const Turn turn(*this);
  return do_gather(data, root, purpose);
}

void Communicator::all_to_all(const void* send, void* recv, std::size_t bytes_per_rank,
                              Purpose purpose) {
  const Turn turn(*this);
  do_all_to_all(send, recv, bytes_per_rank, purpose);
}

void Communicator::all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes,
                                void* recv, std::span<const std::int64_t> recv_bytes,
                                Purpose purpose) {
  check_sizes(send_bytes, recv_bytes);
  const Turn turn(*this);
  do_all_to_all_v(send, send_bytes, recv, recv_bytes, purpose);
}

void Communicator::all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes,
                                void* recv, std::span<const std::int64_t> recv_bytes,
                                Purpose purpose, DeviceStream stream) {
  check_sizes(send_bytes, recv_bytes);
  const Turn turn(*this);
  do_device_all_to_all_v(send, send_bytes, recv, recv_bytes, purpose, stream);
}

void Communicator::check_sizes(std::span<const std::int64_t> send_bytes,
                               std::span<const std::int64_t> recv_bytes) const {
  const auto ranks = static_cast<std::size_t>(size());
  LSHMOE_VALIDATE(send_bytes.size() == ranks && recv_bytes.size() == ranks, "all_to_all_v got ",
                  send_bytes.size(), " send and ", recv_bytes.size(), " receive sizes on '", name(),
                  "' of ", detail::counted(size(), "rank"), ": pass one of each per rank");
  for (std::size_t r = 0; r < ranks; ++r) {
    LSHMOE_VALIDATE(send_bytes[r] >= 0 && recv_bytes[r] >= 0, "all_to_all_v got a negative size (",
                    send_bytes[r], " to and ", recv_bytes[r], " from rank ", r, " of '", name(),
                    "'): sizes are bytes >= 0");
  }
  const auto own = static_cast<std::size_t>(rank());
  LSHMOE_VALIDATE(send_bytes[own] == recv_bytes[own], "all_to_all_v sends ", send_bytes[own],
                  " bytes to its own rank but expects ", recv_bytes[own],
                  " from it: both sizes must be equal");
}

cuda::Staging& Communicator::staging() {
  if (!staging_) staging_ = std::make_unique<cuda::Staging>();
  return *staging_;
}

void Communicator::do_device_all_reduce(void* data, std::size_t count, Element element,
                                        Purpose purpose, DeviceStream stream) {
  const std::size_t bytes = count * (element == Element::f32 ? sizeof(float) : sizeof(double));
  cuda::Staging& staged = staging();
  std::byte* host = staged.to_host(data, bytes, stream.handle);
  keep_buffer_on_error(staged.outgoing(),
                       [&] { do_all_reduce(host, count, element, ReduceOp::sum, purpose); });
  staged.to_device(data, host, bytes, stream.handle);
}

void Communicator::do_device_broadcast(void* data, std::size_t bytes, int root, Purpose purpose,
                                       DeviceStream stream) {
  cuda::Staging& staged = staging();
  const bool sends = rank() == root;
  std::byte* host = sends ? staged.to_host(data, bytes, stream.handle) : staged.room(bytes);
  keep_buffer_on_error(staged.outgoing(), [&] { do_broadcast(host, bytes, root, purpose); });
  if (!sends) staged.to_device(data, host, bytes, stream.handle);
}

void Communicator::do_device_all_to_all_v(const void* send,
                                          std::span<const std::int64_t> send_bytes, void* recv,
                                          std::span<const std::int64_t> recv_bytes, Purpose purpose,
                                          DeviceStream stream) {
  const auto total = [](std::span<const std::int64_t> bytes) {
    return static_cast<std::size_t>(std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0}));
  };
  cuda::Staging& staged = staging();
  const std::byte* from = staged.to_host(send, total(send_bytes), stream.handle);
  std::byte* to = staged.room(total(recv_bytes));
  keep_buffer_on_error(staged.outgoing(),
                       [&] { do_all_to_all_v(from, send_bytes, to, recv_bytes, purpose); });
  staged.to_device(recv, to, total(recv_bytes), stream.handle);
}

Traffic Communicator::traffic(Purpose purpose) const {
  LSHMOE_VALIDATE(purpose < Purpose::count_, "no such purpose (", static_cast<int>(purpose),
                  "): use one of enum Purpose");
  return traffic_[static_cast<std::size_t>(purpose)];
}

Traffic Communicator::traffic() const {
  Traffic sum;
  for (const Traffic& one : traffic_) {
    sum.bytes_sent += one.bytes_sent;
    sum.bytes_received += one.bytes_received;
    sum.calls += one.calls;
  }
  return sum;
}

}  // namespace lshmoe
