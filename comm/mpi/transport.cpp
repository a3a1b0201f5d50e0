#include "lshmoe/comm/mpi/transport.hpp"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <thread>

#include "lshmoe/runtime/deadline.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::mpi {
namespace {

using detail::message;

constexpr int kEnvelopeTag = 1;
constexpr int kPayloadTag = 2;
constexpr int kNoteTag = 3;  // "I gave up, because ..."
constexpr std::uint32_t kMagic = 0x6c73686d;
constexpr std::size_t kNoteBytes = 1024;

// Waiting: poll first, for the peer that is a moment late; then sleep, because ranks may share
// cores and a polling rank takes time from the one it waits for.
class Backoff {
 public:
  void reset() {
    polls_ = 0;
    sleep_ = kFirstSleep;
  }
  /// Yields or sleeps. `data_moves`: a transfer is under way that needs this rank's progress soon.
  /// Returns true when it slept.
  bool pause(bool data_moves) {
    if (polls_ < kPolls) {
      ++polls_;
      ::sched_yield();
      return false;
    }
    std::this_thread::sleep_for(sleep_);
    // A sixty-fourth of what was slept so far: what it oversleeps is little beside the wait.
    sleep_ = data_moves ? kFirstSleep : std::min(sleep_ + sleep_ / 64, kLongestSleep);
    return true;
  }

 private:
  static constexpr int kPolls = 50;
  static constexpr std::chrono::nanoseconds kFirstSleep{50'000};
  static constexpr std::chrono::nanoseconds kLongestSleep{1'000'000};
  int polls_ = 0;
  std::chrono::nanoseconds sleep_ = kFirstSleep;
};

std::string error_text(int code) {
  std::string text(MPI_MAX_ERROR_STRING, '\0');
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  text.resize(static_cast<std::size_t>(length));
  return text;
}

bool finalized() {
  int flag = 0;
  MPI_Finalized(&flag);
  return flag != 0;
}

// "8, 0, 12" for at most the first 16 of a row; a world of thousands would drown the line.
template <class Blocks>
std::string row_text(const Blocks& blocks) {
  constexpr std::size_t kShown = 16;
  std::size_t total = 0;
  std::string text;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    total += blocks[i].bytes;
    if (i < kShown) text += (i > 0 ? ", " : "") + std::to_string(blocks[i].bytes);
  }
  if (blocks.size() > kShown) text += ", ...";
  return message(total, " B [", text, "]");
}

}  // namespace

std::string_view name_of(Kind kind) {
  switch (kind) {
    case Kind::barrier:
      return "barrier";
    case Kind::all_reduce:
      return "all_reduce";
    case Kind::broadcast:
      return "broadcast";
    case Kind::gather:
      return "gather";
    case Kind::all_to_all:
      return "all_to_all";
    case Kind::all_to_all_v:
      return "all_to_all_v";
    case Kind::split:
      return "split";
    case Kind::hosts:
      return "exchange of host names";
  }
  return "unknown collective";
}

std::byte* Scratch::get(std::size_t bytes) {
  if (bytes > bytes_) {
    data_.reset();  // first, so that the two are never held together
    data_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
    bytes_ = bytes;
  }
  return data_.get();
}

struct Transport::Envelope {
  std::uint32_t magic;
  Kind kind;
  Purpose purpose;
  std::uint8_t element;
  std::uint8_t op;
  std::uint32_t root;
  std::uint32_t unused;
  std::uint64_t number;
  std::uint64_t size;
  std::uint64_t bytes;  // of the block

  static constexpr std::size_t kSlot = 48 + kInlineBytes;
};

struct Transport::Peer {
  bool arrived = false;      // its envelope is here and right
  std::size_t open = 0;      // payload chunks still to come
  std::size_t received = 0;  // bytes of complete chunks
};

struct Transport::Pending {
  enum class Is : std::uint8_t { send, envelope, payload } is;
  std::size_t index;  // in out_ (send) or in_
  std::size_t bytes;
};

Transport::Transport(MPI_Comm comm, std::string name, double timeout_seconds,
                     std::size_t chunk_bytes)
    : comm_(comm),
      name_(std::move(name)),
      timeout_seconds_(timeout_seconds),
      chunk_bytes_(chunk_bytes) {
  static_assert(sizeof(Envelope) <= Envelope::kSlot - kInlineBytes);
  MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
  MPI_Comm_rank(comm_, &rank_);
  MPI_Comm_size(comm_, &size_);
}

Transport::~Transport() {
  // A dead communicator may have messages in flight: leave it to the end of the process.
  if (dead_.empty() && !finalized()) MPI_Comm_free(&comm_);
}

void Transport::check_alive() const {
  if (!dead_.empty()) {
    throw CommError("communicator '" + name_ + "' is dead since an earlier error (" + dead_ +
                    "): end the job and restart it from a checkpoint");
  }
  if (finalized()) {
    throw CommError("communicator '" + name_ +
                    "' outlived MPI (its Session ended, or MPI_Finalize was called): let the "
                    "Session live until the last collective");
  }
}

void Transport::exchange(const Call& call, std::span<const Outgoing> out,
                         std::span<const Incoming> in) {
  check_alive();
  ++number_;
  if (out.empty() && in.empty()) return;
  call_ = call;
  out_ = out;
  in_ = in;
  requests_.clear();
  pending_.clear();
  from_.assign(in.size(), Peer{});
  to_open_.assign(out.size(), 0);
  open_ = 0;
  post_envelope_receives();
  post_sends();

  Deadline deadline(timeout_seconds_);
  Backoff backoff;
  while (open_ > 0) {
    const auto count = static_cast<int>(requests_.size());
    done_.resize(requests_.size());
    statuses_.resize(requests_.size());
    int completed = 0;
    const int code =
        MPI_Testsome(count, requests_.data(), &completed, done_.data(), statuses_.data());
    if (code != MPI_SUCCESS && code != MPI_ERR_IN_STATUS) check(code, "MPI_Testsome");
    if (completed == MPI_UNDEFINED) completed = 0;
    bool arrived = false;
    for (int i = 0; i < completed; ++i) {
      const auto request = static_cast<std::size_t>(done_[static_cast<std::size_t>(i)]);
      MPI_Status& status = statuses_[static_cast<std::size_t>(i)];
      if (code == MPI_SUCCESS) status.MPI_ERROR = MPI_SUCCESS;  // else not set by MPI
      arrived |= pending_[request].is != Pending::Is::send;
      complete(request, status);
    }
    if (arrived) deadline = Deadline(timeout_seconds_);
    if (completed > 0) {
      backoff.reset();
    } else if (backoff.pause(data_moves())) {
      look_for_notes();
      if (deadline.expired()) fail_timeout();
    }
  }
}

void Transport::post_envelope_receives() {
  std::byte* slots = envelopes_in_.get(in_.size() * Envelope::kSlot);
  for (std::size_t i = 0; i < in_.size(); ++i) {
    irecv(slots + i * Envelope::kSlot, Envelope::kSlot, in_[i].peer, kEnvelopeTag,
          {Pending::Is::envelope, i, 0});
  }
}

void Transport::post_sends() {
  std::byte* slots = envelopes_out_.get(out_.size() * Envelope::kSlot);
  for (std::size_t i = 0; i < out_.size(); ++i) {
    const Outgoing& block = out_[i];
    std::byte* slot = slots + i * Envelope::kSlot;
    const Envelope envelope{kMagic,     call_.kind, call_.purpose, call_.element, call_.op,
                            call_.root, 0,          number_,       call_.size,    block.bytes};
    std::memcpy(slot, &envelope, sizeof(envelope));
    std::size_t bytes = sizeof(envelope);
    const bool inline_block = block.bytes <= kInlineBytes;
    if (inline_block && block.bytes > 0) {
      std::memcpy(slot + bytes, block.data, block.bytes);
      bytes += block.bytes;
    }
    isend(slot, bytes, block.peer, kEnvelopeTag, {Pending::Is::send, i, bytes});
  }
  // Payload after all envelopes, so that no peer waits for one behind another's payload.
  for (std::size_t i = 0; i < out_.size(); ++i) {
    const Outgoing& block = out_[i];
    if (block.bytes <= kInlineBytes) continue;
    const auto* data = static_cast<const std::byte*>(block.data);
    for (std::size_t at = 0; at < block.bytes; at += chunk_bytes_) {
      const std::size_t bytes = std::min(chunk_bytes_, block.bytes - at);
      isend(data + at, bytes, block.peer, kPayloadTag, {Pending::Is::send, i, bytes});
    }
  }
}

void Transport::isend(const void* data, std::size_t bytes, int peer, int tag, Pending pending) {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Isend(data, static_cast<int>(bytes), MPI_BYTE, peer, tag, comm_, &request),
        "MPI_Isend");
  ++to_open_[pending.index];
  ++open_;
  requests_.push_back(request);
  pending_.push_back(pending);
}

void Transport::irecv(void* data, std::size_t bytes, int peer, int tag, Pending pending) {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Irecv(data, static_cast<int>(bytes), MPI_BYTE, peer, tag, comm_, &request),
        "MPI_Irecv");
  ++open_;
  requests_.push_back(request);
  pending_.push_back(pending);
}

void Transport::complete(std::size_t request, const MPI_Status& status) {
  const Pending pending = pending_[request];
  --open_;
  const bool sending = pending.is == Pending::Is::send;
  const int peer = sending ? out_[pending.index].peer : in_[pending.index].peer;
  if (status.MPI_ERROR != MPI_SUCCESS) {
    fail(false, message("MPI could not ", sending ? "send to " : "receive from ", rank_text(peer),
                        " in ", where(), " (", error_text(status.MPI_ERROR),
                        "): look at that rank's log and at the network"));
  }
  switch (pending.is) {
    case Pending::Is::send:
      --to_open_[pending.index];
      break;
    case Pending::Is::envelope:
      open_envelope(pending.index, status);
      break;
    case Pending::Is::payload: {
      int bytes = 0;
      MPI_Get_count(&status, MPI_BYTE, &bytes);
      if (static_cast<std::size_t>(bytes) != pending.bytes) {
        fail(false, message(rank_text(peer), " sent a message of ", bytes, " B where ",
                            pending.bytes, " B were due in ", where(),
                            " (its messages are cut otherwise): set the same chunk_bytes on all "
                            "ranks"));
      }
      --from_[pending.index].open;
      from_[pending.index].received += pending.bytes;
      break;
    }
  }
}

void Transport::open_envelope(std::size_t index, const MPI_Status& status) {
  const Incoming& block = in_[index];
  const std::byte* slot = envelopes_in_.get(0) + index * Envelope::kSlot;
  int received = 0;
  MPI_Get_count(&status, MPI_BYTE, &received);
  Envelope envelope{};
  std::memcpy(&envelope, slot, sizeof(envelope));
  const bool inline_block = envelope.bytes <= kInlineBytes;
  const std::size_t due = sizeof(envelope) + (inline_block ? envelope.bytes : 0);
  if (static_cast<std::size_t>(received) != due || envelope.magic != kMagic) {
    fail(false, message(rank_text(block.peer), " sent something that is no envelope (", received,
                        " B) in ", where(), ": start all ranks with the same build of lshmoe"));
  }

  const Call theirs{envelope.kind, envelope.purpose, envelope.element,
                    envelope.op,   envelope.size,    envelope.root};
  const bool same = theirs.kind == call_.kind && theirs.purpose == call_.purpose &&
                    theirs.element == call_.element && theirs.op == call_.op &&
                    theirs.size == call_.size && theirs.root == call_.root &&
                    envelope.number == number_;
  if (!same) {
    fail(false, message(rank_text(block.peer), " is in ", describe(theirs), ", exchange ",
                        envelope.number, ", while this rank is in ", describe(call_), ", exchange ",
                        number_, ", on '", name_,
                        "' (the ranks disagree about what to do): call the same collectives with "
                        "the same sizes in the same order on every rank"));
  }
  if (envelope.bytes != block.bytes) {
    fail(false, message(rank_text(block.peer), " sends ", envelope.bytes,
                        " B but this rank expects ", block.bytes, " B from it in ", where(),
                        " (the ranks disagree about the sizes): exchange the sizes first"));
  }

  from_[index].arrived = true;
  if (inline_block) {
    if (block.bytes > 0) std::memcpy(block.data, slot + sizeof(envelope), block.bytes);
    from_[index].received = block.bytes;
    return;
  }
  auto* data = static_cast<std::byte*>(block.data);
  for (std::size_t at = 0; at < block.bytes; at += chunk_bytes_) {
    const std::size_t bytes = std::min(chunk_bytes_, block.bytes - at);
    irecv(data + at, bytes, block.peer, kPayloadTag, {Pending::Is::payload, index, bytes});
    ++from_[index].open;
  }
}

bool Transport::data_moves() const {
  return std::any_of(from_.begin(), from_.end(), [](const Peer& peer) { return peer.open > 0; });
}

void Transport::look_for_notes() {
  int found = 0;
  MPI_Status status;
  check(MPI_Iprobe(MPI_ANY_SOURCE, kNoteTag, comm_, &found, &status), "MPI_Iprobe");
  if (!found) return;
  std::array<char, kNoteBytes> note{};
  int bytes = 0;
  MPI_Get_count(&status, MPI_BYTE, &bytes);
  check(MPI_Recv(note.data(), static_cast<int>(note.size()), MPI_BYTE, status.MPI_SOURCE, kNoteTag,
                 comm_, MPI_STATUS_IGNORE),
        "MPI_Recv");
  const bool timed_out = note[0] == 'T';
  fail(timed_out, message(rank_text(status.MPI_SOURCE), " gave up while this rank was in ", where(),
                          "; it said: ",
                          std::string_view(note.data() + 1, static_cast<std::size_t>(bytes - 1))));
}

void Transport::fail_timeout() {
  std::string waited;
  for (std::size_t i = 0; i < in_.size(); ++i) {
    const Peer& peer = from_[i];
    if (peer.arrived && peer.open == 0) continue;
    waited += message(waited.empty() ? "" : "; ", rank_text(in_[i].peer));
    waited += peer.arrived
                  ? message(" (came, ", peer.received, " of ", in_[i].bytes, " B are here)")
                  : std::string(" (has not come)");
  }
  for (std::size_t i = 0; i < out_.size(); ++i) {
    if (to_open_[i] == 0) continue;
    const int peer = out_[i].peer;
    const bool named = std::any_of(in_.begin(), in_.end(), [&](const Incoming& block) {
      const Peer& from = from_[static_cast<std::size_t>(&block - in_.data())];
      return block.peer == peer && !(from.arrived && from.open == 0);
    });
    if (named) continue;
    waited += message(waited.empty() ? "" : "; ", rank_text(peer), " (has not taken the ",
                      out_[i].bytes, " B for it)");
  }
  fail(true, message("no answer for ", timeout_seconds_, " s in ", where(), ": waited for ", waited,
                     "; this rank sends ", row_text(out_), ", receives ", row_text(in_),
                     " (a rank hangs, died or is slow): look at what those ranks do; raise "
                     "--timeout if they were only slow"));
}

void Transport::fail(bool timed_out, const std::string& text) {
  dead_ = text;
  // Nothing may be written to the caller's memory after the throw: take the receives back. Sends
  // cannot be; those whose peer takes them now get a moment to finish.
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    if (requests_[i] != MPI_REQUEST_NULL && pending_[i].is != Pending::Is::send) {
      MPI_Cancel(&requests_[i]);
    }
  }
  // Tell the others, so that they end now and for the right reason. Best effort: a note that MPI
  // does not take at once is given up, and its buffer with it.
  auto* note = new std::string(message(timed_out ? 'T' : 'E', text.substr(0, kNoteBytes - 1)));
  for (int peer = 0; peer < size_; ++peer) {
    MPI_Request request = MPI_REQUEST_NULL;
    if (peer == rank_ || MPI_Isend(note->data(), static_cast<int>(note->size()), MPI_BYTE, peer,
                                   kNoteTag, comm_, &request) != MPI_SUCCESS) {
      continue;
    }
    requests_.push_back(request);
  }
  const Deadline deadline(0.05);
  int done = 0;
  while (!done && !deadline.expired()) {
    MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done, MPI_STATUSES_IGNORE);
    if (!done) ::sched_yield();
  }
  if (done) delete note;
  if (timed_out) throw Timeout(text);
  throw CommError(text);
}

void Transport::fail_mpi(int code, const std::string& text) {
  fail(false, text + " (" + error_text(code) + ")");
}

void Transport::check(int code, std::string_view what) {
  if (code != MPI_SUCCESS) fail_mpi(code, message(what, " failed in ", where()));
}

std::string Transport::describe(const Call& call) const {
  std::string text = message(name_of(call.kind), " for ", lshmoe::name_of(call.purpose));
  if (call.kind == Kind::broadcast || call.kind == Kind::gather) {
    text += message(" with root ", call.root);
  }
  if (call.kind == Kind::all_reduce) {
    static constexpr std::array<const char*, 3> kElements{"f32", "f64", "i64"};
    static constexpr std::array<const char*, 3> kOps{"sum", "min", "max"};
    text += message(" (", call.op < 3 ? kOps[call.op] : "?", " of ",
                    call.element < 3 ? kElements[call.element] : "?", ")");
  }
  if (call.size > 0) {
    text += message(" of ", call.size, call.kind == Kind::all_to_all ? " B per rank" : " B");
  }
  return text;
}

std::string Transport::where() const {
  return message(describe(call_), " on '", name_, "', exchange ", number_);
}

std::string Transport::rank_text(int peer) const {
  const auto index = static_cast<std::size_t>(peer);
  std::string text = message("rank ", index < world_ranks.size() ? world_ranks[index] : peer);
  if (index < hosts.size()) text += " on " + hosts[index];
  return text;
}

}  // namespace lshmoe::mpi
