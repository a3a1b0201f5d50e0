#include "lshmoe/comm/communicator.hpp"

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
void check_root(const Communicator& comm, int root) {
  LSHMOE_VALIDATE(root >= 0 && root < comm.size(), "root ", root, " is no rank of '", comm.name(),
                  "' (", comm.size(), " ranks): pass 0 .. ", comm.size() - 1);
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

std::shared_ptr<Communicator> Communicator::split(int color, int key, const std::string& name) {
  LSHMOE_VALIDATE(color >= 0, "color ", color, " of split '", name,
                  "' is negative (every rank joins a group): number the groups from 0");
  return do_split(color, key, name);
}

void Communicator::barrier(Purpose purpose) { do_barrier(purpose); }

void Communicator::all_reduce(std::span<float> data, ReduceOp op, Purpose purpose) {
  do_all_reduce(data.data(), data.size(), Element::f32, op, purpose);
}
void Communicator::all_reduce(std::span<double> data, ReduceOp op, Purpose purpose) {
  do_all_reduce(data.data(), data.size(), Element::f64, op, purpose);
}
void Communicator::all_reduce(std::span<std::int64_t> data, ReduceOp op, Purpose purpose) {
  do_all_reduce(data.data(), data.size(), Element::i64, op, purpose);
}

void Communicator::broadcast(void* data, std::size_t bytes, int root, Purpose purpose) {
  check_root(*this, root);
  do_broadcast(data, bytes, root, purpose);
}

std::vector<std::vector<std::byte>> Communicator::gather(std::span<const std::byte> data, int root,
                                                         Purpose purpose) {
  check_root(*this, root);
  return do_gather(data, root, purpose);
}

void Communicator::all_to_all(const void* send, void* recv, std::size_t bytes_per_rank,
                              Purpose purpose) {
  do_all_to_all(send, recv, bytes_per_rank, purpose);
}

void Communicator::all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes,
                                void* recv, std::span<const std::int64_t> recv_bytes,
                                Purpose purpose) {
  const auto ranks = static_cast<std::size_t>(size());
  LSHMOE_VALIDATE(send_bytes.size() == ranks && recv_bytes.size() == ranks, "all_to_all_v got ",
                  send_bytes.size(), " send and ", recv_bytes.size(), " receive sizes on '", name(),
                  "' of ", ranks, " ranks: pass one of each per rank");
  for (std::size_t r = 0; r < ranks; ++r) {
    LSHMOE_VALIDATE(send_bytes[r] >= 0 && recv_bytes[r] >= 0, "all_to_all_v got a negative size (",
                    send_bytes[r], " to and ", recv_bytes[r], " from rank ", r, " of '", name(),
                    "'): sizes are bytes >= 0");
  }
  const auto own = static_cast<std::size_t>(rank());
  LSHMOE_VALIDATE(send_bytes[own] == recv_bytes[own], "all_to_all_v sends ", send_bytes[own],
                  " bytes to its own rank but expects ", recv_bytes[own],
                  " from it: both sizes must be equal");
  do_all_to_all_v(send, send_bytes, recv, recv_bytes, purpose);
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
