// The mpi backend: every collective as exchanges of blocks on a Transport.

#include <algorithm>
#include <array>
#include <climits>
#include <cstring>
#include <numeric>

#include "lshmoe/comm/mpi/adopt.hpp"
#include "lshmoe/comm/mpi/transport.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

using mpi::Call;
using mpi::Incoming;
using mpi::Kind;
using mpi::Outgoing;
using mpi::Transport;

using HostName = std::array<char, MPI_MAX_PROCESSOR_NAME>;

// memcpy may not be given a null pointer, even for nothing.
void copy_bytes(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

template <class T>
T reduced(T sum, T next, ReduceOp op) {
  // x != x: NaN, which wins.
  switch (op) {
    case ReduceOp::sum:
      return sum + next;
    case ReduceOp::min:
      return next < sum || next != next ? next : sum;
    case ReduceOp::max:
      return next > sum || next != next ? next : sum;
  }
  return sum;
}

template <class T>
void reduce(std::byte* into, const std::byte* next, std::size_t count, ReduceOp op) {
  auto* a = reinterpret_cast<T*>(into);
  const auto* b = reinterpret_cast<const T*>(next);
  for (std::size_t i = 0; i < count; ++i) a[i] = reduced(a[i], b[i], op);
}

class MpiCommunicator final : public Communicator {
 public:
  // The transport's directory (world ranks, hosts) is filled.
  explicit MpiCommunicator(std::unique_ptr<Transport> transport)
      : transport_(std::move(transport)) {}

  int rank() const override { return transport_->rank(); }
  int size() const override { return transport_->size(); }
  int world_rank(int rank) const override { return transport_->world_ranks.at(index(rank)); }
  const std::string& name() const override { return transport_->name(); }
  std::string_view backend() const override { return "mpi"; }
  const std::string& host(int rank) const override { return transport_->hosts.at(index(rank)); }
  double timeout_seconds() const override { return transport_->timeout_seconds(); }

 private:
  static std::size_t index(int rank) { return static_cast<std::size_t>(rank); }

  std::shared_ptr<Communicator> do_split(int color, int key, const std::string& name) override;
  void do_barrier(Purpose purpose) override;
  void do_all_reduce(void* data, std::size_t count, Element element, ReduceOp op,
                     Purpose purpose) override;
  void do_broadcast(void* data, std::size_t bytes, int root, Purpose purpose) override;
  std::vector<std::vector<std::byte>> do_gather(std::span<const std::byte> data, int root,
                                                Purpose purpose) override;
  void do_all_to_all(const void* send, void* recv, std::size_t bytes_per_rank,
                     Purpose purpose) override;
  void do_all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes, void* recv,
                       std::span<const std::int64_t> recv_bytes, Purpose purpose) override;

  // Collecting the blocks of one exchange. Blocks of the own rank are left out.
  void begin() {
    out_.clear();
    in_.clear();
  }
  void to(int peer, const void* data, std::size_t bytes) {
    if (peer != rank()) out_.push_back({peer, data, bytes});
  }
  void from(int peer, void* data, std::size_t bytes) {
    if (peer != rank()) in_.push_back({peer, data, bytes});
  }
  void exchange(const Call& call) {
    transport_->exchange(call, out_, in_);
    Traffic& traffic = counter(call.purpose);
    for (const Outgoing& block : out_) traffic.bytes_sent += block.bytes;
    for (const Incoming& block : in_) traffic.bytes_received += block.bytes;
  }
  void count_call(Purpose purpose) {
    if (size() > 1) ++counter(purpose).calls;
  }

  void all_to_all_blocks(const Call& call, const std::byte* send, std::byte* recv,
                         std::size_t bytes_per_rank);

  std::unique_ptr<Transport> transport_;
  std::vector<Outgoing> out_;
  std::vector<Incoming> in_;
  mpi::Scratch scratch_;
};

void MpiCommunicator::do_barrier(Purpose purpose) {
  count_call(purpose);
  all_to_all_blocks({.kind = Kind::barrier, .purpose = purpose}, nullptr, nullptr, 0);
}

void MpiCommunicator::do_all_to_all(const void* send, void* recv, std::size_t bytes_per_rank,
                                    Purpose purpose) {
  count_call(purpose);
  all_to_all_blocks({.kind = Kind::all_to_all, .purpose = purpose, .size = bytes_per_rank},
                    static_cast<const std::byte*>(send), static_cast<std::byte*>(recv),
                    bytes_per_rank);
}

void MpiCommunicator::all_to_all_blocks(const Call& call, const std::byte* send, std::byte* recv,
                                        std::size_t bytes_per_rank) {
  begin();
  // Starting behind the own rank: not every rank sends to rank 0 first.
  for (int step = 1; step < size(); ++step) {
    const int next = (rank() + step) % size();
    const int before = (rank() - step + size()) % size();
    to(next, send + index(next) * bytes_per_rank, bytes_per_rank);
    from(before, recv + index(before) * bytes_per_rank, bytes_per_rank);
  }
  exchange(call);
  copy_bytes(recv + index(rank()) * bytes_per_rank, send + index(rank()) * bytes_per_rank,
             bytes_per_rank);
}

void MpiCommunicator::do_all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes,
                                      void* recv, std::span<const std::int64_t> recv_bytes,
                                      Purpose purpose) {
  count_call(purpose);
  std::vector<std::size_t> send_at(send_bytes.size()), recv_at(recv_bytes.size());
  std::exclusive_scan(send_bytes.begin(), send_bytes.end(), send_at.begin(), std::size_t{0});
  std::exclusive_scan(recv_bytes.begin(), recv_bytes.end(), recv_at.begin(), std::size_t{0});
  const auto* source = static_cast<const std::byte*>(send);
  auto* target = static_cast<std::byte*>(recv);
  begin();
  for (int step = 1; step < size(); ++step) {
    const std::size_t next = index((rank() + step) % size());
    const std::size_t before = index((rank() - step + size()) % size());
    to(static_cast<int>(next), source + send_at[next], static_cast<std::size_t>(send_bytes[next]));
    from(static_cast<int>(before), target + recv_at[before],
         static_cast<std::size_t>(recv_bytes[before]));
  }
  exchange({.kind = Kind::all_to_all_v, .purpose = purpose});
  const std::size_t own = index(rank());
  copy_bytes(target + recv_at[own], source + send_at[own],
             static_cast<std::size_t>(send_bytes[own]));
}

// Each rank reduces one slice of the elements, in rank order, then all slices go to all ranks. What
// fits into envelopes goes whole to all ranks at once, and each reduces it alone: half the waits.
// Both give the same bits.
void MpiCommunicator::do_all_reduce(void* data, std::size_t count, Element element, ReduceOp op,
                                    Purpose purpose) {
  count_call(purpose);
  const std::size_t width = element == Element::f32 ? sizeof(float) : sizeof(double);
  const std::size_t ranks = index(size());
  const Call call{.kind = Kind::all_reduce,
                  .purpose = purpose,
                  .element = static_cast<std::uint8_t>(element),
                  .op = static_cast<std::uint8_t>(op),
                  .size = count * width};
  auto* bytes = static_cast<std::byte*>(data);
  const bool whole = count * width <= Transport::kInlineBytes;
  const auto slice_at = [&](std::size_t r) {
    return whole ? 0 : count / ranks * r + std::min(r, count % ranks);
  };
  const auto slice_bytes = [&](std::size_t r) {
    return (whole ? count : slice_at(r + 1) - slice_at(r)) * width;
  };

  const std::size_t own_bytes = slice_bytes(index(rank()));
  std::byte* own = bytes + slice_at(index(rank())) * width;
  std::byte* rows = scratch_.get(ranks * own_bytes);  // row r: rank r's values of this rank's slice
  begin();
  for (int peer = 0; peer < size(); ++peer) {
    to(peer, bytes + slice_at(index(peer)) * width, slice_bytes(index(peer)));
    from(peer, rows + index(peer) * own_bytes, own_bytes);
  }
  exchange(call);
  copy_bytes(rows + index(rank()) * own_bytes, own, own_bytes);
  for (std::size_t r = 1; r < ranks; ++r) {
    const std::byte* next = rows + r * own_bytes;
    switch (element) {
      case Element::f32:
        reduce<float>(rows, next, own_bytes / width, op);
        break;
      case Element::f64:
        reduce<double>(rows, next, own_bytes / width, op);
        break;
      case Element::i64:
        reduce<std::int64_t>(rows, next, own_bytes / width, op);
        break;
    }
  }
  copy_bytes(own, rows, own_bytes);
  if (whole) return;

  begin();
  for (int peer = 0; peer < size(); ++peer) {
    to(peer, own, own_bytes);
    from(peer, bytes + slice_at(index(peer)) * width, slice_bytes(index(peer)));
  }
  exchange(call);
}

void MpiCommunicator::do_broadcast(void* data, std::size_t bytes, int root, Purpose purpose) {
  count_call(purpose);
  begin();
  if (rank() == root) {
    for (int peer = 0; peer < size(); ++peer) to(peer, data, bytes);
  } else {
    from(root, data, bytes);
  }
  exchange({.kind = Kind::broadcast,
            .purpose = purpose,
            .size = bytes,
            .root = static_cast<std::uint32_t>(root)});
}

std::vector<std::vector<std::byte>> MpiCommunicator::do_gather(std::span<const std::byte> data,
                                                               int root, Purpose purpose) {
  count_call(purpose);
  const Call call{
      .kind = Kind::gather, .purpose = purpose, .root = static_cast<std::uint32_t>(root)};
  const std::uint64_t bytes = data.size();
  std::vector<std::vector<std::byte>> blocks;

  // The sizes first, so that the root knows what to make room for.
  std::vector<std::uint64_t> sizes(index(size()), bytes);
  begin();
  if (rank() == root) {
    for (int peer = 0; peer < size(); ++peer) from(peer, &sizes[index(peer)], sizeof(bytes));
  } else {
    to(root, &bytes, sizeof(bytes));
  }
  exchange(call);

  begin();
  if (rank() == root) {
    blocks.resize(index(size()));
    for (int peer = 0; peer < size(); ++peer) {
      std::vector<std::byte>& block = blocks[index(peer)];
      block.resize(sizes[index(peer)]);
      from(peer, block.data(), block.size());
    }
    std::copy(data.begin(), data.end(), blocks[index(root)].begin());
  } else {
    to(root, data.data(), data.size());
  }
  exchange(call);
  return blocks;
}

std::shared_ptr<Communicator> MpiCommunicator::do_split(int color, int key,
                                                        const std::string& name) {
  count_call(Purpose::control);
  // MPI_Comm_split has no deadline. So all ranks meet here first, under one; what they say gives
  // the members of the new communicator, too.
  struct Choice {
    std::int64_t color, key;
  };
  const std::vector<Choice> mine(index(size()), Choice{color, key});
  std::vector<Choice> choices(mine.size());
  all_to_all_blocks({.kind = Kind::split, .purpose = Purpose::control},
                    reinterpret_cast<const std::byte*>(mine.data()),
                    reinterpret_cast<std::byte*>(choices.data()), sizeof(Choice));
  std::vector<int> members;
  for (int r = 0; r < size(); ++r) {
    if (choices[index(r)].color == color) members.push_back(r);
  }
  std::stable_sort(members.begin(), members.end(),
                   [&](int a, int b) { return choices[index(a)].key < choices[index(b)].key; });

  MPI_Comm comm = MPI_COMM_NULL;
  const std::string full_name = this->name() + "/" + name;
  if (const int code = MPI_Comm_split(transport_->comm(), color, key, &comm); code != MPI_SUCCESS) {
    transport_->fail_mpi(code, "MPI_Comm_split failed for '" + full_name + "'");
  }
  auto transport = std::make_unique<Transport>(comm, full_name, transport_->timeout_seconds(),
                                               transport_->chunk_bytes());
  LSHMOE_ASSERT(index(transport->size()) == members.size());
  for (const int member : members) {
    transport->world_ranks.push_back(world_rank(member));
    transport->hosts.push_back(host(member));
  }
  return std::make_shared<MpiCommunicator>(std::move(transport));
}

// Rank in MPI_COMM_WORLD of each rank of `comm`.
std::vector<int> world_ranks_of(MPI_Comm comm, int size) {
  std::vector<int> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  std::vector<int> world_ranks(ranks.size());
  MPI_Group group = MPI_GROUP_NULL;
  MPI_Group world = MPI_GROUP_NULL;
  MPI_Comm_group(comm, &group);
  MPI_Comm_group(MPI_COMM_WORLD, &world);
  MPI_Group_translate_ranks(group, size, ranks.data(), world, world_ranks.data());
  MPI_Group_free(&group);
  MPI_Group_free(&world);
  return world_ranks;
}

}  // namespace

std::shared_ptr<Communicator> adopt_mpi(MPI_Comm comm, AdoptOptions options) {
  LSHMOE_VALIDATE(options.chunk_bytes > 0 && options.chunk_bytes <= INT_MAX, "chunk_bytes ",
                  options.chunk_bytes, " is not in 1 .. ", INT_MAX, " (MPI counts are int)");
  LSHMOE_VALIDATE(options.timeout_seconds > 0, "timeout of ", options.timeout_seconds,
                  " s (no call could ever finish): pass seconds > 0");
  MPI_Comm own = MPI_COMM_NULL;
  if (MPI_Comm_dup(comm, &own) != MPI_SUCCESS) {
    throw CommError("MPI_Comm_dup failed for '" + options.name + "': is MPI initialized?");
  }
  auto transport =
      std::make_unique<Transport>(own, options.name, options.timeout_seconds, options.chunk_bytes);
  transport->world_ranks = world_ranks_of(own, transport->size());

  HostName host{};
  int length = 0;
  MPI_Get_processor_name(host.data(), &length);
  std::vector<HostName> hosts(static_cast<std::size_t>(transport->size()), host);
  std::vector<Outgoing> out;
  std::vector<Incoming> in;
  for (int peer = 0; peer < transport->size(); ++peer) {
    if (peer == transport->rank()) continue;
    out.push_back({peer, host.data(), sizeof(host)});
    in.push_back({peer, hosts[static_cast<std::size_t>(peer)].data(), sizeof(host)});
  }
  transport->exchange({.kind = Kind::hosts, .purpose = Purpose::control}, out, in);
  for (const HostName& name : hosts) transport->hosts.emplace_back(name.data());
  return std::make_shared<MpiCommunicator>(std::move(transport));
}

}  // namespace lshmoe
