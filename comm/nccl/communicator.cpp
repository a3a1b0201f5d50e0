#include "lshmoe/comm/nccl/communicator.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "lshmoe/comm/cuda/device.hpp"
#include "lshmoe/comm/nccl/group.hpp"
#include "lshmoe/kernels/cuda/combine.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

using detail::message;

/// A reduction works on pieces of this many bytes, and so on scratch memory of that size.
constexpr std::size_t kPieceBytes = std::size_t{64} << 20;
/// Elements that one block of the summing kernel takes; slices are padded to a multiple of it.
constexpr std::size_t kColumns = 1024;

class NcclCommunicator final : public Communicator {
 public:
  explicit NcclCommunicator(std::shared_ptr<Communicator> control)
      : control_(std::move(control)), group_(*control_) {}

  int rank() const override { return control_->rank(); }
  int size() const override { return control_->size(); }
  int world_rank(int rank) const override { return control_->world_rank(rank); }
  const std::string& name() const override { return control_->name(); }
  std::string_view backend() const override { return "nccl"; }
  const std::string& host(int rank) const override { return control_->host(rank); }
  double timeout_seconds() const override { return control_->timeout_seconds(); }

 private:
  std::shared_ptr<Communicator> do_split(int color, int key, const std::string& name) override {
    return std::make_shared<NcclCommunicator>(control_->split(color, key, name));
  }
  void do_barrier(Purpose purpose) override {
    by_control(purpose, [&] { control_->barrier(purpose); });
  }
  void do_all_reduce(void* data, std::size_t count, Element element, ReduceOp op,
                     Purpose purpose) override {
    by_control(purpose, [&] {
      switch (element) {
        case Element::f32:
          return control_->all_reduce(std::span(static_cast<float*>(data), count), op, purpose);
        case Element::f64:
          return control_->all_reduce(std::span(static_cast<double*>(data), count), op, purpose);
        case Element::i64:
          return control_->all_reduce(std::span(static_cast<std::int64_t*>(data), count), op,
                                      purpose);
      }
    });
  }
  void do_broadcast(void* data, std::size_t bytes, int root, Purpose purpose) override {
    by_control(purpose, [&] { control_->broadcast(data, bytes, root, purpose); });
  }
  std::vector<std::vector<std::byte>> do_gather(std::span<const std::byte> data, int root,
                                                Purpose purpose) override {
    std::vector<std::vector<std::byte>> blocks;
    by_control(purpose, [&] { blocks = control_->gather(data, root, purpose); });
    return blocks;
  }
  void do_all_to_all(const void* send, void* recv, std::size_t bytes_per_rank,
                     Purpose purpose) override {
    by_control(purpose, [&] { control_->all_to_all(send, recv, bytes_per_rank, purpose); });
  }
  void do_all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes, void* recv,
                       std::span<const std::int64_t> recv_bytes, Purpose purpose) override {
    by_control(purpose,
               [&] { control_->all_to_all_v(send, send_bytes, recv, recv_bytes, purpose); });
  }

  void do_device_all_reduce(void* data, std::size_t count, Element element, Purpose purpose,
                            DeviceStream stream) override;
  void do_device_broadcast(void* data, std::size_t bytes, int root, Purpose purpose,
                           DeviceStream stream) override;
  void do_device_all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes,
                              void* recv, std::span<const std::int64_t> recv_bytes, Purpose purpose,
                              DeviceStream stream) override;

  /// What the call counts there, it counts here.
  template <class Call>
  void by_control(Purpose purpose, Call call) {
    const Traffic before = control_->traffic(purpose);
    call();
    const Traffic after = control_->traffic(purpose);
    Traffic& mine = counter(purpose);
    mine.bytes_sent += after.bytes_sent - before.bytes_sent;
    mine.bytes_received += after.bytes_received - before.bytes_received;
    mine.calls += after.calls - before.calls;
  }
  void count(Purpose purpose, std::size_t sent, std::size_t received) {
    Traffic& mine = counter(purpose);
    mine.bytes_sent += sent;
    mine.bytes_received += received;
  }
  void count_call(Purpose purpose) {
    if (size() > 1) ++counter(purpose).calls;
  }
  [[nodiscard]] std::string describe(const char* collective, Purpose purpose,
                                     std::size_t bytes) const {
    return message(collective, " for ", name_of(purpose), " of ", bytes, " B on '", name(),
                   "' over NCCL");
  }
  void reduce_piece(std::byte* data, std::size_t count, Element element, Purpose purpose,
                    DeviceStream stream);
  void upload_segments(std::size_t segments, DeviceStream stream);

  std::shared_ptr<Communicator> control_;
  nccl::NcclGroup group_;
  // Scratch of reductions: the ranks' values of this rank's slice, and behind them their sum.
  nccl::DeviceBuffer slices_, places_;
  std::size_t segments_ = 0;  // that places_ describes
};

void NcclCommunicator::do_device_all_to_all_v(const void* send,
                                              std::span<const std::int64_t> send_bytes, void* recv,
                                              std::span<const std::int64_t> recv_bytes,
                                              Purpose purpose, DeviceStream stream) {
  count_call(purpose);
  const auto total = [](std::span<const std::int64_t> bytes) {
    return static_cast<std::size_t>(std::accumulate(bytes.begin(), bytes.end(), std::int64_t{0}));
  };
  const std::size_t sent = total(send_bytes), received = total(recv_bytes);
  group_.begin(describe("all_to_all_v", purpose, sent), stream.handle);
  group_.queue([&] {
    const auto* from = static_cast<const std::byte*>(send);
    auto* to = static_cast<std::byte*>(recv);
    for (int peer = 0; peer < size(); ++peer) {
      const auto i = static_cast<std::size_t>(peer);
      group_.send(from, static_cast<std::size_t>(send_bytes[i]), peer);
      group_.receive(to, static_cast<std::size_t>(recv_bytes[i]), peer);
      from += send_bytes[i];
      to += recv_bytes[i];
    }
  });
  group_.finish();
  const auto own = static_cast<std::size_t>(send_bytes[static_cast<std::size_t>(rank())]);
  count(purpose, sent - own, received - own);
}

void NcclCommunicator::do_device_broadcast(void* data, std::size_t bytes, int root, Purpose purpose,
                                           DeviceStream stream) {
  count_call(purpose);
  group_.begin(describe("broadcast", purpose, bytes), stream.handle);
  group_.broadcast(data, bytes, root);
  group_.finish();
  const auto others = static_cast<std::size_t>(size() - 1);
  count(purpose, rank() == root ? others * bytes : 0, rank() == root ? 0 : bytes);
}

void NcclCommunicator::do_device_all_reduce(void* data, std::size_t total, Element element,
                                            Purpose purpose, DeviceStream stream) {
  count_call(purpose);
  if (size() == 1) return;
  const std::size_t width = element == Element::f32 ? sizeof(float) : sizeof(double);
  group_.begin(describe("all_reduce", purpose, total * width), stream.handle);
  const std::size_t piece = kPieceBytes / width;
  for (std::size_t first = 0; first < total; first += piece) {
    reduce_piece(static_cast<std::byte*>(data) + first * width, std::min(piece, total - first),
                 element, purpose, stream);
  }
  group_.finish();
}

// As the mpi backend: each rank sums one slice, in rank order, then all slices go to all ranks.
void NcclCommunicator::reduce_piece(std::byte* data, std::size_t piece, Element element,
                                    Purpose purpose, DeviceStream stream) {
  const std::size_t width = element == Element::f32 ? sizeof(float) : sizeof(double);
  const auto ranks = static_cast<std::size_t>(size()), own = static_cast<std::size_t>(rank());
  // Slices of whole columns; the last ones may be short or empty.
  const std::size_t segments = (piece + ranks * kColumns - 1) / (ranks * kColumns);
  const std::size_t slice = segments * kColumns;
  const auto begin_of = [&](std::size_t r) { return std::min(piece, r * slice) * width; };
  const auto bytes_of = [&](std::size_t r) { return begin_of(r + 1) - begin_of(r); };

  if (segments != segments_) {
    // Allocating and copying from pageable memory may wait for the stream, without a deadline.
    group_.finish();
    upload_segments(segments, stream);
  }
  std::byte* rows = slices_.get((ranks + 1) * slice * width, stream.handle);
  std::byte* sum = rows + ranks * slice * width;
  group_.queue([&] {
    for (std::size_t r = 0; r < ranks; ++r) {
      group_.send(data + begin_of(r), bytes_of(r), static_cast<int>(r));
      group_.receive(rows + r * slice * width, bytes_of(own), static_cast<int>(r));
    }
  });
  const auto* offsets = reinterpret_cast<const std::int64_t*>(places_.get(0, stream.handle));
  kernels::cuda::segment_sum(
      element == Element::f32 ? kernels::RowType::f32 : kernels::RowType::f64, sum, rows, kColumns,
      offsets, static_cast<std::int64_t>(segments), offsets + segments + 1, nullptr, stream.handle);
  group_.queue([&] {
    for (std::size_t r = 0; r < ranks; ++r) {
      group_.send(sum, bytes_of(own), static_cast<int>(r));
      group_.receive(data + begin_of(r), bytes_of(r), static_cast<int>(r));
    }
  });
  const std::size_t others = piece * width - bytes_of(own);
  count(purpose, others + (ranks - 1) * bytes_of(own), (ranks - 1) * bytes_of(own) + others);
}

// Segment s sums, over the ranks in order, columns s * kColumns ... of their slices.
void NcclCommunicator::upload_segments(std::size_t segments, DeviceStream stream) {
  const auto ranks = static_cast<std::size_t>(size());
  std::vector<std::int64_t> places;  // offsets [segments + 1], rows [segments * ranks]
  places.reserve(segments + 1 + segments * ranks);
  for (std::size_t s = 0; s <= segments; ++s)
    places.push_back(static_cast<std::int64_t>(s * ranks));
  for (std::size_t s = 0; s < segments; ++s) {
    for (std::size_t r = 0; r < ranks; ++r) {
      places.push_back(static_cast<std::int64_t>(r * segments + s));
    }
  }
  const std::size_t bytes = places.size() * sizeof(std::int64_t);
  std::byte* to = places_.get(bytes, stream.handle);
  // From pageable memory: it has been read when the call returns.
  cuda::check(cudaMemcpyAsync(to, places.data(), bytes, cudaMemcpyHostToDevice, stream.handle),
              "cudaMemcpyAsync");
  segments_ = segments;
}

}  // namespace

std::shared_ptr<Communicator> make_nccl_communicator(std::shared_ptr<Communicator> control) {
  LSHMOE_VALIDATE(control != nullptr,
                  "make_nccl_communicator got no communicator: pass "
                  "Session::world()");
  return std::make_shared<NcclCommunicator>(std::move(control));
}

bool nccl_configured() { return true; }

}  // namespace lshmoe
