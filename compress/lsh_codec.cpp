#include "lshmoe/compress/lsh_codec.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>
#include <optional>
#include <shared_mutex>
#include <span>
#include <unordered_map>
#include <utility>

#include "lshmoe/compress/channel_order.hpp"
#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/group_plan.hpp"
#include "lshmoe/compress/learned_state.hpp"
#include "lshmoe/compress/noise.hpp"
#include "lshmoe/compress/phases.hpp"
#include "lshmoe/compress/row_coder.hpp"
#include "lshmoe/compress/state_coder.hpp"
#include "lshmoe/kernels/lsh.hpp"
#include "lshmoe/kernels/reference_norm.hpp"
#include "lshmoe/kernels/rows.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {

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
                           : projection_matrix(options, context.hidden_size, context.layer)),
        packed_projection_(projection_.data(), whole_ ? 0 : context.hidden_size,
                           whole_ ? 0 : options.projection()) {}

  void observe(const at::Tensor& x, const at::Tensor& row_index) override {
    if (!learned_ || x.numel() == 0) return;
    const std::unique_lock lock(mutex_);
    if (!fit_is_due(refreshes_ + 1)) return;
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
    if (!learned_) return false;
    const std::unique_lock lock(mutex_);
    if (!fit_is_due(++refreshes_)) return false;
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

  [[nodiscard]] LearnedStates learned_states() const override {
    const std::shared_lock lock(mutex_);
    return {current_, previous_};
  }
  [[nodiscard]] SharedPart shared_part(const ParcelHeader& header,
                                       std::span<const std::uint8_t> shared) const override {
    Shared read = read_shared({header, shared, {}}, nullptr);
    return {std::move(read.order), std::move(read.bases)};
  }

  [[nodiscard]] StateStats state_stats() const override {
    const std::shared_lock lock(mutex_);
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
  std::vector<float> projection_;  // [hidden, projection]; empty where all rows go whole
  kernels::PackedMatrix packed_projection_;

  // What follows is of state=learned; encode and decode read it, observe and refresh change it.
  mutable std::shared_mutex mutex_;
  // Parcels of the former version may still be on their way to decode.
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
    // Sums of larger ones would leave the range of fp32.
    const at::Tensor all = at::cat(rows);
    return all.index_select(0, all.abs().amax(1).lt(1e30).nonzero().squeeze(1));
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
    const std::shared_lock lock(mutex_);
    const int64_t hidden = context().hidden_size;
    const RowsView<T> all{static_cast<const T*>(source.data), source.index, 0, source.rows, hidden};
    Encoded encoded;
    Stream stream;
    LearnedRows learned;
    if (current_ && !by_group_) learned = encode_once(all);
    const Norms norms =
        learned.norms.of.empty() ? norms_of(all) : learned.norms.named(learned.number);
    int64_t first = 0;
    for (const int64_t rows : rows_per_group) {
      const std::size_t before = stream.bytes.size();
      const std::int64_t centroids_before = stream.centroid_count;
      if (rows > 0) {
        const RowsView<T> group = all.part(first, rows);
        if (current_) {
          encode_with_state(group, norms, learned, stream, encoded.stats);
        } else if (source_) {
          encode_centroids(group, norms, stream, encoded.stats);
        } else {
          encode_rows(bounded(group, norms), stream, encoded.stats);
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

  // Of the rows of one encode call, and what their references are cut off at.
  struct Norms {
    std::vector<double> of;
    double cap = 0;
    // Of the rows with these numbers here (none: all, in their order).
    [[nodiscard]] Norms named(const std::vector<std::int64_t>& number) const {
      if (number.empty()) return *this;
      Norms norms{{}, cap};
      norms.of.reserve(number.size());
      for (const std::int64_t row : number) norms.of.push_back(of[static_cast<std::size_t>(row)]);
      return norms;
    }
  };
  // Refuses NaN and Inf. number: of the rows of the call (none: all, in their order).
  Norms norms_of(const RowsView<T>& rows, const std::vector<std::int64_t>& number = {}) const {
    const int64_t hidden = context().hidden_size;
    const PhaseScope timer(Phase::load, static_cast<int64_t>(sizeof(T)) * rows.rows * hidden);
    Norms norms;
    norms.of.resize(static_cast<std::size_t>(rows.rows));
    std::vector<float> x(static_cast<std::size_t>(hidden));
    for (int64_t i = 0; i < rows.rows; ++i) {
      rows.read(x.data(), i);
      const double squared = kernels::squared_norm(x.data(), hidden);
      if (!std::isfinite(squared)) throw NonFiniteRow(*this, rows.number(i));
      norms.of[static_cast<std::size_t>(i)] = squared;
    }
    norms.cap = number.empty()
                    ? kernels::norm_cap(norms.of.data(), nullptr, rows.rows)
                    : kernels::norm_cap(norms.of.data(), number.data(), std::ssize(number));
    for (double& norm : norms.of) norm = std::sqrt(norm);
    return norms;
  }
  // The rows of one group and their bounds. norms: from row 0 of the view on.
  BoundedRows<T> bounded(const RowsView<T>& rows, const Norms& norms) const {
    const auto norm = norms.of.begin() + rows.first;
    BoundedRows<T> group{rows, {norm, norm + rows.rows}, {}};
    const double of_group = kernels::group_reference(group.norm.data(), rows.rows, norms.cap);
    for (const double own : group.norm) {
      const double reference = by_group_ ? of_group : kernels::reference_norm(own, norms.cap);
      group.bound.push_back(options().max_error() * reference);
    }
    return group;
  }
  // The step that a group's rows take fractions of; 0: every row has its own.
  [[nodiscard]] float common_step(const BoundedRows<T>& group) const {
    return by_group_ && !group.bound.empty()
               ? kernels::group_step(group.bound[0], context().hidden_size)
               : 0;
  }

  // restore=source -------------------------------------------------------------------------------

  void encode_centroids(const RowsView<T>& group, const Norms& norms, Stream& stream,
                        CodecStats& stats) const {
    const int64_t hidden = context().hidden_size, rows = group.rows;
    const GroupPlanner<T> planner(options(), packed_projection_);
    const auto norm = norms.of.begin() + group.first;
    const BoundedRows<T> measured{group, {norm, norm + rows}, {}};
    const auto projected = planner.project(measured, planner.mean_of(group));
    const ClusterInput input{rows, hidden, nullptr, projected.z.data()};
    Clusters clusters = bucket_clusters(input, options());
    if (options().estimate_alpha()) {
      for (const Probe& probe : split_off_probes(input, options(), clusters)) {
        stream.probes.push_back({static_cast<int64_t>(stream.assignment.size()) + probe.row,
                                 stream.centroid_count + probe.cluster});
      }
    }
    clusters.centroids = cluster_means(group, clusters);
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
    std::vector<float> x(static_cast<std::size_t>(hidden));
    for (int64_t i = 0; i < rows; ++i) {
      const auto row = static_cast<std::size_t>(i);
      const std::int64_t cluster = clusters.assignment[row];
      group.read(x.data(), i);
      const float* c = clusters.centroids.data() + cluster * hidden;
      double error = 0;
      for (int64_t j = 0; j < hidden; ++j) {
        const double difference =
            static_cast<double>(x[static_cast<std::size_t>(j)]) - static_cast<double>(c[j]);
        error += difference * difference;
      }
      add_error(std::sqrt(error), 0, measured.norm[row], stream, stats);
      stream.assignment.push_back(stream.centroid_count + cluster);
    }
    stream.centroids.insert(stream.centroids.end(), clusters.centroids.begin(),
                            clusters.centroids.end());
    stream.centroid_count += clusters.count;
  }

  // restore=expert -------------------------------------------------------------------------------

  void encode_rows(const BoundedRows<T>& group, Stream& stream, CodecStats& stats) const {
    const int64_t hidden = context().hidden_size, rows = group.rows.rows;
    const auto n = static_cast<std::size_t>(rows);
    if (whole_) {
      append_whole(group.rows, stream, stats);
      return;
    }
    const float step_on_wire = common_step(group);
    const bool grouped = step_on_wire > 0;
    const StepCode steps = step_codes(step_on_wire);
    const GroupPlan plan = GroupPlanner<T>(options(), packed_projection_)
                               .choose(group, steps, options().max_clusters() > 0);

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
    const auto bases = plan.ordered_bases(hidden);
    const CodecStats stats_before = stats;
    const double relative_before = stream.relative_sum;
    OrderedRows<T> ordered(hidden, plan.order);
    std::vector<typename RowCoder<T>::Row> coded;
    const std::int64_t block = block_rows(hidden);
    for (int64_t first = 0; first < rows; first += block) {
      const RowsView<T> part = group.rows.part(first, std::min(block, rows - first));
      const float* x = ordered.read(part);
      coded.clear();
      for (int64_t i = 0; i < part.rows; ++i) {
        const auto row = static_cast<std::size_t>(first + i);
        const auto id = static_cast<std::uint32_t>(plan.clusters.assignment[row] + 1);
        coded.push_back({x + i * hidden, bases.data() + static_cast<std::int64_t>(id) * hidden,
                         part.row(i), group.bound[row], group.norm[row], id});
      }
      grow(stream.bytes, payload + coded.size() * coder.max_payload());
      payload += coder.encode(
          std::span(coded),
          stream.bytes.data() + directory + static_cast<std::size_t>(first) * layout.record_bytes,
          stream.bytes.data() + payload);
      for (const auto& row : coded) {
        stats.whole_rows += row.step == steps.whole_row() ? 1 : 0;
        add_error(row.error, row.bound, row.norm, stream, stats);
      }
    }
    stream.bytes.resize(payload);
    if (payload - begin >= ParcelHeader::kBytes + n * whole_bytes()) {
      // Nothing was saved: the rows as they are cost less.
      stream.bytes.resize(begin);
      stats = stats_before;
      stream.relative_sum = relative_before;
      append_whole(group.rows, stream, stats);
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
    Norms norms;
    std::vector<double> bound;
  };

  // Reference row: nothing of a row's bytes depends on its group, so a token that goes to several
  // ranks is coded once.
  LearnedRows encode_once(const RowsView<T>& rows) const {
    LearnedRows learned;
    std::vector<std::int64_t> tokens;
    RowsView<T> distinct = rows;
    if (rows.index != nullptr) {
      std::unordered_map<std::int64_t, std::int64_t> seen;
      seen.reserve(static_cast<std::size_t>(rows.rows));
      for (int64_t i = 0; i < rows.rows; ++i) {
        const auto [at, added] = seen.try_emplace(rows.number(i), tokens.size());
        if (added) tokens.push_back(rows.number(i));
        learned.number.push_back(at->second);
      }
      distinct.index = tokens.data();
      distinct.rows = static_cast<int64_t>(tokens.size());
    }
    learned.norms = norms_of(distinct, learned.number);
    code_with_state(learned, bounded(distinct, learned.norms));
    return learned;
  }
  // Returns the group's step, as common_step.
  float code_with_state(LearnedRows& learned, BoundedRows<T> group) const {
    const float step = common_step(group);
    learned.coded =
        StateCoder<T>(*current_, step_codes(step), options(), packed_projection_).encode(group);
    learned.bound = std::move(group.bound);
    return step;
  }

  void encode_with_state(const RowsView<T>& rows, const Norms& norms, LearnedRows& learned,
                         Stream& stream, CodecStats& stats) const {
    const int64_t hidden = context().hidden_size;
    const auto n = static_cast<std::size_t>(rows.rows);
    const float step_on_wire = by_group_ ? code_with_state(learned, bounded(rows, norms)) : 0;
    const StateRows& coded = learned.coded;
    const std::size_t first = by_group_ ? 0 : static_cast<std::size_t>(rows.first);
    const auto number = [&](std::size_t i) {
      return learned.number.empty() ? first + i
                                    : static_cast<std::size_t>(learned.number[first + i]);
    };
    const PhaseScope timer(Phase::assemble);
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < n; ++i) bytes += coded.bytes(number(i));
    // A group that its own parcel explains in less, like one of equal rows, or after a change that
    // the state has not seen yet.
    const RowLayout plain(hidden, step_codes(step_on_wire), 0, sizeof(T));
    const double payload_bits =
        8.0 * static_cast<double>(bytes - std::min(bytes, n * plain.record_bytes));
    if (explained_bits(rows, norms) < 0.95 * payload_bits || bytes >= n * whole_bytes()) {
      encode_rows(bounded(rows, norms), stream, stats);
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
    header.rows = static_cast<std::uint32_t>(rows.rows);
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
      add_error(coded.errors[row], learned.bound[row],
                norms.of[static_cast<std::size_t>(rows.first) + i], stream, stats);
    }
    seal_parcel(header, {stream.bytes.data() + begin, stream.bytes.size() - begin});
    stream.assignment.insert(stream.assignment.end(), n, -1);
  }

  // Bits, as GroupPlan counts them, of a parcel that explains itself and has no clusters; from a
  // sample of the rows.
  double explained_bits(const RowsView<T>& rows, const Norms& norms) const {
    const PhaseScope timer(Phase::plan);
    constexpr int64_t kSample = 64;
    const int64_t stride = std::max<int64_t>(1, rows.rows / kSample);
    std::vector<std::int64_t> sample, place;
    for (int64_t i = 0; i < rows.rows; i += stride) {
      sample.push_back(rows.number(i));
      place.push_back(rows.first + i);
    }
    const auto count = static_cast<int64_t>(sample.size());
    const BoundedRows<T> group =
        bounded({rows.data, sample.data(), 0, count, rows.hidden}, norms.named(place));
    const GroupPlan plan = GroupPlanner<T>(options(), packed_projection_)
                               .choose(group, step_codes(common_step(group)), /*clusters=*/false);
    return plan.row_bits * static_cast<double>(rows.rows) / static_cast<double>(count) +
           plan.shared_bits;
  }

  void append_whole(const RowsView<T>& rows, Stream& stream, CodecStats& stats) const {
    ParcelHeader header;
    header.kind = parcel_kind();
    header.dtype = context().dtype;
    header.flags = kAllWhole;
    header.rows = static_cast<std::uint32_t>(rows.rows);
    header.hidden_size = static_cast<std::uint32_t>(context().hidden_size);
    header.body_bytes = static_cast<std::uint64_t>(rows.rows) * whole_bytes();
    const std::size_t begin = stream.bytes.size();
    stream.bytes.resize(begin + ParcelHeader::kBytes + header.body_bytes);
    std::uint8_t* body = stream.bytes.data() + begin + ParcelHeader::kBytes;
    for (int64_t i = 0; i < rows.rows; ++i, body += whole_bytes()) {
      std::memcpy(body, rows.row(i), whole_bytes());
    }
    seal_parcel(header, {stream.bytes.data() + begin, stream.bytes.size() - begin});
    stats.whole_rows += rows.rows;
    stream.assignment.insert(stream.assignment.end(), static_cast<std::size_t>(rows.rows), -1);
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
    const std::shared_lock lock(mutex_);
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
      StateCoder<T>(*state, shared.steps, options(), packed_projection_)
          .decode_with_basis(out, to.data(), header.rows, parcel.body, header.centroids > 0);
      return;
    }
    const std::vector<std::int32_t>& order = state != nullptr ? state->order : shared.order;
    const float* bases = state != nullptr ? state->ordered_bases.data() : shared.bases.data();
    RowCoder<T> coder(hidden, shared.steps, centroid_id_bytes(header.centroids));
    RowReader<T> reader(coder, parcel.body, header.rows, header.centroids);
    const std::int64_t block = block_rows(hidden);
    const auto values = static_cast<std::size_t>(block * hidden);
    std::vector<std::int32_t> q(values);
    std::vector<T> ordered(order.empty() ? 0 : values);
    std::vector<std::int32_t> place(order.size());  // of each channel in coding order
    for (std::size_t j = 0; j < order.size(); ++j) {
      place[static_cast<std::size_t>(order[j])] = static_cast<std::int32_t>(j);
    }
    struct Coded {
      const std::uint8_t* record;
      const float* base;
      T* to;
    };
    std::vector<Coded> coded;
    for (std::int64_t first = 0; first < header.rows; first += block) {
      const std::int64_t rows = std::min<std::int64_t>(block, header.rows - first);
      coded.clear();
      {
        PhaseScope timer(Phase::unpack, 4 * rows * hidden);
        const std::size_t before = reader.left();
        for (std::int64_t i = 0; i < rows; ++i) {
          T* to = out + sink.row(first + i) * hidden;
          const auto row = reader.next();
          if (coder.is_whole(row.record) || coder.is_zero(row.record)) {
            coder.decode(to, row.record, row.payload, row.readable, bases);
            continue;
          }
          coder.unpack(q.data() + static_cast<std::int64_t>(coded.size()) * hidden, row.record,
                       row.payload, row.readable);
          coded.push_back({row.record, bases + row.id * hidden, to});
        }
        timer.add_bytes(static_cast<std::int64_t>(before - reader.left()));
      }
      const auto count = static_cast<std::int64_t>(coded.size());
      {
        const PhaseScope timer(Phase::reconstruct,
                               static_cast<std::int64_t>(8 + sizeof(T)) * count * hidden);
        for (std::int64_t i = 0; i < count; ++i) {
          const Coded& row = coded[static_cast<std::size_t>(i)];
          coder.reconstruct(order.empty() ? row.to : ordered.data() + i * hidden, row.record,
                            q.data() + i * hidden, row.base);
        }
      }
      if (order.empty()) continue;
      const PhaseScope timer(Phase::scatter,
                             static_cast<std::int64_t>(2 * sizeof(T)) * count * hidden);
      const T* from = ordered.data();
      for (const Coded& row : coded) {
        kernels::permute(row.to, from, place.data(), hidden);
        from += hidden;
      }
    }
    reader.finish();
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
  // Not the generator's own increment: neighboring seeds would draw the same numbers, one later.
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
