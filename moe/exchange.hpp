#pragma once
// Exchange: rows between the ranks of an expert group, coded; what all four directions share.

#include <torch/custom_class.h>
#include <torch/torch.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/compress/codec.hpp"
#include "lshmoe/moe/dispatcher.hpp"
#include "lshmoe/moe/lane.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Byte buffers in host memory that are kept from call to call: fresh memory costs more than the
/// copies into it. Thread-safe.
class ByteBuffers {
 public:
  /// uint8, `bytes` at least, not initialized. It is given to nobody else as long as a tensor
  /// refers to its memory.
  [[nodiscard]] at::Tensor take(int64_t bytes);

 private:
  struct Pool {
    std::mutex mutex;
    std::vector<at::Tensor> free;
  };
  std::shared_ptr<Pool> pool_ = std::make_shared<Pool>();
};

/// What the forwards of one Dispatcher share: options, ranks, codecs (made once per dtype and
/// device of rows) and byte buffers. Thread-safe, but see Communicator about groups of several
/// ranks.
class ExchangeContext {
 public:
  /// Throws InvalidArgument for options that do not fit each other or the communicator.
  ExchangeContext(DispatcherOptions options, std::shared_ptr<Communicator> comm);

  [[nodiscard]] Codec& codec(Direction direction, const at::Tensor& rows);
  /// See Dispatcher. Collective over the expert group.
  void refresh_codecs();
  [[nodiscard]] StateStats state_stats(Direction direction);
  [[nodiscard]] bool restores_at_source() const;
  [[nodiscard]] int64_t ranks() const { return comm->size(); }
  [[nodiscard]] int64_t num_local_experts() const { return options.num_experts() / ranks(); }
  /// "rank 3", the number being that of the world; for error texts.
  [[nodiscard]] std::string name_of_rank(int64_t rank) const;

  /// The compute stream of `device` and, on a GPU, this context's own stream for exchanges.
  [[nodiscard]] Lanes lanes(at::Device device);

  const DispatcherOptions options;
  const std::shared_ptr<Communicator> comm;
  /// Its place among those made on `comm`, from 1: ranks that call two in different orders notice.
  const int64_t object;

 private:
  friend class Exchange;
  std::mutex mutex_;
  int64_t forwards_ = 0;
  std::map<std::tuple<Direction, at::ScalarType, at::DeviceType>, std::shared_ptr<Codec>> codecs_;
  ByteBuffers buffers_;
  std::optional<at::Stream> exchange_stream_;  // made when first asked for
};

/// The counts of an Exchange from int64 [n] on any device. Throws InvalidArgument.
[[nodiscard]] std::shared_ptr<std::vector<int64_t>> counts_to_sum(const at::Tensor& counts);

/// Adds what one encode call did; swap() does it for the parcels that it makes.
void add_codec_stats(DirectionStats& stats, const CodecStats& codec);

/// Rows to send. Groups are (destination rank, group of that rank): one group a rank for
/// restore=expert, one for each local expert for restore=source.
struct RowsOut {
  Direction direction = Direction::dispatch;
  at::Tensor rows;   ///< [any, hidden], contiguous, on the CPU or a GPU
  at::Tensor index;  ///< int64 [N], CPU: the rows to send, by group; undefined: all in order
  std::vector<int64_t> rows_per_group;  ///< [ranks * groups]
  /// Parcels of the rows that pass the codec, made already; null: made by swap().
  const Encoded* encoded = nullptr;
  int64_t non_finite_row = -1;  ///< >= 0: this rank cannot encode that row and abandons the step
  std::vector<int64_t> assignments;       ///< [ranks]: a number the peer is told
  at::Tensor attachment;                  ///< uint8 [sum(attachment_bytes)], CPU; undefined: none
  std::vector<int64_t> attachment_bytes;  ///< [ranks]: plan or gradients sent in front of the rows
  std::vector<int64_t> expected_rows;  ///< [ranks * groups] that must come; empty: whatever comes
  /// Bytes of attachment that must come from `rank` with so many rows and assignments, -1 where
  /// there are no such rows; null: none.
  std::function<int64_t(int64_t rank, int64_t rows, int64_t assignments)> attachment_due;
  int64_t raw_rows = 0;  ///< rows of the plan for other ranks, for bytes_raw
  int64_t top_k = 0;
};

/// Rows that came, still coded. Owns what it points into.
struct RowsIn {
  std::vector<int64_t> rows_per_group;                 ///< [ranks * groups]
  std::vector<int64_t> assignments;                    ///< [ranks]
  std::vector<std::span<const std::byte>> attachment;  ///< [ranks]

  // For unpack().
  Direction direction = Direction::dispatch;
  std::vector<int64_t> parcel_begin;  ///< [ranks]: offset of the source's parcels in `bytes`
  std::vector<int64_t> parcel_bytes;  ///< [ranks * groups]
  at::Tensor bytes;                   ///< on the rows' device
  at::Tensor attachments;             ///< rows on a GPU: what `attachment` points into
  at::Tensor own_rows, own_index;  ///< rows that stay, picked by own_index; without codec_on_self
};

/// One forward and its backward: its statistics, and the exchanges themselves. Several threads may
/// use one that counts nothing.
class Exchange : public torch::CustomClassHolder {
 public:
  /// `stats`: those of the forward that this belongs to; null: nobody asks. requires_grad: this
  /// forward has a backward; the ranks check that they agree, or some would never enter its
  /// exchanges. `counts`: this rank's, 0 .. 2^31 - 1, as many on every rank; null: none. The
  /// dispatch sends them in front of its attachment and leaves the group's sums in their place.
  explicit Exchange(std::shared_ptr<ExchangeContext> context,
                    std::shared_ptr<ExchangeStats> stats = nullptr, bool requires_grad = false,
                    std::shared_ptr<std::vector<int64_t>> counts = nullptr);
  /// The same for a call of an op whose inputs do, or do not, require gradients.
  [[nodiscard]] c10::intrusive_ptr<Exchange> for_call(bool requires_grad) const;

  /// Encodes and swaps rows: sizes by one fixed all-to-all, everything in it checked against this
  /// rank's own values and against what is possible before anything is allocated, then one
  /// all-to-all-v. Collective over the expert group; none in a group of one. Throws CommError
  /// naming the peer that disagrees, and StepAbandoned on all ranks alike where one of them holds
  /// rows that the codec refuses, or was asked to stop (see abandon.hpp).
  [[nodiscard]] RowsIn swap(const RowsOut& out);

  /// Decodes row i of what came (by source rank, then group) into out[index[i]]; index int64, CPU.
  /// Local.
  /// Throws InvalidArgument naming the peer whose bytes are damaged.
  void unpack(const RowsIn& in, at::Tensor& out, const at::Tensor& index);

  [[nodiscard]] ExchangeContext& context() const { return *context_; }

  const bool requires_grad;
  const std::shared_ptr<ExchangeStats> stats;

 private:
  struct Bytes;  // to and from each rank
  void send_from_host(const RowsOut& out, const at::Tensor& parcels, const Bytes& bytes, RowsIn& in,
                      PhaseTimer& exchange_time);
  void send_from_gpu(const RowsOut& out, const at::Tensor& parcels, const Bytes& bytes, RowsIn& in,
                     PhaseTimer& exchange_time);
  void decode(const Codec& codec, const RowsIn& in, at::Tensor& out, const at::Tensor& index,
              bool whole) const;

  std::shared_ptr<ExchangeContext> context_;
  std::shared_ptr<std::vector<int64_t>> counts_;
};

}  // namespace lshmoe
