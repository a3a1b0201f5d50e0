#include "lshmoe/moe/exchange.hpp"

#include <ATen/record_function.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "lshmoe/comm/keep_buffer.hpp"
#include "lshmoe/moe/device_rows.hpp"
#include "lshmoe/moe/layer_number.hpp"
#include "lshmoe/runtime/abandon.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

/// First part of what every rank tells every other before an exchange; behind it {rows, parcel
/// bytes} of each group. Trivially copyable: it travels as it lies in memory.
struct CallHeader {
  std::uint8_t version = 3;
  std::uint8_t direction = 0;
  std::uint8_t dtype = 0;  // and kOnGpu
  std::uint8_t flags = 0;
  std::int32_t object = 0;
  std::int64_t layer = 0;
  std::int32_t hidden_size = 0;
  std::int32_t num_experts = 0;
  std::int32_t top_k = 0;
  std::uint32_t forward = 0;  // its number's low bits; 0: nobody counts
  std::int64_t assignments = 0;
  std::int64_t attachment_bytes = 0;
};
static_assert(sizeof(CallHeader) == 48 && std::is_trivially_copyable_v<CallHeader>);

constexpr std::uint8_t kOnGpu = 0x80;

// Flags of a call: a backward will follow; why its sender abandons the step; restore=source; counts
// stand in front of the attachment.
constexpr std::uint8_t kRequiresGrad = 1, kStop = 2, kNotFinite = 4, kSource = 8, kCounts = 16;

struct GroupHeader {
  std::int64_t rows = 0;
  std::int64_t parcel_bytes = 0;
};

/// No exchange comes near this many bytes or assignments; a number above it is damage.
constexpr std::int64_t kMost = std::int64_t{1} << 44;

Purpose purpose_of(Direction direction) {
  switch (direction) {
    case Direction::dispatch:
      return Purpose::dispatch;
    case Direction::combine:
      return Purpose::combine;
    case Direction::combine_backward:
      return Purpose::combine_backward;
    case Direction::dispatch_backward:
      return Purpose::dispatch_backward;
  }
  throw InvalidArgument("a direction that is none of the four");
}

std::int64_t total(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), std::int64_t{0});
}

std::vector<int64_t> sum_of(std::vector<int64_t> a, const std::vector<int64_t>& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

std::byte* data_of(const at::Tensor& buffer) {
  return static_cast<std::byte*>(buffer.mutable_data_ptr());
}

/// make(bytes), a tensor for bytes that peers announced: they may be more than there is memory for.
template <class Make>
at::Tensor room_for_announced(std::int64_t bytes, const std::string& comm, Make make) {
  try {
    return make(bytes);
  } catch (const c10::Error&) {
    throw CommError(detail::message("the ranks of '", comm, "' announce ", bytes,
                                    " bytes, which this machine has no memory for: send fewer "
                                    "tokens at a time, or their sizes are damaged"));
  }
}

/// Whether parcels of any kind hold `rows` rows in `bytes` bytes: a bit for every four elements at
/// least, and not much more than the rows themselves.
bool fits_parcel(std::int64_t rows, std::int64_t bytes, std::int64_t hidden, std::int64_t element) {
  constexpr auto kHeader = static_cast<std::int64_t>(ParcelHeader::kBytes);
  if (rows == 0 || bytes == 0) return rows == bytes;
  return rows > 0 && rows <= std::numeric_limits<std::uint32_t>::max() &&
         bytes >= kHeader + rows * (hidden / 32 + 1) && bytes <= kMost &&
         (bytes - kHeader) / rows <= 2 * element * hidden + 64;
}

void check_call(const CallHeader& mine, const CallHeader& theirs, const std::string& peer) {
  const auto check = [&](const char* what, auto here, auto there) {
    if (here == there) return;
    throw CommError(detail::message(
        peer, " disagrees about the ", what, " of an exchange (", there, " there, ", here,
        " here): make and run the same layers, with the same options, in the same order on every "
        "rank"));
  };
  const auto direction = [](std::uint8_t d) {
    return d < 4 ? std::string(name_of(static_cast<Direction>(d))) : "damaged";
  };
  check("format", +mine.version, +theirs.version);
  check("direction", direction(mine.direction), direction(theirs.direction));
  const auto layer = [](const CallHeader& header) {
    return detail::message(name_of_layer(header.layer), ", object ", header.object,
                           " of the group");
  };
  check("layer", layer(mine), layer(theirs));
  const auto dtype = [](std::uint8_t d) {
    return at::toString(static_cast<at::ScalarType>(d & ~kOnGpu));
  };
  check("row dtype", std::string(dtype(mine.dtype)), std::string(dtype(theirs.dtype)));
  const auto device = [](std::uint8_t d) { return (d & kOnGpu) != 0 ? "GPU" : "CPU"; };
  check("rows' device", std::string(device(mine.dtype)), std::string(device(theirs.dtype)));
  check("hidden_size", mine.hidden_size, theirs.hidden_size);
  check("num_experts", mine.num_experts, theirs.num_experts);
  check("top_k", mine.top_k, theirs.top_k);
  const auto restore = [](std::uint8_t flags) {
    return (flags & kSource) != 0 ? "source" : "expert";
  };
  check("restore", restore(mine.flags), restore(theirs.flags));
  check("gradient (1 = a backward will follow)", mine.flags & kRequiresGrad,
        theirs.flags & kRequiresGrad);
  check("world's load (1 = counted: in training with an aux loss)",
        (mine.flags & kCounts) / kCounts, (theirs.flags & kCounts) / kCounts);
  check("number of the layer's forward", mine.forward, theirs.forward);
}

/// Before all other checks: who abandons a step announces nothing else that fits.
void throw_if_abandoned(const CallHeader& mine, const CallHeader& theirs, const std::string& peer) {
  if (theirs.version != mine.version || (theirs.flags & (kStop | kNotFinite)) == 0) return;
  const std::string where = detail::message(name_of(static_cast<Direction>(mine.direction)), " of ",
                                            name_of_layer(mine.layer));
  if ((theirs.flags & kNotFinite) != 0) {
    throw StepAbandoned(StepAbandoned::Reason::not_finite,
                        detail::message("row ", theirs.assignments, " of what ", peer, " sends in ",
                                        where, " holds NaN or infinity"));
  }
  throw StepAbandoned(StepAbandoned::Reason::stop,
                      detail::message(peer, " was asked to stop, before ", where));
}

}  // namespace

at::Tensor ByteBuffers::take(int64_t bytes) {
  at::Tensor buffer;
  {
    const std::lock_guard lock(pool_->mutex);
    // The smallest that is large enough, else the largest.
    const auto best = std::min_element(
        pool_->free.begin(), pool_->free.end(), [bytes](const at::Tensor& a, const at::Tensor& b) {
          const bool fits = a.numel() >= bytes, other_fits = b.numel() >= bytes;
          return fits != other_fits ? fits : fits ? a.numel() < b.numel() : a.numel() > b.numel();
        });
    if (best != pool_->free.end()) {
      buffer = std::move(*best);
      pool_->free.erase(best);
    }
  }
  if (!buffer.defined() || buffer.numel() < bytes) {
    buffer.reset();  // first, so that the two are never held together
    buffer = at::empty({bytes}, at::kByte);
  }
  // The memory comes back when the last tensor that refers to it goes, whichever thread that is in.
  void* const data = buffer.mutable_data_ptr();
  const int64_t size = buffer.numel();
  return at::from_blob(
      data, {size},
      [pool = pool_, buffer = std::move(buffer)](void*) {
        const std::lock_guard lock(pool->mutex);
        pool->free.push_back(buffer);
      },
      at::kByte);
}

ExchangeContext::ExchangeContext(DispatcherOptions o, std::shared_ptr<Communicator> communicator)
    : options(numbered(std::move(o))),
      comm(std::move(communicator)),
      object(comm != nullptr ? comm->number_object() : 0) {
  LSHMOE_VALIDATE(comm != nullptr, "the expert group is null: make it by make_expert_groups()");
  validate(options, comm->size());
}

Codec& ExchangeContext::codec(Direction direction, const at::Tensor& rows) {
  const std::lock_guard lock(mutex_);
  const at::ScalarType dtype = rows.scalar_type();
  auto& codec = codecs_[{direction, dtype, rows.device().type()}];
  if (codec == nullptr) {
    codec =
        make_codec(options.codec(direction), {options.hidden_size(), *options.layer(), direction,
                                              dtype, at::Device(rows.device().type())});
  }
  return *codec;
}

void ExchangeContext::refresh_codecs() {
  RECORD_FUNCTION("lshmoe::refresh_codecs", std::vector<c10::IValue>{});
  const std::lock_guard lock(mutex_);
  // In the order of their keys, which is the same on all ranks.
  for (const auto& item : codecs_) item.second->refresh(*comm);
}

StateStats ExchangeContext::state_stats(Direction direction) {
  const std::lock_guard lock(mutex_);
  StateStats sum;
  for (const auto& [key, codec] : codecs_) {
    if (std::get<Direction>(key) != direction) continue;
    const StateStats stats = codec->state_stats();
    sum.version = std::max(sum.version, stats.version);
    sum.centroids = std::max(sum.centroids, stats.centroids);
    sum.checksum += stats.checksum;
    sum.state_bytes += stats.state_bytes;
    sum.memory_bytes += stats.memory_bytes;
    sum.bytes_sent += stats.bytes_sent;
    sum.seconds += stats.seconds;
  }
  return sum;
}

Lanes ExchangeContext::lanes(at::Device device) {
  const std::lock_guard lock(mutex_);
  if (!device.is_cpu() && (!exchange_stream_ || exchange_stream_->device() != device)) {
    exchange_stream_ = c10::impl::VirtualGuardImpl(device.type())
                           .getStreamFromGlobalPool(device, /*isHighPriority=*/true);
  }
  return {device, exchange_stream_};
}

bool ExchangeContext::restores_at_source() const {
  return sends_centroids(options.codec(Direction::dispatch));
}

std::string ExchangeContext::name_of_rank(int64_t rank) const {
  return "rank " + std::to_string(comm->world_rank(static_cast<int>(rank)));
}

std::shared_ptr<std::vector<int64_t>> counts_to_sum(const at::Tensor& counts) {
  LSHMOE_VALIDATE(counts.dim() == 1 && counts.scalar_type() == at::kLong, "counts is ",
                  counts.scalar_type(), " ", counts.sizes(), " (must be int64 [n])");
  const at::Tensor host = counts.to(at::kCPU).contiguous();
  const auto* values = host.const_data_ptr<int64_t>();
  auto sum = std::make_shared<std::vector<int64_t>>(values, values + host.numel());
  for (const int64_t count : *sum) {
    LSHMOE_VALIDATE(count >= 0 && count <= std::numeric_limits<std::int32_t>::max(),
                    "counts holds ", count, " (must be 0 to 2^31 - 1)");
  }
  return sum;
}

void add_codec_stats(DirectionStats& stats, const CodecStats& codec) {
  stats.rows += codec.rows;
  stats.clusters += codec.clusters;
  stats.whole_rows += codec.whole_rows;
  stats.max_relative_error = std::max(stats.max_relative_error, codec.max_relative_error);
  if (codec.rows > 0) {
    stats.mean_relative_error +=
        (codec.mean_relative_error - stats.mean_relative_error) *
        (static_cast<double>(codec.rows) / static_cast<double>(stats.rows));
  }
  stats.max_error_ratio = std::max(stats.max_error_ratio, codec.max_error_ratio);
}

/// [ranks] each.
struct Exchange::Bytes {
  explicit Bytes(std::size_t ranks)
      : attachments_out(ranks), parcels_out(ranks), attachments_in(ranks), parcels_in(ranks) {}
  std::vector<int64_t> attachments_out, parcels_out, attachments_in, parcels_in;
  at::Tensor attachment;  ///< to send, as RowsOut's; in front of each rank's part the counts
};

Exchange::Exchange(std::shared_ptr<ExchangeContext> context,
                   std::shared_ptr<ExchangeStats> forward_stats, bool has_backward,
                   std::shared_ptr<std::vector<int64_t>> counts)
    : requires_grad(has_backward),
      stats(std::move(forward_stats)),
      context_(std::move(context)),
      counts_(std::move(counts)) {}

c10::intrusive_ptr<Exchange> Exchange::for_call(bool has_backward) const {
  return c10::make_intrusive<Exchange>(context_, stats, has_backward, counts_);
}

RowsIn Exchange::swap(const RowsOut& out) {
  ExchangeContext& c = *context_;
  Communicator& comm = *c.comm;
  const int64_t ranks = c.ranks(), own = comm.rank(), hidden = c.options.hidden_size();
  const auto groups = static_cast<int64_t>(out.rows_per_group.size()) / ranks;
  LSHMOE_ASSERT(groups >= 1 && groups * ranks == static_cast<int64_t>(out.rows_per_group.size()));
  DirectionStats unread;
  DirectionStats& s = stats ? (*stats)[out.direction] : unread;
  const auto group_range = [&](int64_t rank) {
    return std::pair(rank * groups, (rank + 1) * groups);
  };

  // Rows that stay on this rank do not pass the codec.
  RowsIn in;
  in.direction = out.direction;
  std::vector<int64_t> coded = out.rows_per_group;
  at::Tensor coded_index = out.index;
  if (!c.options.codec_on_self()) {
    const auto [first_group, last_group] = group_range(own);
    const auto begin = coded.begin();
    const int64_t before = std::accumulate(begin, begin + first_group, int64_t{0});
    const int64_t stay = std::accumulate(begin + first_group, begin + last_group, int64_t{0});
    std::fill(begin + first_group, begin + last_group, 0);
    const at::Tensor index =
        out.index.defined() ? out.index : at::arange(total(out.rows_per_group), at::kLong);
    in.own_rows = out.rows;
    in.own_index = index.narrow(0, before, stay);
    const int64_t after = index.size(0) - before - stay;
    coded_index =
        before == 0  ? index.narrow(0, stay, after)
        : after == 0 ? index.narrow(0, 0, before)
                     : at::cat({index.narrow(0, 0, before), index.narrow(0, before + stay, after)});
  }

  Encoded made;
  const Encoded* encoded = out.encoded;
  int64_t non_finite_row = out.non_finite_row;
  if (encoded == nullptr) {
    RECORD_FUNCTION("lshmoe::encode", std::vector<c10::IValue>{});
    const PhaseTimer::Span span(s.codec_time, out.rows.device());
    Codec& codec = c.codec(out.direction, out.rows);
    if (out.rows.is_cpu() || total(coded) > 0) {
      try {
        made = codec.encode(out.rows, coded_index, coded);
        if (requires_grad) codec.observe(out.rows, coded_index);
      } catch (const NonFiniteRow& error) {
        // The peers are on their way into this exchange: they hear of it there.
        non_finite_row = error.row;
      }
    }
    if (!made.bytes.defined()) {
      // Nothing leaves this rank; a GPU's codec would still be started, or all rows staged.
      made.bytes = at::empty({0}, out.rows.options().dtype(at::kByte));
      made.bytes_per_group.assign(coded.size(), 0);
    }
    add_codec_stats(s, made.stats);
    encoded = &made;
  }
  s.bytes_raw += 2 * hidden * out.raw_rows;

  const bool has_counts = out.direction == Direction::dispatch && counts_ != nullptr;
  const std::vector<std::int32_t> counts =
      has_counts ? std::vector<std::int32_t>(counts_->begin(), counts_->end())
                 : std::vector<std::int32_t>();
  const std::size_t count_bytes = counts.size() * sizeof(std::int32_t);

  // Sizes, and whether all ranks are in the same call.
  CallHeader mine;
  mine.direction = static_cast<std::uint8_t>(out.direction);
  mine.dtype = static_cast<std::uint8_t>(static_cast<std::uint8_t>(out.rows.scalar_type()) |
                                         (out.rows.is_cpu() ? 0 : kOnGpu));
  mine.flags = static_cast<std::uint8_t>(
      (requires_grad ? kRequiresGrad : 0) | (c.restores_at_source() ? kSource : 0) |
      (has_counts ? kCounts : 0) | (abandon_requested() ? kStop : 0) |
      (non_finite_row < 0 ? 0 : kNotFinite));
  mine.object = static_cast<std::int32_t>(c.object);
  mine.layer = *c.options.layer();
  mine.hidden_size = static_cast<std::int32_t>(hidden);
  mine.num_experts = static_cast<std::int32_t>(c.options.num_experts());
  mine.top_k = static_cast<std::int32_t>(out.top_k);
  if (stats != nullptr) {
    if (stats->forward == 0) {
      const std::lock_guard lock(c.mutex_);
      stats->forward = ++c.forwards_;
    }
    mine.forward = static_cast<std::uint32_t>(stats->forward);
  }
  const std::size_t header_bytes =
      sizeof(CallHeader) + static_cast<std::size_t>(groups) * sizeof(GroupHeader);
  std::vector<std::byte> headers(header_bytes * static_cast<std::size_t>(ranks));
  Bytes bytes(static_cast<std::size_t>(ranks));
  for (int64_t r = 0; r < ranks; ++r) {
    const auto i = static_cast<std::size_t>(r);
    CallHeader header = mine;
    header.assignments = non_finite_row >= 0       ? non_finite_row
                         : out.assignments.empty() ? 0
                                                   : out.assignments[i];
    header.attachment_bytes = static_cast<int64_t>(count_bytes) +
                              (out.attachment_bytes.empty() ? 0 : out.attachment_bytes[i]);
    int64_t parcels = 0;
    std::byte* to = headers.data() + i * header_bytes;
    std::memcpy(to, &header, sizeof header);
    to += sizeof header;
    const auto [first_group, last_group] = group_range(r);
    for (int64_t g = first_group; g < last_group; ++g, to += sizeof(GroupHeader)) {
      const auto j = static_cast<std::size_t>(g);
      const GroupHeader group{out.rows_per_group[j], encoded->bytes_per_group[j]};
      std::memcpy(to, &group, sizeof group);
      parcels += group.parcel_bytes;
    }
    bytes.attachments_out[i] = header.attachment_bytes;
    bytes.parcels_out[i] = parcels;
    if (r != own) {
      s.codec_bytes += parcels;
      s.plan_bytes += header.attachment_bytes + static_cast<int64_t>(header_bytes);
    }
  }
  std::vector<std::byte> peers;
  std::optional<Communicator::Turn> turn;
  if (ranks > 1) {
    turn.emplace(comm);  // for sizes and rows
    RECORD_FUNCTION("lshmoe::all_to_all", std::vector<c10::IValue>{});
    const PhaseTimer::Span span(s.exchange_time, out.rows.device());
    peers.resize(headers.size());
    keep_buffer_on_error(headers, [&] {
      comm.all_to_all(headers.data(), peers.data(), header_bytes, Purpose::plan);
    });
  } else {
    peers = headers;
  }

  for (int64_t r = 0; r < ranks; ++r) {
    CallHeader header;
    std::memcpy(&header, peers.data() + static_cast<std::size_t>(r) * header_bytes, sizeof header);
    throw_if_abandoned(mine, header, c.name_of_rank(r));
  }
  in.rows_per_group.resize(out.rows_per_group.size());
  in.parcel_bytes.resize(out.rows_per_group.size());
  in.assignments.resize(static_cast<std::size_t>(ranks));
  in.parcel_begin.resize(static_cast<std::size_t>(ranks));
  int64_t received = 0;
  for (int64_t r = 0; r < ranks; ++r) {
    const auto i = static_cast<std::size_t>(r);
    CallHeader header;
    const std::byte* from = peers.data() + i * header_bytes;
    std::memcpy(&header, from, sizeof header);
    from += sizeof header;
    check_call(mine, header, c.name_of_rank(r));
    const auto check = [&](bool possible, auto... text) {
      if (possible) return;
      throw CommError(detail::message(c.name_of_rank(r), " announces ", text..., " in ",
                                      name_of(out.direction),
                                      " (no such exchange exists): the ranks are in different "
                                      "forwards, or its bytes are damaged"));
    };
    const auto [first_group, last_group] = group_range(r);
    const bool coded_rows = r != own || c.options.codec_on_self();
    int64_t rows = 0, parcels = 0;
    for (int64_t g = first_group; g < last_group; ++g, from += sizeof(GroupHeader)) {
      const auto j = static_cast<std::size_t>(g);
      GroupHeader group;
      std::memcpy(&group, from, sizeof group);
      if (!out.expected_rows.empty() && group.rows != out.expected_rows[j]) {
        throw CommError(detail::message(
            c.name_of_rank(r), " sends ", group.rows, " rows in ", name_of(out.direction),
            ", but the plan says ", out.expected_rows[j], ": the ranks are in different forwards"));
      }
      check(!coded_rows || fits_parcel(group.rows, group.parcel_bytes, hidden,
                                       static_cast<int64_t>(out.rows.element_size())),
            group.rows, " rows of ", hidden, " elements in ", group.parcel_bytes, " bytes");
      in.rows_per_group[j] = group.rows;
      in.parcel_bytes[j] = group.parcel_bytes;
      rows += group.rows;
      parcels += group.parcel_bytes;
      check(parcels <= kMost, parcels, " bytes of rows");
    }
    check(header.assignments >= 0 && header.assignments <= kMost, header.assignments,
          " assignments");
    const int64_t due =
        out.attachment_due ? out.attachment_due(r, rows, header.assignments) : int64_t{0};
    const int64_t attached = static_cast<int64_t>(count_bytes) + due;
    check(due >= 0 && due <= kMost && header.attachment_bytes == attached, header.attachment_bytes,
          " bytes beside ", rows, " rows with ", header.assignments, " assignments");
    in.assignments[i] = header.assignments;
    bytes.attachments_in[i] = attached;
    bytes.parcels_in[i] = parcels;
    received += attached + parcels;
    check(received <= kMost, attached + parcels, " bytes");
  }

  bytes.attachment = out.attachment;
  if (has_counts) {
    bytes.attachment = at::empty({total(bytes.attachments_out)}, at::kByte);
    std::byte* to = data_of(bytes.attachment);
    const auto* from = out.attachment.defined()
                           ? static_cast<const std::byte*>(out.attachment.const_data_ptr())
                           : nullptr;
    for (const int64_t size : bytes.attachments_out) {
      const std::size_t rest = static_cast<std::size_t>(size) - count_bytes;
      std::memcpy(to, counts.data(), count_bytes);
      if (rest > 0) std::memcpy(to + count_bytes, from, rest);
      to += size;
      from += rest;
    }
  }

  if (out.rows.is_cpu()) {
    send_from_host(out, encoded->bytes, bytes, in, s.exchange_time);
  } else {
    send_from_gpu(out, encoded->bytes, bytes, in, s.exchange_time);
  }
  if (has_counts) {
    std::fill(counts_->begin(), counts_->end(), 0);
    for (int64_t r = 0; r < ranks; ++r) {
      std::span<const std::byte>& part = in.attachment[static_cast<std::size_t>(r)];
      for (int64_t& sum : *counts_) {
        std::int32_t count = 0;
        std::memcpy(&count, part.data(), sizeof count);
        part = part.subspan(sizeof count);
        if (count < 0) {
          throw CommError(detail::message(c.name_of_rank(r), " counts ", count,
                                          " choices in dispatch: its bytes are damaged"));
        }
        sum += count;
      }
    }
  }
  return in;
}

// Attachments and parcels, rank after rank; without attachments the parcels are that already.
void Exchange::send_from_host(const RowsOut& out, const at::Tensor& parcels, const Bytes& bytes,
                              RowsIn& in, PhaseTimer& exchange_time) {
  ExchangeContext& c = *context_;
  const std::vector<int64_t> send_bytes = sum_of(bytes.attachments_out, bytes.parcels_out),
                             receive_bytes = sum_of(bytes.attachments_in, bytes.parcels_in);
  const void* send = parcels.const_data_ptr();
  at::Tensor send_buffer = parcels;
  if (bytes.attachment.defined()) {
    send_buffer = c.buffers_.take(total(send_bytes));
    std::byte* to = data_of(send_buffer);
    send = to;
    const auto* attachment = static_cast<const std::byte*>(bytes.attachment.const_data_ptr());
    const auto* parcel = static_cast<const std::byte*>(parcels.const_data_ptr());
    for (std::size_t i = 0; i < send_bytes.size(); ++i) {
      const auto front = static_cast<std::size_t>(bytes.attachments_out[i]);
      const auto back = static_cast<std::size_t>(bytes.parcels_out[i]);
      if (front > 0) std::memcpy(to, attachment, front);
      if (back > 0) std::memcpy(to + front, parcel, back);
      attachment += front;
      parcel += back;
      to += front + back;
    }
  }
  if (c.ranks() > 1) {
    RECORD_FUNCTION("lshmoe::all_to_all", std::vector<c10::IValue>{});
    const PhaseTimer::Span span(exchange_time, out.rows.device());
    in.bytes = room_for_announced(total(receive_bytes), c.comm->name(),
                                  [&c](int64_t size) { return c.buffers_.take(size); });
    keep_buffer_on_error(send_buffer, [&] {
      c.comm->all_to_all_v(send, send_bytes, data_of(in.bytes), receive_bytes,
                           purpose_of(out.direction));
    });
  } else {
    in.bytes = send_buffer;
  }
  const auto* received = static_cast<const std::byte*>(in.bytes.const_data_ptr());
  int64_t begin = 0;
  for (std::size_t i = 0; i < receive_bytes.size(); ++i) {
    in.attachment.emplace_back(received + begin, static_cast<std::size_t>(bytes.attachments_in[i]));
    in.parcel_begin[i] = begin + bytes.attachments_in[i];
    begin += receive_bytes[i];
  }
}

void Exchange::send_from_gpu(const RowsOut& out, const at::Tensor& parcels, const Bytes& bytes,
                             RowsIn& in, PhaseTimer& exchange_time) {
  ExchangeContext& c = *context_;
  in.attachments = bytes.attachment;
  in.bytes = parcels;
  if (c.ranks() > 1) {
    RECORD_FUNCTION("lshmoe::all_to_all", std::vector<c10::IValue>{});
    const PhaseTimer::Span span(exchange_time, out.rows.device());
    const auto fresh = [](const at::TensorOptions& options) {
      return [options](int64_t size) { return at::empty({size}, options); };
    };
    const Purpose purpose = purpose_of(out.direction);
    if (bytes.attachment.defined()) {
      at::Tensor send = bytes.attachment;
      in.attachments =
          room_for_announced(total(bytes.attachments_in), c.comm->name(), fresh(at::kByte));
      keep_buffer_on_error(send, [&] {
        c.comm->all_to_all_v(send.const_data_ptr(), bytes.attachments_out, data_of(in.attachments),
                             bytes.attachments_in, purpose);
      });
    }
    // Fresh memory of the current stream, as all that reads it: the allocator orders its reuse.
    in.bytes =
        room_for_announced(total(bytes.parcels_in), c.comm->name(), fresh(parcels.options()));
    const c10::DeviceGuard on_device(parcels.device());
    c.comm->all_to_all_v(parcels.const_data_ptr(), bytes.parcels_out, data_of(in.bytes),
                         bytes.parcels_in, purpose, current_stream(parcels.device()));
  }
  const auto* attachments = in.attachments.defined()
                                ? static_cast<const std::byte*>(in.attachments.const_data_ptr())
                                : nullptr;
  int64_t begin = 0;
  for (std::size_t i = 0; i < bytes.parcels_in.size(); ++i) {
    const auto size = static_cast<std::size_t>(bytes.attachments_in[i]);
    in.attachment.emplace_back(attachments, size);
    if (size > 0) attachments += size;
    in.parcel_begin[i] = begin;
    begin += bytes.parcels_in[i];
  }
}

void Exchange::unpack(const RowsIn& in, at::Tensor& out, const at::Tensor& index) {
  RECORD_FUNCTION("lshmoe::decode", std::vector<c10::IValue>{});
  PhaseTimer unread;
  const PhaseTimer::Span span(stats ? (*stats)[in.direction].codec_time : unread, out.device());
  const Codec& codec = context_->codec(in.direction, out);
  if (in.own_index.defined()) {
    const auto groups = static_cast<int64_t>(in.rows_per_group.size()) / context_->ranks();
    const auto own = in.rows_per_group.begin() + context_->comm->rank() * groups;
    const int64_t before = std::accumulate(in.rows_per_group.begin(), own, int64_t{0});
    LSHMOE_ASSERT(std::accumulate(own, own + groups, int64_t{0}) == in.own_index.size(0));
    copy_rows(out, index.narrow(0, before, in.own_index.size(0)), in.own_rows, in.own_index);
  }
  if (out.is_cpu()) return decode(codec, in, out, index, /*whole=*/false);
  // A call of a GPU's codec waits for the GPU, so all ranks' rows in one. It cannot say whose bytes
  // are damaged: then they are looked at rank by rank.
  try {
    decode(codec, in, out, index, /*whole=*/true);
  } catch (const InvalidArgument&) {
    decode(codec, in, out, index, /*whole=*/false);
    throw;
  }
}

// What came from the other ranks (and the own, where it was coded): by one call, or rank by rank.
void Exchange::decode(const Codec& codec, const RowsIn& in, at::Tensor& out,
                      const at::Tensor& index, bool whole) const {
  const int64_t ranks = context_->ranks(), own = context_->comm->rank();
  const auto groups = static_cast<int64_t>(in.rows_per_group.size()) / ranks;
  std::vector<int64_t> rows, bytes;
  std::vector<at::Tensor> places;
  int64_t first = 0;
  for (int64_t r = 0; r < ranks; ++r) {
    const auto begin = in.rows_per_group.begin() + r * groups;
    const int64_t count = std::accumulate(begin, begin + groups, int64_t{0});
    first += count;
    if (count == 0 || (r == own && in.own_index.defined())) continue;
    const auto sizes = in.parcel_bytes.begin() + r * groups;
    rows.insert(rows.end(), begin, begin + groups);
    bytes.insert(bytes.end(), sizes, sizes + groups);
    places.push_back(index.narrow(0, first - count, count));
    if (whole) continue;
    const int64_t at = in.parcel_begin[static_cast<std::size_t>(r)];
    try {
      codec.decode_into(out, places[0], in.bytes.narrow(0, at, total(bytes)), bytes, rows);
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(detail::message("the rows from ", context_->name_of_rank(r), " in ",
                                            name_of(in.direction), ": ", error.what()));
    }
    rows.clear();
    bytes.clear();
    places.clear();
  }
  if (places.empty()) return;
  // Nothing lies between the parcels: a rank without rows sends none, and the own rows are apart.
  codec.decode_into(out, at::cat(places), in.bytes, bytes, rows);
}

}  // namespace lshmoe
