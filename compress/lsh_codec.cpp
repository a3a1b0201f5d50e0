#include "lshmoe/compress/lsh_codec.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>

#include "lshmoe/compress/clusters.hpp"
#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/learned_state.hpp"
#include "lshmoe/compress/noise.hpp"
#include "lshmoe/compress/phases.hpp"
#include "lshmoe/compress/row_coder.hpp"
#include "lshmoe/compress/state_coder.hpp"
#include "lshmoe/kernels/lanes.hpp"
#include "lshmoe/kernels/lsh.hpp"
#include "lshmoe/kernels/rows.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

// Relative errors of what rows are taken from; their own error does not add, so coarse is cheap.
constexpr double kMeanError = 0.05;
constexpr double kCentroidError = 0.1;
// Clusters that look better than this on the sample of rows are better on all of them.
constexpr double kSampleTrust = 0.85;

int class_bits(std::int64_t bands) {
  return static_cast<int>(std::bit_width(static_cast<std::uint64_t>(bands - 1)));
}
std::size_t order_bytes(std::int64_t hidden, std::int64_t bands) {
  return static_cast<std::size_t>((hidden * class_bits(bands) + 7) / 8);
}

// The channel order: the channels of band 0 ascending, then those of band 1, ... What travels is
// every channel's band.
void write_order(std::uint8_t* out, const std::vector<std::int32_t>& order, std::int64_t bands) {
  std::vector<std::uint32_t> band(order.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    band[static_cast<std::size_t>(order[i])] = static_cast<std::uint32_t>(i / kernels::kBandValues);
  }
  const int bits = class_bits(bands);
  std::uint64_t word = 0;
  int filled = 0;
  for (const std::uint32_t value : band) {
    word |= std::uint64_t{value} << filled;
    for (filled += bits; filled >= 8; filled -= 8, word >>= 8)
      *out++ = static_cast<std::uint8_t>(word);
  }
  if (filled > 0) *out = static_cast<std::uint8_t>(word);
}

std::vector<std::int32_t> read_order(const std::uint8_t* in, std::int64_t hidden,
                                     std::int64_t bands) {
  const int bits = class_bits(bands);
  std::vector<std::int32_t> next(static_cast<std::size_t>(bands));
  for (std::size_t band = 0; band < next.size(); ++band) {
    next[band] = static_cast<std::int32_t>(band) * kernels::kBandValues;
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(hidden));
  std::uint64_t word = 0;
  int filled = 0;
  for (std::int64_t channel = 0; channel < hidden; ++channel) {
    for (; filled < bits; filled += 8) word |= std::uint64_t{*in++} << filled;
    const std::uint64_t band = word & ((std::uint64_t{1} << bits) - 1);
    word >>= bits;
    filled -= bits;
    LSHMOE_VALIDATE(band < static_cast<std::uint64_t>(bands),
                    "decode: a channel's band does not exist (damaged parcel)");
    const std::int64_t end = std::min<std::int64_t>(
        hidden, (static_cast<std::int64_t>(band) + 1) * kernels::kBandValues);
    LSHMOE_VALIDATE(next[band] < end, "decode: a band has too many channels (damaged parcel)");
    order[static_cast<std::size_t>(next[band]++)] = static_cast<std::int32_t>(channel);
  }
  return order;
}

// Buffers of one encode call, kept from group to group.
struct Workspace {
  std::vector<float> x;             // [rows, hidden]
  std::vector<float> z;             // [rows, projection]
  std::vector<double> norm, bound;  // [rows]
  std::vector<float> row;           // [hidden]
};

// Rows that the parcel holds apart from its own: [mean] + centroids, coded like rows.
struct Base {
  std::vector<float> mean;       // [hidden] decoded, natural order; empty: none
  std::vector<float> centroids;  // [K, hidden] decoded, natural order, mean included
  std::vector<std::uint8_t> mean_record, mean_payload;
  std::vector<std::uint8_t> records, payloads;
  [[nodiscard]] std::size_t bytes() const {
    return mean_record.size() + mean_payload.size() + records.size() + payloads.size();
  }
};

// Codes `row` (less `from`) to `relative` and appends record and payload; returns what decodes.
std::vector<float> code_base_row(RowCoder<float>& coder, const float* row, const float* from,
                                 const std::int32_t* order, double relative,
                                 std::vector<std::uint8_t>& records,
                                 std::vector<std::uint8_t>& payloads) {
  const auto hidden = static_cast<std::size_t>(coder.layout().hidden);
  std::vector<float> ordered(hidden), zeros(hidden, 0.0F), decoded(hidden);
  for (std::size_t j = 0; j < hidden; ++j) {
    const auto channel = order != nullptr ? static_cast<std::size_t>(order[j]) : j;
    ordered[j] = row[channel] - (from != nullptr ? from[channel] : 0.0F);
  }
  const double norm = std::sqrt(kernels::squared_norm(ordered.data(), coder.layout().hidden));
  const std::size_t record = records.size(), payload = payloads.size();
  records.resize(record + coder.layout().record_bytes);
  payloads.resize(payload + coder.max_payload());
  double error = 0;
  const std::size_t bytes =
      coder.encode(records.data() + record, payloads.data() + payload, ordered.data(), zeros.data(),
                   ordered.data(), relative * norm, norm, 0, &error);
  coder.decode(decoded.data(), records.data() + record, payloads.data() + payload, bytes + 8,
               zeros.data());
  payloads.resize(payload + bytes);
  std::vector<float> natural(hidden);
  for (std::size_t j = 0; j < hidden; ++j) {
    const auto channel = order != nullptr ? static_cast<std::size_t>(order[j]) : j;
    natural[channel] = decoded[j] + (from != nullptr ? from[channel] : 0.0F);
  }
  return natural;
}

template <class T>
class LshCodec final : public CpuCodec, public LshInternals {
 public:
  LshCodec(const CodecOptions& options, const CodecContext& context)
      : CpuCodec(options, context),
        source_(sends_centroids(options)),
        by_group_(options.error_reference() == "group"),
        whole_(sends_whole(options, context)),
        learned_(!source_ && !whole_ && options.state() == "learned"),
        dither_key_(options.rounding() == "dithered" ? std::optional(static_cast<std::uint32_t>(
                                                           noise_stream(options.seed(), context)))
                                                     : std::nullopt),
        projection_(whole_ ? std::vector<float>()
                           : projection_matrix(options, context.hidden_size, context.layer)) {}

  void observe(const at::Tensor& x, const at::Tensor& row_index) override {
    if (!learned_ || !fit_is_due(refreshes_ + 1) || x.numel() == 0) return;
    const at::Tensor rows = x.contiguous();
    const int64_t hidden = context().hidden_size, most = sample_rows();
    const int64_t count = row_index.defined() ? row_index.numel() : rows.size(0);
    observed_ += count;
    const auto* from = static_cast<const T*>(rows.const_data_ptr());
    const int64_t* index = row_index.defined() ? row_index.const_data_ptr<int64_t>() : nullptr;
    const int64_t stride = (count + most - 1) / most;
    for (int64_t i = 0; i < count; i += stride) {
      const T* row = from + (index != nullptr ? index[i] : i) * hidden;
      sample_.insert(sample_.end(), row, row + hidden);
    }
    // Too many by now: every second one goes.
    for (auto have = static_cast<int64_t>(sample_.size()) / hidden; have > most; have /= 2) {
      for (int64_t i = 0; i < have / 2; ++i) {
        std::copy_n(sample_.begin() + 2 * i * hidden, hidden, sample_.begin() + i * hidden);
      }
      sample_.resize(static_cast<std::size_t>(have / 2 * hidden));
    }
  }

  bool refresh(Communicator& comm) override {
    if (!learned_ || !fit_is_due(++refreshes_)) return false;
    const auto start = std::chrono::steady_clock::now();
    const Traffic before = comm.traffic(Purpose::codec_state);
    constexpr int kRoot = 0;
    const std::vector<std::uint8_t> mine = sample_parcel(comm.size());
    sample_ = {};
    observed_ = 0;
    const auto parcels = comm.gather(std::as_bytes(std::span(mine)), kRoot, Purpose::codec_state);
    std::vector<std::uint8_t> bytes;
    if (comm.rank() == kRoot) {
      const at::Tensor rows = sample_of(parcels);
      if (rows.size(0) > 0) {
        bytes = to_bytes(fit_state(rows, options(), by_group_, projection_, next_version()));
      }
    }
    std::uint64_t size = bytes.size();
    comm.broadcast(&size, sizeof size, kRoot, Purpose::codec_state);
    const std::size_t most = most_state_bytes(context().hidden_size, options());
    LSHMOE_VALIDATE(size <= most, "a learned state of ", size,
                    " bytes is announced (none of this "
                    "codec has more than ",
                    most,
                    "): the ranks run different settings, or the "
                    "bytes are damaged");
    bytes.resize(size);
    if (size > 0) {
      comm.broadcast(bytes.data(), size, kRoot, Purpose::codec_state);
      LearnedState state = state_from_bytes(bytes, context().hidden_size, options(), projection_);
      LSHMOE_VALIDATE(state.version == next_version(), "version ", state.version,
                      " of a learned state came, this rank expects ", next_version(),
                      " (the ranks refreshed at different steps, or the bytes are damaged): call "
                      "refresh on all ranks alike");
      previous_ = std::move(current_);
      current_ = std::make_shared<const LearnedState>(std::move(state));
      state_stats_.version = current_->version;
      state_stats_.centroids = current_->centroids;
      state_stats_.checksum = current_->checksum();
      state_stats_.state_bytes = static_cast<int64_t>(size);
    }
    state_stats_.bytes_sent +=
        static_cast<int64_t>(comm.traffic(Purpose::codec_state).bytes_sent - before.bytes_sent);
    state_stats_.seconds +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return size > 0;
  }

  [[nodiscard]] LearnedStates learned_states() const override { return {current_, previous_}; }
  [[nodiscard]] SharedPart shared_part(const ParcelHeader& header,
                                       std::span<const std::uint8_t> shared) const override {
    Shared read = read_shared({header, shared, {}}, nullptr);
    return {std::move(read.order), std::move(read.bases)};
  }

  [[nodiscard]] StateStats state_stats() const override {
    StateStats stats = state_stats_;
    stats.memory_bytes = static_cast<int64_t>(sample_.capacity() * sizeof(T));
    for (const auto& state : {current_, previous_}) {
      if (state) stats.memory_bytes += state->memory_bytes();
    }
    return stats;
  }

 private:
  bool source_;
  bool by_group_;
  bool whole_;  // every row travels as it is
  bool learned_;
  std::optional<std::uint32_t> dither_key_;
  std::vector<float> projection_;

  // state=learned. Parcels of the former version may still be on their way to decode.
  std::shared_ptr<const LearnedState> current_, previous_;
  std::vector<T> sample_;  // [rows, hidden]
  int64_t observed_ = 0;   // rows that the sample was taken from
  int64_t refreshes_ = 0;  // calls of refresh
  StateStats state_stats_;

  [[nodiscard]] bool fit_is_due(int64_t call) const {
    return call < options().refresh_every() ? std::has_single_bit(static_cast<std::uint64_t>(call))
                                            : call % options().refresh_every() == 0;
  }
  [[nodiscard]] int64_t sample_rows() const {
    if (options().sample_rows() > 0) return options().sample_rows();
    const bool basis = options().transform() == "basis";
    return std::max<int64_t>(2048, basis ? 10 * context().hidden_size : 0);
  }
  [[nodiscard]] std::uint32_t next_version() const { return current_ ? current_->version + 1 : 1; }

  // This rank's part of the sample, coded more finely than the rows are.
  [[nodiscard]] std::vector<std::uint8_t> sample_parcel(int ranks) const {
    const int64_t hidden = context().hidden_size;
    const int64_t have = static_cast<int64_t>(sample_.size()) / hidden;
    if (have == 0) return {};
    int64_t most = (sample_rows() + ranks - 1) / ranks;
    if (options().sample_rows() == 0) {
      // A sampled row costs about twice one that is sent: kept to a few percent of the bytes.
      constexpr int64_t kShare = 32, kLeast = 64;
      int64_t steps = 1;
      while (!fit_is_due(refreshes_ + steps)) ++steps;
      most = std::min(most, std::max(kLeast, observed_ * steps / kShare));
    }
    const int64_t stride = (have + most - 1) / most;
    const at::Tensor rows =
        at::from_blob(const_cast<T*>(sample_.data()), {have, hidden}, at::dtype(context().dtype));
    const at::Tensor index = at::arange(0, have, stride, at::kLong);
    const Encoded encoded = sample_codec()->encode(rows, index, {index.numel()});
    const auto* bytes = encoded.bytes.template const_data_ptr<std::uint8_t>();
    return {bytes, bytes + encoded.bytes.numel()};
  }
  [[nodiscard]] at::Tensor sample_of(const std::vector<std::vector<std::byte>>& parcels) const {
    const auto codec = sample_codec();
    std::vector<at::Tensor> rows;
    for (const auto& parcel : parcels) {
      const auto size = static_cast<int64_t>(parcel.size());
      at::Tensor bytes = at::empty({size}, at::kByte);
      std::copy(parcel.begin(), parcel.end(), static_cast<std::byte*>(bytes.mutable_data_ptr()));
      rows.push_back(codec->decode(bytes, {size}).rows.to(at::kFloat));
      LSHMOE_VALIDATE(at::isfinite(rows.back()).all().template item<bool>(), "the rows that rank ",
                      rows.size() - 1,
                      " gives a learned state hold NaN or Inf (no rank sends "
                      "them): the bytes are damaged");
    }
    return at::cat(rows);
  }
  [[nodiscard]] std::shared_ptr<Codec> sample_codec() const {
    return std::make_shared<LshCodec<T>>(CodecOptions(options())
                                             .state("batch")
                                             .transform("channels")
                                             .rounding("nearest")
                                             .error_reference("row")
                                             .max_error(std::min(0.05, options().max_error())),
                                         context());
  }

  ParcelKind parcel_kind() const override {
    return source_ ? ParcelKind::lsh_source : ParcelKind::lsh_expert;
  }
  [[nodiscard]] std::size_t whole_bytes() const {
    return static_cast<std::size_t>(context().hidden_size) * sizeof(T);
  }

  std::size_t least_row_bytes(const ParcelHeader& header) const override {
    if (source_ || header.flags == kAllWhole) return whole_bytes();
    const StepCode steps((header.flags & kGroupStep) != 0 ? 1.0F : 0.0F,
                         (header.flags & kDither) != 0);
    return RowLayout(context().hidden_size, steps, centroid_id_bytes(header.centroids), sizeof(T))
        .record_bytes;
  }

  [[nodiscard]] StepCode step_codes(float group_step) const {
    return StepCode(group_step, dither_key_.has_value(), dither_key_.value_or(0));
  }
  // The front of the shared part. Returns what is behind it.
  std::uint8_t* write_steps(std::uint8_t* shared, float group_step) const {
    if (group_step > 0) {
      std::memcpy(shared, &group_step, 4);
      shared += 4;
    }
    if (dither_key_) {
      std::memcpy(shared, &*dither_key_, 4);
      shared += 4;
    }
    return shared;
  }

  // What the groups of one encode call add to.
  struct Stream {
    std::vector<std::uint8_t> bytes;
    std::vector<std::int64_t> assignment;
    std::vector<float> centroids;
    std::int64_t centroid_count = 0;
    std::vector<Probe> probes;
    double relative_sum = 0;
  };

  Encoded do_encode(const Source& source,
                    const std::vector<int64_t>& rows_per_group) const override {
    const int64_t hidden = context().hidden_size;
    Encoded encoded;
    Stream stream;
    Workspace work;
    LearnedRows learned;
    if (current_ && !by_group_) learned = encode_once(source, work);
    int64_t first = 0;
    for (const int64_t rows : rows_per_group) {
      const std::size_t before = stream.bytes.size();
      const std::int64_t centroids_before = stream.centroid_count;
      if (rows > 0) {
        if (current_) {
          encode_with_state(source, first, rows, learned, work, stream, encoded.stats);
        } else if (load(source, first, rows, work); source_) {
          encode_centroids(rows, work, stream, encoded.stats);
        } else {
          encode_rows(rows, work, stream, encoded.stats);
        }
      }
      encoded.bytes_per_group.push_back(static_cast<int64_t>(stream.bytes.size() - before));
      encoded.centroids_per_group.push_back(stream.centroid_count - centroids_before);
      first += rows;
    }
    encoded.bytes = at::empty({static_cast<int64_t>(stream.bytes.size())}, at::kByte);
    if (!stream.bytes.empty()) {
      std::memcpy(encoded.bytes.mutable_data_ptr(), stream.bytes.data(), stream.bytes.size());
    }
    encoded.assignment = at::empty({source.rows}, at::kLong);
    std::copy(stream.assignment.begin(), stream.assignment.end(),
              encoded.assignment.mutable_data_ptr<int64_t>());
    encoded.centroids = at::empty({stream.centroid_count, hidden}, at::dtype(context().dtype));
    kernels::convert(static_cast<T*>(encoded.centroids.mutable_data_ptr()), stream.centroids.data(),
                     stream.centroid_count * hidden);
    encoded.probes = std::move(stream.probes);
    CodecStats& stats = encoded.stats;
    stats.rows = source.rows;
    stats.clusters = stream.centroid_count;
    stats.raw_bytes = 2 * source.rows * hidden;
    stats.sent_bytes = static_cast<int64_t>(stream.bytes.size());
    if (source.rows > 0) {
      stats.mean_relative_error = stream.relative_sum / static_cast<double>(source.rows);
    }
    return encoded;
  }

  // The group's rows as fp32 and their norms; refuses NaN and Inf.
  void load(const Source& source, int64_t first, int64_t rows, Workspace& work) const {
    const int64_t hidden = context().hidden_size;
    const PhaseTimer timer(Phase::load, static_cast<int64_t>(sizeof(T) + 4) * rows * hidden);
    work.x.resize(static_cast<std::size_t>(rows * hidden));
    work.norm.resize(static_cast<std::size_t>(rows));
    for (int64_t i = 0; i < rows; ++i) {
      float* x = work.x.data() + i * hidden;
      kernels::convert(x, static_cast<const T*>(source.data) + source.row(first + i) * hidden,
                       hidden);
      const double squared = kernels::squared_norm(x, hidden);
      LSHMOE_VALIDATE(
          std::isfinite(squared), "encode: row ", source.row(first + i), " holds NaN or Inf (",
          name_of(context().direction), " of layer ", context().layer,
          "; no error bound holds for it): find where it comes from, or use kind bf16 or "
          "none, which pass it on");
      work.norm[static_cast<std::size_t>(i)] = std::sqrt(squared);
    }
  }

  // Z of the group's rows less their mean, scaled by a power of two to about 1. Returns the scale
  // of energies: |x - mean|^2 is about that times |z|^2. 0: nothing to cluster.
  double project(int64_t rows, const float* mean, Workspace& work) const {
    const int64_t hidden = context().hidden_size;
    const int64_t columns = options().projection();
    const PhaseTimer timer(Phase::project, 4 * (rows + columns) * hidden + 4 * rows * columns);
    work.z.resize(static_cast<std::size_t>(rows * columns));
    kernels::multiply(work.z.data(), work.x.data(), projection_.data(), rows, hidden, columns);
    std::vector<float> centre(static_cast<std::size_t>(columns));
    kernels::multiply(centre.data(), mean, projection_.data(), 1, hidden, columns);
    double energy = 0;
    for (int64_t i = 0; i < rows; ++i) {
      float* z = work.z.data() + i * columns;
      for (int64_t j = 0; j < columns; ++j) z[j] -= centre[static_cast<std::size_t>(j)];
      energy += kernels::squared_norm(z, columns);
    }
    const double rms = std::sqrt(energy / static_cast<double>(rows * columns));
    if (!(rms > 1e-35) || !(rms < 1e35)) return 0;
    const float scale = std::ldexp(1.0F, -std::ilogb(rms));
    for (float& value : work.z) value *= scale;
    double squared = 0;
    for (const double norm : work.norm) squared += norm * norm;
    const double centred =
        squared - static_cast<double>(rows) * kernels::squared_norm(mean, hidden);
    return centred > 0
               ? centred / (energy * static_cast<double>(scale) * static_cast<double>(scale))
               : 0;
  }

  // restore=source -------------------------------------------------------------------------------

  void encode_centroids(int64_t rows, Workspace& work, Stream& stream, CodecStats& stats) const {
    const int64_t hidden = context().hidden_size;
    std::vector<float> mean(static_cast<std::size_t>(hidden));
    group_mean(mean, rows, work);
    static_cast<void>(project(rows, mean.data(), work));
    const ClusterInput input{rows, hidden, work.x.data(), work.z.data()};
    Clusters clusters = bucket_clusters(input, options());
    if (options().estimate_alpha()) {
      for (const Probe& probe : split_off_probes(input, options(), clusters)) {
        stream.probes.push_back({static_cast<int64_t>(stream.assignment.size()) + probe.row,
                                 stream.centroid_count + probe.cluster});
      }
    }
    ParcelHeader header;
    header.kind = parcel_kind();
    header.dtype = context().dtype;
    header.rows = static_cast<std::uint32_t>(clusters.count);
    header.hidden_size = static_cast<std::uint32_t>(hidden);
    header.body_bytes = static_cast<std::uint64_t>(clusters.count) * whole_bytes();
    const std::size_t begin = stream.bytes.size();
    stream.bytes.resize(begin + ParcelHeader::kBytes + header.body_bytes);
    std::uint8_t* body = stream.bytes.data() + begin + ParcelHeader::kBytes;
    for (std::size_t i = 0; i < clusters.centroids.size(); ++i) {
      const T value = kernels::from_float<T>(clusters.centroids[i]);
      std::memcpy(body + i * sizeof(T), &value, sizeof(T));
      clusters.centroids[i] = kernels::to_float(value);
    }
    seal_parcel(header, {stream.bytes.data() + begin, ParcelHeader::kBytes + header.body_bytes});
    for (int64_t i = 0; i < rows; ++i) {
      const auto row = static_cast<std::size_t>(i);
      const std::int64_t cluster = clusters.assignment[row];
      const float* x = work.x.data() + i * hidden;
      const float* c = clusters.centroids.data() + cluster * hidden;
      double error = 0;
      for (int64_t j = 0; j < hidden; ++j) {
        const double difference = static_cast<double>(x[j]) - static_cast<double>(c[j]);
        error += difference * difference;
      }
      add_error(std::sqrt(error), 0, work.norm[row], stream, stats);
      stream.assignment.push_back(stream.centroid_count + cluster);
    }
    stream.centroids.insert(stream.centroids.end(), clusters.centroids.begin(),
                            clusters.centroids.end());
    stream.centroid_count += clusters.count;
  }

  // restore=expert -------------------------------------------------------------------------------

  // The rows' bounds. Returns the step that they take fractions of, 0: every row its own.
  float set_bounds(int64_t rows, Workspace& work) const {
    const auto n = static_cast<std::size_t>(rows);
    work.bound.resize(n);
    const double squared = kernels::lane_sum<double>(
        rows, [norm = work.norm.data()](std::int64_t i) { return norm[i] * norm[i]; });
    const double group_bound = options().max_error() * std::sqrt(squared / static_cast<double>(n));
    for (std::size_t i = 0; i < n; ++i) {
      work.bound[i] = by_group_ ? group_bound : options().max_error() * work.norm[i];
    }
    return by_group_ ? kernels::group_step(group_bound, context().hidden_size) : 0;
  }

  void encode_rows(int64_t rows, Workspace& work, Stream& stream, CodecStats& stats) const {
    const int64_t hidden = context().hidden_size;
    const auto n = static_cast<std::size_t>(rows);
    if (whole_) {
      append_whole(rows, work, stream, stats);
      return;
    }
    const float step_on_wire = set_bounds(rows, work);
    const bool grouped = step_on_wire > 0;
    const StepCode steps = step_codes(step_on_wire);
    RowCoder<float> base_coder(hidden, StepCode(), 0);
    Plan plan = choose_plan(rows, steps, work, base_coder, options().max_clusters() > 0);

    RowCoder<T> coder(hidden, steps, centroid_id_bytes(plan.clusters.count));
    const RowLayout& layout = coder.layout();
    const bool has_order = !plan.order.empty();
    const auto shared_bytes = (grouped ? 4 : 0) + (dither_key_ ? 4 : 0) +
                              (has_order ? order_bytes(hidden, layout.bands) : 0) +
                              plan.base.bytes();
    const std::size_t begin = stream.bytes.size();
    const std::size_t directory = begin + ParcelHeader::kBytes + shared_bytes;
    std::size_t payload = directory + n * layout.record_bytes;
    stream.bytes.resize(payload);
    std::uint8_t* shared = stream.bytes.data() + begin + ParcelHeader::kBytes;
    shared = write_steps(shared, step_on_wire);
    if (has_order) {
      write_order(shared, plan.order, layout.bands);
      shared += order_bytes(hidden, layout.bands);
    }
    const auto append = [&shared](const std::vector<std::uint8_t>& bytes) {
      shared = std::copy(bytes.begin(), bytes.end(), shared);
    };
    append(plan.base.mean_record);
    append(plan.base.records);
    append(plan.base.mean_payload);
    append(plan.base.payloads);

    // Bases in coding order: 0 is what rows without a cluster are taken from.
    const auto bases = ordered_bases(plan, hidden);
    work.row.resize(static_cast<std::size_t>(hidden));
    const std::int32_t* order = has_order ? plan.order.data() : nullptr;
    const CodecStats stats_before = stats;
    const double relative_before = stream.relative_sum;
    for (int64_t i = 0; i < rows; ++i) {
      const auto row = static_cast<std::size_t>(i);
      const float* natural = work.x.data() + i * hidden;
      const float* x = natural;
      if (order != nullptr) {
        const PhaseTimer timer(Phase::order, 12 * hidden);
        for (int64_t j = 0; j < hidden; ++j)
          work.row[static_cast<std::size_t>(j)] = natural[order[j]];
        x = work.row.data();
      }
      const auto id = static_cast<std::uint32_t>(plan.clusters.assignment[row] + 1);
      grow(stream.bytes, payload + coder.max_payload());
      double error = 0;
      std::uint8_t* record = stream.bytes.data() + directory + row * layout.record_bytes;
      payload += coder.encode(record, stream.bytes.data() + payload, x,
                              bases.data() + static_cast<std::int64_t>(id) * hidden, natural,
                              work.bound[row], work.norm[row], id, &error);
      stats.whole_rows += coder.is_whole(record) ? 1 : 0;
      add_error(error, work.bound[row], work.norm[row], stream, stats);
    }
    stream.bytes.resize(payload);
    if (payload - begin >= ParcelHeader::kBytes + n * whole_bytes()) {
      // Nothing was saved: the rows as they are cost less.
      stream.bytes.resize(begin);
      stats = stats_before;
      stream.relative_sum = relative_before;
      append_whole(rows, work, stream, stats);
      return;
    }
    ParcelHeader header;
    header.kind = parcel_kind();
    header.dtype = context().dtype;
    header.flags = static_cast<std::uint8_t>(
        (plan.base.mean.empty() ? 0 : kHasMean) | (has_order ? kHasOrder : 0) |
        (grouped ? kGroupStep : 0) | (dither_key_ ? kDither : 0));
    header.rows = static_cast<std::uint32_t>(rows);
    header.hidden_size = static_cast<std::uint32_t>(hidden);
    header.centroids = static_cast<std::uint32_t>(plan.clusters.count);
    header.shared_bytes = static_cast<std::uint32_t>(shared_bytes);
    header.body_bytes = payload - directory;
    seal_parcel(header, {stream.bytes.data() + begin, payload - begin});

    for (const std::int64_t cluster : plan.clusters.assignment) {
      stream.assignment.push_back(cluster < 0 ? -1 : stream.centroid_count + cluster);
    }
    stream.centroids.insert(stream.centroids.end(), plan.base.centroids.begin(),
                            plan.base.centroids.end());
    stream.centroid_count += plan.clusters.count;
  }

  // state=learned --------------------------------------------------------------------------------

  // Rows coded against the current state. number: stream row -> row here (empty: the same).
  struct LearnedRows {
    StateRows coded;
    std::vector<std::int64_t> number;
    std::vector<double> norm, bound;
  };

  // Reference row: nothing of a row's bytes depends on its group, so a token that goes to several
  // ranks is coded once.
  LearnedRows encode_once(const Source& source, Workspace& work) const {
    LearnedRows learned;
    std::unordered_map<std::int64_t, std::int64_t> seen;
    std::vector<std::int64_t> tokens;
    seen.reserve(static_cast<std::size_t>(source.rows));
    for (int64_t i = 0; i < source.rows; ++i) {
      const auto [at, added] = seen.try_emplace(source.row(i), tokens.size());
      if (added) tokens.push_back(source.row(i));
      learned.number.push_back(at->second);
    }
    const auto count = static_cast<int64_t>(tokens.size());
    if (count == 0) return learned;
    load({source.data, tokens.data(), count}, 0, count, work);
    static_cast<void>(set_bounds(count, work));
    learned.coded = StateCoder<T>(*current_, step_codes(0), options(), projection_)
                        .encode(work.x.data(), count, work.norm.data(), work.bound.data());
    learned.norm = work.norm;
    learned.bound = work.bound;
    return learned;
  }

  void encode_with_state(const Source& source, int64_t first, int64_t rows, LearnedRows& learned,
                         Workspace& work, Stream& stream, CodecStats& stats) const {
    const int64_t hidden = context().hidden_size;
    const auto n = static_cast<std::size_t>(rows);
    float step_on_wire = 0;
    if (by_group_) {
      load(source, first, rows, work);
      step_on_wire = set_bounds(rows, work);
      learned.coded = StateCoder<T>(*current_, step_codes(step_on_wire), options(), projection_)
                          .encode(work.x.data(), rows, work.norm.data(), work.bound.data());
      learned.norm = work.norm;
      learned.bound = work.bound;
    }
    const StateRows& coded = learned.coded;
    const auto number = [&](std::size_t i) {
      return learned.number.empty()
                 ? i
                 : static_cast<std::size_t>(learned.number[static_cast<std::size_t>(first) + i]);
    };
    const PhaseTimer timer(Phase::assemble);
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < n; ++i) bytes += coded.bytes(number(i));
    // A group that its own parcel explains in less, like one of equal rows, or after a change that
    // the state has not seen yet.
    const RowLayout plain(hidden, step_codes(step_on_wire), 0, sizeof(T));
    const double payload_bits =
        8.0 * static_cast<double>(bytes - std::min(bytes, n * plain.record_bytes));
    if (explained_bits(source, first, rows) < 0.95 * payload_bits || bytes >= n * whole_bytes()) {
      load(source, first, rows, work);
      encode_rows(rows, work, stream, stats);
      return;
    }

    const std::size_t begin = stream.bytes.size();
    const std::size_t shared_bytes = (step_on_wire > 0 ? 4 : 0) + (dither_key_ ? 4 : 0);
    ParcelHeader header;
    header.kind = parcel_kind();
    header.dtype = context().dtype;
    header.flags = static_cast<std::uint8_t>((step_on_wire > 0 ? kGroupStep : 0) |
                                             (dither_key_ ? kDither : 0) |
                                             (current_->basis.defined() ? kBasis : 0));
    header.rows = static_cast<std::uint32_t>(rows);
    header.hidden_size = static_cast<std::uint32_t>(hidden);
    header.centroids = coded.codebook ? static_cast<std::uint32_t>(current_->centroids) : 0;
    header.state_version = current_->version;
    header.shared_bytes = static_cast<std::uint32_t>(shared_bytes);
    header.body_bytes = bytes;
    stream.bytes.resize(begin + ParcelHeader::kBytes + shared_bytes + bytes);
    std::uint8_t* out = stream.bytes.data() + begin + ParcelHeader::kBytes;
    std::uint8_t* record = write_steps(out, step_on_wire);
    std::uint8_t* payload = record + n * coded.record_bytes;
    for (std::size_t i = 0; i < n; ++i, record += coded.record_bytes) {
      const std::size_t row = number(i);
      std::memcpy(record, coded.records.data() + row * coded.record_bytes, coded.record_bytes);
      const auto from = coded.payloads.begin() + static_cast<std::ptrdiff_t>(coded.offsets[row]);
      const auto size = static_cast<std::ptrdiff_t>(coded.offsets[row + 1] - coded.offsets[row]);
      payload = std::copy(from, from + size, payload);
      stats.whole_rows += coded.whole[row] ? 1 : 0;
      add_error(coded.errors[row], learned.bound[row], learned.norm[row], stream, stats);
    }
    seal_parcel(header, {stream.bytes.data() + begin, stream.bytes.size() - begin});
    stream.assignment.insert(stream.assignment.end(), n, -1);
  }

  // Bits, as Plan counts them, of a parcel that explains itself and has no clusters; from a
  // sample of the rows.
  double explained_bits(const Source& source, int64_t first, int64_t rows) const {
    const PhaseTimer timer(Phase::plan);
    constexpr int64_t kSample = 64;
    const int64_t stride = std::max<int64_t>(1, rows / kSample);
    std::vector<std::int64_t> sample;
    for (int64_t i = 0; i < rows; i += stride) sample.push_back(source.row(first + i));
    const auto count = static_cast<int64_t>(sample.size());
    Workspace work;
    load({source.data, sample.data(), count}, 0, count, work);
    const StepCode steps = step_codes(set_bounds(count, work));
    RowCoder<float> base_coder(context().hidden_size, StepCode(), 0);
    const Plan plan = choose_plan(count, steps, work, base_coder, /*clusters=*/false);
    return plan.row_bits * static_cast<double>(rows) / static_cast<double>(count) +
           plan.shared_bits;
  }

  // How the rows of one group are coded: what pays, by measuring a sample of them.
  struct Plan {
    Clusters clusters;
    Base base;
    std::vector<std::int32_t> order;  // empty: the channels as they are
    // Estimated, without steps, band indices and header: of the rows, and of what they share.
    double row_bits = 0, shared_bits = 0;
    [[nodiscard]] double bits() const { return row_bits + shared_bits; }
  };

  Plan choose_plan(int64_t rows, const StepCode& steps, Workspace& work,
                   RowCoder<float>& base_coder, bool clusters) const {
    const PhaseTimer timer(Phase::plan);
    const int64_t hidden = context().hidden_size;
    const auto n = static_cast<std::size_t>(rows);
    const std::int64_t bands = base_coder.layout().bands;
    RowCoder<T> estimator(hidden, steps, 0);
    const double order_cost = 8.0 * static_cast<double>(order_bytes(hidden, bands));

    // Sets the plan's bits from about `sample` of its rows; drops an order that does not pay.
    // Centroids are coded in the channel order: it stays with them.
    const auto measure = [&](Plan& plan, std::int64_t sample) {
      const std::int64_t stride = std::max<std::int64_t>(1, rows / sample);
      const auto bases = natural_bases(plan, hidden);
      std::vector<float> residual(static_cast<std::size_t>(hidden));
      std::int64_t plain = 0, ordered = 0, sampled = 0;
      for (int64_t i = 0; i < rows; i += stride, ++sampled) {
        const auto row = static_cast<std::size_t>(i);
        const float* base = bases.data() + (plan.clusters.assignment[row] + 1) * hidden;
        const float* x = work.x.data() + i * hidden;
        for (int64_t j = 0; j < hidden; ++j) {
          residual[static_cast<std::size_t>(j)] = x[j] - base[j];
        }
        std::int64_t bits_plain = 0, bits_ordered = 0;
        estimator.estimate(residual.data(), work.bound[row],
                           plan.order.empty() ? nullptr : plan.order.data(), &bits_plain,
                           &bits_ordered);
        plain += bits_plain;
        ordered += bits_ordered;
      }
      const double scale = static_cast<double>(rows) / static_cast<double>(sampled);
      plan.row_bits = scale * static_cast<double>(plain) +
                      static_cast<double>(8 * n * centroid_id_bytes(plan.clusters.count));
      plan.shared_bits = 8.0 * static_cast<double>(plan.base.bytes());
      if (plan.order.empty()) return;
      const double saved = scale * static_cast<double>(plain - ordered);
      if (plan.clusters.count == 0 && saved <= order_cost) {
        plan.order.clear();
        return;
      }
      plan.row_bits -= saved;
      plan.shared_bits += order_cost;
    };
    const std::int64_t sample = std::clamp<std::int64_t>(rows / 8, 16, 64);

    std::vector<float> mean(static_cast<std::size_t>(hidden));
    const bool usable_mean = group_mean(mean, rows, work);
    Plan best;
    best.clusters.assignment.assign(n, -1);
    best.order = channel_order(rows, best, work);
    measure(best, sample);
    Base with_mean;
    if (usable_mean) {
      with_mean.mean = code_base_row(base_coder, mean.data(), nullptr, nullptr, kMeanError,
                                     with_mean.mean_record, with_mean.mean_payload);
      Plan plan;
      plan.clusters.assignment.assign(n, -1);
      plan.base = with_mean;
      plan.order = channel_order(rows, plan, work);
      measure(plan, sample);
      if (plan.bits() < best.bits()) best = std::move(plan);
    }
    if (!usable_mean || !clusters) return best;
    const double scale = project(rows, mean.data(), work);
    if (scale <= 0) return best;
    std::vector<float> squared_bound(n);
    const double energy_per_z = scale;
    for (std::size_t i = 0; i < n; ++i) {
      squared_bound[i] = static_cast<float>(work.bound[i] * work.bound[i] / energy_per_z);
    }
    Plan plan;
    plan.clusters = paying_clusters({rows, hidden, work.x.data(), work.z.data()}, options(),
                                    squared_bound, /*centroid_bits=*/4.0);
    if (plan.clusters.count == 0) return best;
    // The order of the residuals from the means themselves; the coded centroids change it little.
    plan.base = with_mean;
    plan.base.centroids = plan.clusters.centroids;
    plan.order = channel_order(rows, plan, work);
    for (std::int64_t k = 0; k < plan.clusters.count; ++k) {
      const auto decoded =
          code_base_row(base_coder, plan.clusters.centroids.data() + k * hidden,
                        plan.base.mean.data(), plan.order.empty() ? nullptr : plan.order.data(),
                        kCentroidError, plan.base.records, plan.base.payloads);
      std::copy(decoded.begin(), decoded.end(), plan.base.centroids.begin() + k * hidden);
    }
    measure(plan, sample);
    if (plan.bits() < best.bits() && plan.bits() > kSampleTrust * best.bits()) {
      // A narrow gain may be the sample's luck.
      constexpr std::int64_t kMore = 256;
      measure(plan, kMore);
      measure(best, kMore);
    }
    return plan.bits() < best.bits() ? std::move(plan) : std::move(best);
  }

  // mean [hidden] of the group; false when it left the range of fp32.
  bool group_mean(std::vector<float>& mean, int64_t rows, const Workspace& work) const {
    std::vector<std::int64_t> all(static_cast<std::size_t>(rows));
    std::iota(all.begin(), all.end(), std::int64_t{0});
    const std::int64_t offsets[2] = {0, rows};
    kernels::segment_mean(mean.data(), work.x.data(), all.data(), offsets, 1,
                          context().hidden_size);
    return std::isfinite(kernels::squared_norm(mean.data(), context().hidden_size));
  }

  // [1 + K, hidden]: what a row without a cluster is taken from, then the centroids.
  static std::vector<float> natural_bases(const Plan& plan, int64_t hidden) {
    std::vector<float> bases(static_cast<std::size_t>(hidden), 0.0F);
    if (!plan.base.mean.empty()) bases = plan.base.mean;
    bases.insert(bases.end(), plan.base.centroids.begin(), plan.base.centroids.end());
    return bases;
  }
  static std::vector<float> ordered_bases(const Plan& plan, int64_t hidden) {
    std::vector<float> bases = natural_bases(plan, hidden);
    if (plan.order.empty()) return bases;
    std::vector<float> ordered(bases.size());
    for (std::size_t from = 0; from < bases.size(); from += static_cast<std::size_t>(hidden)) {
      for (std::size_t j = 0; j < static_cast<std::size_t>(hidden); ++j) {
        ordered[from + j] = bases[from + static_cast<std::size_t>(plan.order[j])];
      }
    }
    return ordered;
  }

  // Channels by falling energy of the residuals in units of the rows' bounds, cut into bands;
  // within a band ascending. Empty when there is one band only.
  std::vector<std::int32_t> channel_order(int64_t rows, const Plan& plan, Workspace& work) const {
    const int64_t hidden = context().hidden_size;
    if (hidden <= kernels::kBandValues) return {};
    const auto bases = natural_bases(plan, hidden);
    std::vector<float> energy(static_cast<std::size_t>(hidden), 0.0F);
    const std::int64_t stride = std::max<std::int64_t>(1, rows / 256);
    for (int64_t i = 0; i < rows; i += stride) {
      const auto row = static_cast<std::size_t>(i);
      if (!(work.bound[row] > 1e-30) || !(work.bound[row] < 1e30)) continue;
      const auto scale = static_cast<float>(1 / work.bound[row]);
      const float* x = work.x.data() + i * hidden;
      const float* base = bases.data() + (plan.clusters.assignment[row] + 1) * hidden;
      for (int64_t j = 0; j < hidden; ++j) {
        const float value = (x[j] - base[j]) * scale;
        energy[static_cast<std::size_t>(j)] += value * value;
      }
    }
    return order_by_energy(energy);
  }

  void append_whole(int64_t rows, const Workspace& work, Stream& stream, CodecStats& stats) const {
    const int64_t hidden = context().hidden_size;
    ParcelHeader header;
    header.kind = parcel_kind();
    header.dtype = context().dtype;
    header.flags = kAllWhole;
    header.rows = static_cast<std::uint32_t>(rows);
    header.hidden_size = static_cast<std::uint32_t>(hidden);
    header.body_bytes = static_cast<std::uint64_t>(rows) * whole_bytes();
    const std::size_t begin = stream.bytes.size();
    stream.bytes.resize(begin + ParcelHeader::kBytes + header.body_bytes);
    std::uint8_t* body = stream.bytes.data() + begin + ParcelHeader::kBytes;
    for (int64_t i = 0; i < rows * hidden; ++i) {
      const T value = kernels::from_float<T>(work.x[static_cast<std::size_t>(i)]);
      std::memcpy(body + static_cast<std::size_t>(i) * sizeof(T), &value, sizeof(T));
    }
    seal_parcel(header, {stream.bytes.data() + begin, stream.bytes.size() - begin});
    stats.whole_rows += rows;
    stream.assignment.insert(stream.assignment.end(), static_cast<std::size_t>(rows), -1);
  }

  static void add_error(double error, double bound, double norm, Stream& stream,
                        CodecStats& stats) {
    const double relative = norm > 0 ? error / norm : 0;
    stream.relative_sum += relative;
    stats.max_relative_error = std::max(stats.max_relative_error, relative);
    if (bound > 0) stats.max_error_ratio = std::max(stats.max_error_ratio, error / bound);
  }

  static void grow(std::vector<std::uint8_t>& bytes, std::size_t size) {
    if (bytes.size() < size) bytes.resize(std::max(size, bytes.size() + bytes.size() / 2));
  }

  // decode ---------------------------------------------------------------------------------------

  void do_decode(const Parcel& parcel, const Sink& sink) const override {
    const ParcelHeader& header = parcel.header;
    const int64_t hidden = context().hidden_size;
    const auto n = static_cast<std::size_t>(header.rows);
    auto* out = static_cast<T*>(sink.data);
    if (source_ || header.flags == kAllWhole) {
      LSHMOE_VALIDATE((source_ ? header.flags == 0 : true) && header.centroids == 0 &&
                          header.state_version == 0 && parcel.shared.empty() &&
                          parcel.body.size() == n * whole_bytes(),
                      "decode: a parcel of ", n, " whole rows has ", parcel.body.size(),
                      " bytes of them (damaged parcel)");
      for (std::size_t i = 0; i < n; ++i) {
        std::memcpy(out + sink.row(static_cast<int64_t>(i)) * hidden,
                    parcel.body.data() + i * whole_bytes(), whole_bytes());
      }
      return;
    }
    const bool with_state = header.state_version != 0;
    LSHMOE_VALIDATE((header.flags &
                     ~(kGroupStep | kDither | (with_state ? kBasis : kHasMean | kHasOrder))) == 0,
                    "decode: a parcel has unknown flags (damaged parcel)");
    const LearnedState* state = with_state ? &state_of_version(header) : nullptr;
    const Shared shared = read_shared(parcel, state);
    if ((header.flags & kBasis) != 0) {
      std::vector<std::int64_t> to(n);
      for (std::size_t i = 0; i < n; ++i) to[i] = sink.row(static_cast<int64_t>(i));
      StateCoder<T>(*state, shared.steps, options(), projection_)
          .decode_with_basis(out, to.data(), header.rows, parcel.body, header.centroids > 0);
      return;
    }
    const std::vector<std::int32_t>& order = state != nullptr ? state->order : shared.order;
    const float* bases = state != nullptr ? state->ordered_bases.data() : shared.bases.data();
    RowCoder<T> coder(hidden, shared.steps, centroid_id_bytes(header.centroids));
    const RowLayout& layout = coder.layout();
    LSHMOE_ASSERT(n <= parcel.body.size() / layout.record_bytes);  // checked by open
    const std::uint8_t* record = parcel.body.data();
    const std::uint8_t* payload = record + n * layout.record_bytes;
    auto left = static_cast<std::size_t>(parcel.body.data() + parcel.body.size() - payload);
    std::vector<T> ordered(static_cast<std::size_t>(hidden));
    for (std::size_t i = 0; i < n; ++i, record += layout.record_bytes) {
      const std::size_t bytes = coder.payload_bytes(record);
      const std::uint32_t id = coder.id(record);
      LSHMOE_VALIDATE(bytes <= left, "decode: row ", i, "'s payload of ", bytes,
                      " bytes goes beyond its parcel (damaged parcel)");
      LSHMOE_VALIDATE(id <= header.centroids, "decode: row ", i, " names centroid ", id, " of ",
                      header.centroids, " (damaged parcel)");
      T* to = out + sink.row(static_cast<int64_t>(i)) * hidden;
      const float* base = bases + static_cast<std::int64_t>(id) * hidden;
      if (order.empty() || coder.is_whole(record)) {
        coder.decode(to, record, payload, left, base);
      } else {
        coder.decode(ordered.data(), record, payload, left, base);
        const PhaseTimer timer(Phase::scatter, static_cast<int64_t>(2 * sizeof(T) + 4) * hidden);
        for (std::size_t j = 0; j < ordered.size(); ++j) to[order[j]] = ordered[j];
      }
      payload += bytes;
      left -= bytes;
    }
    LSHMOE_VALIDATE(left == 0, "decode: ", left,
                    " bytes are left over after the last row (damaged parcel)");
  }

  struct Shared {
    StepCode steps;
    std::vector<std::int32_t> order;
    std::vector<float> bases;  // [1 + K, hidden], coding order
  };

  // The state a parcel was coded against, if this end still has it.
  [[nodiscard]] const LearnedState& state_of_version(const ParcelHeader& header) const {
    for (const auto& state : {current_.get(), previous_.get()}) {
      if (state == nullptr || state->version != header.state_version) continue;
      LSHMOE_VALIDATE((header.centroids == 0 || header.centroids == state->centroids) &&
                          ((header.flags & kBasis) != 0) == state->basis.defined(),
                      "decode: a parcel does not fit its learned state, version ",
                      header.state_version, " (damaged parcel)");
      return *state;
    }
    throw InvalidArgument(detail::message(
        "decode: a parcel was coded with version ", header.state_version,
        " of the learned state, this rank has ", current_ ? current_->version : 0,
        " (the ranks refreshed at different steps): call refresh on all ranks alike"));
  }

  [[nodiscard]] Shared read_shared(const Parcel& parcel, const LearnedState* state) const {
    const ParcelHeader& header = parcel.header;
    const int64_t hidden = context().hidden_size;
    RowCoder<float> coder(hidden, StepCode(), 0);
    const RowLayout& layout = coder.layout();
    Shared shared;
    const std::uint8_t* at = parcel.shared.data();
    std::size_t left = parcel.shared.size();
    const auto need = [&left](std::size_t bytes) {
      LSHMOE_VALIDATE(bytes <= left, "decode: the shared part of a parcel is ", bytes - left,
                      " bytes short (damaged parcel)");
      left -= bytes;
    };
    float step = 0;
    std::optional<std::uint32_t> dither_key;
    if ((header.flags & kGroupStep) != 0) {
      need(4);
      std::memcpy(&step, at, 4);
      at += 4;
      LSHMOE_VALIDATE(step >= 4 * kernels::kMinStep && step <= kernels::kMaxStep,
                      "decode: a parcel's step is out of range (damaged parcel)");
    }
    if ((header.flags & kDither) != 0) {
      need(4);
      std::uint32_t key = 0;
      std::memcpy(&key, at, 4);
      at += 4;
      dither_key = key;
    }
    shared.steps = StepCode(step, dither_key.has_value(), dither_key.value_or(0));
    if ((header.flags & kHasOrder) != 0) {
      LSHMOE_VALIDATE(layout.bands > 1,
                      "decode: a channel order for one band of channels (damaged parcel)");
      need(order_bytes(hidden, layout.bands));
      shared.order = read_order(at, hidden, layout.bands);
      at += order_bytes(hidden, layout.bands);
    }
    const std::size_t means = (header.flags & kHasMean) != 0 ? 1 : 0;
    const std::size_t count = state != nullptr ? 0 : means + header.centroids;
    LSHMOE_VALIDATE(header.centroids < 65536 && count <= left / layout.record_bytes,
                    "decode: the shared part of a parcel is too short for ", header.centroids,
                    " centroids (damaged parcel)");
    need(count * layout.record_bytes);
    const std::uint8_t* record = at;
    const std::uint8_t* payload = at + count * layout.record_bytes;
    const std::vector<float> zeros(static_cast<std::size_t>(hidden), 0.0F);
    std::vector<float> row(static_cast<std::size_t>(hidden));
    if (state == nullptr) {
      shared.bases.assign((1 + header.centroids) * static_cast<std::size_t>(hidden), 0.0F);
    }
    for (std::size_t i = 0; i < count; ++i, record += layout.record_bytes) {
      const std::size_t bytes = coder.payload_bytes(record);
      const std::size_t readable = left;
      need(bytes);
      coder.decode(row.data(), record, payload, readable, zeros.data());
      payload += bytes;
      float* base = shared.bases.data() + (i + 1 - means) * static_cast<std::size_t>(hidden);
      if (i < means) {
        // The mean has the channels' own order.
        for (std::size_t j = 0; j < row.size(); ++j) {
          base[j] = row[shared.order.empty() ? j : static_cast<std::size_t>(shared.order[j])];
        }
      } else {
        // The mean is zeros where there is none.
        for (std::size_t j = 0; j < row.size(); ++j) base[j] = row[j] + shared.bases[j];
      }
    }
    LSHMOE_VALIDATE(left == 0, "decode: ", left,
                    " bytes are left over in the shared part of a parcel (damaged parcel)");
    return shared;
  }
};

}  // namespace

bool sends_whole(const CodecOptions& options, const CodecContext& context) {
  // bf16 rows cannot be rebuilt to less than about half a unit in their last place.
  constexpr double kLeastErrorBfloat16 = 0.004;
  return !sends_centroids(options) &&
         (options.max_error() == 0 ||
          (context.dtype == at::kBFloat16 && options.max_error() < kLeastErrorBfloat16));
}

std::vector<float> projection_matrix(const CodecOptions& options, std::int64_t hidden_size,
                                     std::int64_t layer) {
  std::vector<float> matrix(static_cast<std::size_t>(hidden_size * options.projection()));
  // Not the generator's own increment: neighbouring seeds would draw the same numbers, one later.
  const std::uint64_t seed = options.seed() * 0xD1B54A32D192ED03u +
                             static_cast<std::uint64_t>(layer) * 0xC2B2AE3D27D4EB4Fu;
  kernels::random_orthonormal(matrix.data(), hidden_size, options.projection(), seed);
  return matrix;
}

std::shared_ptr<Codec> make_lsh_codec(const CodecOptions& options, const CodecContext& context) {
  if (context.dtype == at::kBFloat16) {
    return std::make_shared<LshCodec<kernels::Bfloat16>>(options, context);
  }
  return std::make_shared<LshCodec<float>>(options, context);
}

}  // namespace lshmoe
