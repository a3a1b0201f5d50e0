#pragma once
// Transport: point-to-point messages of one MPI communicator, with a deadline and with checks.
//
// One exchange = every rank sends one block to some peers and receives one from some peers. In
// front of each block goes an envelope that says what the sender is doing: which collective, for
// what purpose, its number, how many bytes. So a rank that is in another call, or sends another
// size, is found when its envelope arrives, and a rank that does not come can be named. Small
// blocks travel inside the envelope. MPI keeps the messages of a pair of ranks in order, so the
// n-th envelope of a peer always meets this rank's n-th expectation of one.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/comm/mpi/adopt.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::mpi {

enum class Kind : std::uint8_t {
  barrier,
  all_reduce,
  broadcast,
  gather,
  all_to_all,
  all_to_all_v,
  split,
  hosts,
};
[[nodiscard]] std::string_view name_of(Kind kind);

/// What all ranks of an exchange must agree on.
struct Call {
  Kind kind;
  Purpose purpose;
  /// Element type and operator of a reduction, otherwise 0.
  std::uint8_t element = 0;
  std::uint8_t op = 0;
  /// Total bytes of an all_reduce or broadcast, bytes per rank of an all_to_all; otherwise 0.
  std::uint64_t size = 0;
  /// Of broadcast and gather, otherwise 0.
  std::uint32_t root = 0;
};

struct Outgoing {
  int peer;
  const void* data;
  std::size_t bytes;
};
struct Incoming {
  int peer;
  void* data;
  std::size_t bytes;
};

/// A block of memory that only grows, not initialized: fresh memory costs page faults.
class Scratch {
 public:
  std::byte* get(std::size_t bytes);

 private:
  std::unique_ptr<std::byte[]> data_;
  std::size_t bytes_ = 0;
};

class Transport {
 public:
  /// Largest block that travels inside its envelope.
  static constexpr std::size_t kInlineBytes = 1024;

  /// Takes ownership of `comm` (freed in the destructor while MPI runs).
  Transport(MPI_Comm comm, std::string name, double timeout_seconds, std::size_t chunk_bytes);
  ~Transport();
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  [[nodiscard]] MPI_Comm comm() const { return comm_; }
  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] int size() const { return size_; }
  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] double timeout_seconds() const { return timeout_seconds_; }
  [[nodiscard]] std::size_t chunk_bytes() const { return chunk_bytes_; }

  /// Who the ranks are, for error texts; empty until set.
  std::vector<int> world_ranks;
  std::vector<std::string> hosts;

  /// Sends and receives the blocks (peers other than this rank, each at most once in each list) and
  /// returns when all are done. Both lists may differ from rank to rank, but to every Outgoing
  /// belongs an Incoming of the same size. Throws CommError or Timeout; dead after that.
  void exchange(const Call& call, std::span<const Outgoing> out, std::span<const Incoming> in);

  /// Throws CommError when this communicator is dead or MPI is finalized.
  void check_alive() const;
  /// Marks dead, tells the peers, throws CommError with `text` and the MPI error's own.
  [[noreturn]] void fail_mpi(int code, const std::string& text);

 private:
  struct Envelope;
  struct Peer;  // progress with one peer in the exchange that runs
  struct Pending;

  void post_envelope_receives();
  void post_sends();
  void isend(const void* data, std::size_t bytes, int peer, int tag, Pending pending);
  void irecv(void* data, std::size_t bytes, int peer, int tag, Pending pending);
  void complete(std::size_t request, const MPI_Status& status);
  void open_envelope(std::size_t index, const MPI_Status& status);
  void look_for_notes();
  [[nodiscard]] bool data_moves() const;

  [[noreturn]] void fail(bool timed_out, const std::string& text);
  [[noreturn]] void fail_timeout();
  void check(int code, std::string_view what);
  [[nodiscard]] std::string describe(const Call& call) const;
  [[nodiscard]] std::string rank_text(int peer) const;
  [[nodiscard]] std::string where() const;

  MPI_Comm comm_;
  std::string name_;
  double timeout_seconds_;
  std::size_t chunk_bytes_;
  int rank_ = 0;
  int size_ = 0;
  std::uint64_t number_ = 0;  // exchanges entered
  std::string dead_;          // why, once something failed

  // The exchange that runs. requests_[i] is described by pending_[i].
  Call call_{};
  std::span<const Outgoing> out_;
  std::span<const Incoming> in_;
  std::vector<MPI_Request> requests_;
  std::vector<Pending> pending_;
  std::vector<Peer> from_;            // beside in_
  std::vector<std::size_t> to_open_;  // beside out_: sends not finished
  std::size_t open_ = 0;
  Scratch envelopes_out_;
  Scratch envelopes_in_;
  std::vector<int> done_;
  std::vector<MPI_Status> statuses_;
};

}  // namespace lshmoe::mpi
