#pragma once
// Bytes between ranks: the interface every backend implements (self, mpi, nccl).
//
// Every member function that is marked collective must be called by all ranks of the communicator
// in the same order with the same purpose; a rank that does otherwise makes the others throw
// CommError. No function here keeps a reference to its arguments after it returns.
//
// Collectives of several ranks are called by one thread of a process at a time, whatever the
// communicator: a second one that comes while one runs gets InvalidArgument, for nobody could order
// their calls as the other ranks do. Communicators of one rank may be used by several threads; they
// take turns.
//
// Errors of every collective: InvalidArgument for arguments that are wrong on this rank alone
// (nothing was sent; the communicator still works), CommError when ranks disagree or a peer failed,
// Timeout when a peer did not come. After the last two the communicator is dead: each later
// collective on it throws CommError at once, and the buffers of the failed call must stay allocated
// as long as the process goes on using MPI.
//
// Overloads that take a DeviceStream work on memory of the current CUDA device, after what was
// queued on that stream before. They return when the data has arrived, or its last copy is queued
// on the stream; so the deadline holds for them too. nccl moves device memory itself; the other
// backends stage it through pinned memory. They throw CudaError too, and NotConfigured in a build
// without CUDA.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "lshmoe/kernels/cuda/stream.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

namespace cuda {
class Staging;
}

/// The CUDA stream of a collective on device memory; null is the default stream.
struct DeviceStream {
  kernels::cuda::Stream handle = nullptr;
};

/// What a transfer is for; bytes and calls are counted apart for each.
enum class Purpose : std::uint8_t {
  control,            ///< barriers, checks, gathers of results
  plan,               ///< sizes, expert ids, gate weights and their gradients
  dispatch,           ///< rows to the experts, forward
  combine,            ///< expert outputs back, forward
  combine_backward,   ///< gradients of the outputs to the experts
  dispatch_backward,  ///< gradients of the rows back to their source
  gradients,          ///< gradient reduction
  codec_state,        ///< learned state of the codecs, and the samples it is fitted to
  checkpoint,         ///< saving and loading
  count_              ///< number of purposes
};
/// Name as written above; "unknown" for anything else.
[[nodiscard]] std::string_view name_of(Purpose purpose);

/// Counted at the transport: bytes handed over for other ranks, bytes received from them, calls.
/// Payload only, as the caller handed it over: the backend's own headers, like MPI's, do not count.
/// What stays on the own rank counts in none of them.
struct Traffic {
  std::uint64_t bytes_sent = 0;
  std::uint64_t bytes_received = 0;
  std::uint64_t calls = 0;  ///< collectives entered on a communicator of more than one rank
};

enum class ReduceOp : std::uint8_t { sum, min, max };

class Communicator {
 public:
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  virtual ~Communicator();

  /// Rank of this process in this communicator, 0 .. size()-1. Local.
  [[nodiscard]] virtual int rank() const = 0;
  /// Number of ranks. Local.
  [[nodiscard]] virtual int size() const = 0;
  /// Rank in the world communicator of this communicator's rank `rank`; for error texts. Local.
  [[nodiscard]] virtual int world_rank(int rank) const = 0;
  /// Name for error texts, e.g. "world", "world/expert". Local.
  [[nodiscard]] virtual const std::string& name() const = 0;
  /// "self", "mpi" or "nccl". Local.
  [[nodiscard]] virtual std::string_view backend() const = 0;
  /// Name of the host that this communicator's rank `rank` runs on; equal on ranks that share
  /// memory. Local.
  [[nodiscard]] virtual const std::string& host(int rank) const = 0;

  /// Ranks with the same `color` (>= 0) form a new communicator, ordered by (key, rank). `name` is
  /// appended to this one's. Collective. The new communicator needs only the Session (or the
  /// adopted MPI) to stay alive, not this one.
  [[nodiscard]] std::shared_ptr<Communicator> split(int color, int key, const std::string& name);

  /// Returns when all ranks have entered. Collective.
  void barrier(Purpose purpose = Purpose::control);

  /// Element-wise reduction in place over all ranks; every rank gets the same bits, summed in rank
  /// order whatever arrives first. NaN in any rank's element gives NaN, for min and max too. Host
  /// memory. Collective; all ranks pass the same count. Uses as much scratch memory as data.
  void all_reduce(std::span<float> data, ReduceOp op, Purpose purpose);
  void all_reduce(std::span<double> data, ReduceOp op, Purpose purpose);
  void all_reduce(std::span<std::int64_t> data, ReduceOp op, Purpose purpose);

  /// Sum over all ranks, of device memory; the same order, so the same bits as the functions above
  /// give. Collective; all ranks pass the same count.
  void all_reduce(std::span<float> data, Purpose purpose, DeviceStream stream);
  void all_reduce(std::span<double> data, Purpose purpose, DeviceStream stream);

  /// Copies `bytes` bytes from `root` to all ranks; `bytes` is the same on all. Host memory.
  /// Collective.
  void broadcast(void* data, std::size_t bytes, int root, Purpose purpose);
  /// The same of device memory. Collective.
  void broadcast(void* data, std::size_t bytes, int root, Purpose purpose, DeviceStream stream);

  /// Every rank's bytes on `root`, in rank order; sizes may differ. Empty on the other ranks.
  /// Collective.
  [[nodiscard]] std::vector<std::vector<std::byte>> gather(std::span<const std::byte> data,
                                                           int root, Purpose purpose);

  /// Fixed-size exchange: block r of `send` (bytes_per_rank bytes) goes to rank r, block r of
  /// `recv` comes from rank r. Host memory, size() * bytes_per_rank bytes each. Collective.
  void all_to_all(const void* send, void* recv, std::size_t bytes_per_rank, Purpose purpose);

  /// Variable exchange: `send_bytes[r]` bytes, the blocks in rank order without gaps, go to rank r;
  /// `recv_bytes[r]` come from it. Sizes of any magnitude (no 2 GiB limit); zero is allowed.
  /// Host memory; send and recv do not overlap. Collective. Throws CommError naming the peer and
  /// both sizes when what it sends differs from recv_bytes, Timeout naming the peers that did not
  /// come.
  void all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes, void* recv,
                    std::span<const std::int64_t> recv_bytes, Purpose purpose);
  /// The same of device memory. nccl cannot see whether the ranks agree about the sizes, and ends
  /// in Timeout or with wrong bytes where they do not: exchange the sizes first. Collective.
  void all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes, void* recv,
                    std::span<const std::int64_t> recv_bytes, Purpose purpose, DeviceStream stream);

  /// Traffic of this process through this communicator since it was made. Local; not while another
  /// thread is in a collective.
  [[nodiscard]] Traffic traffic(Purpose purpose) const;
  /// The same over all purposes. Local.
  [[nodiscard]] Traffic traffic() const;

  /// Collectives that belong together: while it lives, other threads are kept out as by a running
  /// collective. Local; throws InvalidArgument as a collective does.
  class Turn {
   public:
    explicit Turn(const Communicator& comm);

   private:
    std::unique_lock<std::recursive_mutex> lock_;
  };

  /// 1, 2, ...: numbers what is made on this communicator, in the order of the calls, so that ranks
  /// can check that they use it alike. Local, thread-safe.
  [[nodiscard]] std::int64_t number_object() { return ++objects_; }

  /// Longest wait of one collective in which nothing arrives from any peer, in seconds. Local.
  [[nodiscard]] virtual double timeout_seconds() const = 0;

 protected:
  Communicator();

  enum class Element : std::uint8_t { f32, f64, i64 };

  // What a backend does; the arguments were checked by the public functions above.
  virtual std::shared_ptr<Communicator> do_split(int color, int key, const std::string& name) = 0;
  virtual void do_barrier(Purpose purpose) = 0;
  virtual void do_all_reduce(void* data, std::size_t count, Element element, ReduceOp op,
                             Purpose purpose) = 0;
  virtual void do_broadcast(void* data, std::size_t bytes, int root, Purpose purpose) = 0;
  virtual std::vector<std::vector<std::byte>> do_gather(std::span<const std::byte> data, int root,
                                                        Purpose purpose) = 0;
  virtual void do_all_to_all(const void* send, void* recv, std::size_t bytes_per_rank,
                             Purpose purpose) = 0;
  virtual void do_all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes,
                               void* recv, std::span<const std::int64_t> recv_bytes,
                               Purpose purpose) = 0;

  // The same of device memory. Here: through pinned memory and the functions above.
  virtual void do_device_all_reduce(void* data, std::size_t count, Element element, Purpose purpose,
                                    DeviceStream stream);
  virtual void do_device_broadcast(void* data, std::size_t bytes, int root, Purpose purpose,
                                   DeviceStream stream);
  virtual void do_device_all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes,
                                      void* recv, std::span<const std::int64_t> recv_bytes,
                                      Purpose purpose, DeviceStream stream);

  /// The counter a backend adds to.
  Traffic& counter(Purpose purpose) { return traffic_[static_cast<std::size_t>(purpose)]; }

 private:
  void check_sizes(std::span<const std::int64_t> send_bytes,
                   std::span<const std::int64_t> recv_bytes) const;
  cuda::Staging& staging();

  std::unique_ptr<cuda::Staging> staging_;  // made when first needed
  std::array<Traffic, static_cast<std::size_t>(Purpose::count_)> traffic_{};
  std::atomic<std::int64_t> objects_{0};
  mutable std::recursive_mutex turn_;  // of one rank; collectives may be made of others
};

/// One value from every rank, in rank order, on every rank. T is trivially copyable. Collective.
template <class T>
[[nodiscard]] std::vector<T> all_gather(Communicator& comm, const T& value, Purpose purpose) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<T> send(static_cast<std::size_t>(comm.size()), value), recv(send.size());
  comm.all_to_all(send.data(), recv.data(), sizeof(T), purpose);
  return recv;
}

}  // namespace lshmoe
