// Kind lsh on a GPU.

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <optional>

#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/cuda/batch.hpp"
#include "lshmoe/compress/cuda/kinds.hpp"
#include "lshmoe/compress/cuda/projection.hpp"
#include "lshmoe/compress/cuda/stream_phases.hpp"
#include "lshmoe/compress/cuda/support.hpp"
#include "lshmoe/compress/learned_state.hpp"
#include "lshmoe/compress/lsh_codec.hpp"
#include "lshmoe/compress/noise.hpp"
#include "lshmoe/compress/state_coder.hpp"
#include "lshmoe/kernels/cuda/basis.hpp"
#include "lshmoe/kernels/cuda/lsh.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {
namespace {

/// A learned state in device memory.
struct DeviceState {
  std::uint32_t version = 0;
  std::int64_t centroids = 0;
  at::Tensor bases, order, place, mean_z, centroids_z, half_norms;
  // With a basis: its bases are in the channels' own order, and there is no other.
  at::Tensor to_coefficients, to_residual;
  double stretch = 1;
  [[nodiscard]] bool has_basis() const { return to_residual.defined(); }
};

/// The matrix as it was before it was packed: its products with unit vectors.
at::Tensor unpacked(const kernels::PackedMatrix& matrix, at::Device device) {
  const at::Tensor unit = at::eye(matrix.inner(), at::kFloat);
  at::Tensor out = at::empty({matrix.inner(), matrix.columns()}, at::kFloat);
  matrix.multiply(out.mutable_data_ptr<float>(), unit.const_data_ptr<float>(), matrix.inner());
  return out.to(device);
}

template <class T>
class LshCodec final : public StagedCodec {
 public:
  LshCodec(const CodecOptions& options, const CodecContext& context)
      : StagedCodec(options, context),
        by_group_(options.error_reference() == "group"),
        whole_(sends_whole(options, context)),
        on_gpu_(!sends_centroids(options) && context.hidden_size <= launchers::kMaxCodedHidden),
        dither_key_(options.rounding() == "dithered" ? std::optional(static_cast<std::uint32_t>(
                                                           noise_stream(options.seed(), context)))
                                                     : std::nullopt),
        projection_(options, context) {}

  using Codec::encode;
  [[nodiscard]] Encoded encode(const at::Tensor& x, const at::Tensor& row_index,
                               const std::vector<int64_t>& rows_per_group) const override {
    const auto states = learned_states();
    const bool explains = !whole_ && !states.current;
    if (!on_gpu_ || (explains && !can_plan(options(), std::ssize(rows_per_group)))) {
      return StagedCodec::encode(x, row_index, rows_per_group);
    }
    check_encode(context(), x, row_index, rows_per_group);
    return encode_rows(x.contiguous(), row_index, rows_per_group,
                       whole_ ? nullptr : states.current.get());
  }

  void decode_into(at::Tensor& out, const at::Tensor& row_index, const at::Tensor& bytes,
                   const std::vector<int64_t>& bytes_per_group,
                   const std::vector<int64_t>& rows_per_group) const override {
    if (!on_gpu_) {
      return StagedCodec::decode_into(out, row_index, bytes, bytes_per_group, rows_per_group);
    }
    check_decode(context(), out, row_index, bytes, bytes_per_group, rows_per_group);
    const c10::DeviceGuard guard(bytes.device());
    const Opened opened(bytes, bytes_per_group, ParcelKind::lsh_expert, context());
    if (!decodes(opened)) {
      return StagedCodec::decode_into(out, row_index, bytes, bytes_per_group, rows_per_group);
    }
    opened.check_rows(rows_per_group);
    decode_opened(out, RowIndex(row_index, out.size(0), bytes.device(), "decode"), opened);
  }

  [[nodiscard]] Decoded decode(const at::Tensor& bytes,
                               const std::vector<int64_t>& bytes_per_group) const override {
    if (!on_gpu_) return StagedCodec::decode(bytes, bytes_per_group);
    check_bytes(context(), bytes, bytes_per_group);
    const c10::DeviceGuard guard(bytes.device());
    const Opened opened(bytes, bytes_per_group, ParcelKind::lsh_expert, context());
    if (!decodes(opened)) return StagedCodec::decode(bytes, bytes_per_group);
    check_sizes(opened);
    Decoded decoded;
    decoded.rows_per_group = opened.rows_per_group();
    decoded.rows = at::empty({opened.rows(), context().hidden_size},
                             at::dtype(context().dtype).device(bytes.device()));
    decode_opened(decoded.rows, RowIndex({}, opened.rows(), bytes.device(), "decode"), opened);
    return decoded;
  }

  bool refresh(Communicator& comm) override {
    const bool changed = StagedCodec::refresh(comm);
    if (changed) std::swap(states_[0], states_[1]), states_[0] = {};
    return changed;
  }

 private:
  bool by_group_;
  bool whole_;
  bool on_gpu_;
  std::optional<std::uint32_t> dither_key_;
  // Made when first needed: the current state and the former.
  mutable std::mutex mutex_;
  mutable std::array<DeviceState, 2> states_;
  Projection projection_;

  [[nodiscard]] const LshInternals& internals() const {
    return dynamic_cast<const LshInternals&>(cpu());
  }
  [[nodiscard]] LearnedStates learned_states() const { return internals().learned_states(); }

  DeviceState on_device(const LearnedState& state, at::Device device) const {
    const std::lock_guard lock(mutex_);
    for (const DeviceState& known : states_) {
      if (known.version == state.version) return known;
    }
    DeviceState made;
    made.version = state.version;
    made.centroids = state.centroids;
    const bool basis = state.basis.defined();
    made.bases = upload(basis ? state.bases : state.ordered_bases, device);
    if (basis) {
      made.to_coefficients = unpacked(state.to_coefficients, device);
      made.to_residual = unpacked(state.to_residual, device);
      made.stretch = state.stretch;
    } else if (!state.order.empty()) {
      std::vector<std::int32_t> place(state.order.size());
      for (std::size_t j = 0; j < place.size(); ++j) {
        place[static_cast<std::size_t>(state.order[j])] = static_cast<std::int32_t>(j);
      }
      made.order = upload(state.order, device);
      made.place = upload(place, device);
    }
    made.mean_z = upload(state.mean_z, device);
    made.centroids_z = upload(state.centroids_z, device);
    made.half_norms = room<float>(state.centroids, device);
    launchers::half_norms(as<float>(made.half_norms), as<const float>(made.centroids_z),
                          state.centroids, options().projection(), current_stream(device));
    const bool current = learned_states().current.get() == &state;
    return states_[current ? 0 : 1] = made;
  }

  [[nodiscard]] StepCode steps_of(float group_step) const {
    return StepCode(group_step, dither_key_.has_value(), dither_key_.value_or(0));
  }

  // encode ---------------------------------------------------------------------------------------

  // The ids of the rows' nearest centroids, int32.
  at::Tensor nearest(const launchers::RowsOf<T>& rows, const DeviceState& state,
                     at::Device device) const {
    const std::int64_t columns = options().projection();
    const launchers::Stream stream = current_stream(device);
    mark_phase("project");
    const at::Tensor z = projection_(rows, device);
    mark_phase("nearest");
    at::Tensor ids = room<std::int32_t>(rows.rows, device);
    launchers::nearest_centroid(as<std::int32_t>(ids), as<const float>(z),
                                as<const float>(state.mean_z), as<const float>(state.centroids_z),
                                as<const float>(state.half_norms), rows.rows, state.centroids,
                                columns, stream);
    return ids;
  }

  static constexpr bool kToBfloat16 = sizeof(T) == 2;

  // Ids are used by the groups (each coded alone) that a sample says save bytes. bound: of the
  // rows, with a basis of their coefficients.
  void choose_ids(launchers::CodedGroup* groups, const std::vector<launchers::CodedGroup>& list,
                  const launchers::RowsOf<T>& rows, const at::Tensor& bound,
                  const std::int32_t* ids, const DeviceState& state, at::Device device) const {
    constexpr std::int64_t kSampleRows = 64;  // as StateCoder
    mark_phase("estimate");
    const launchers::Stream stream = current_stream(device);
    const at::Tensor bits =
        at::zeros({static_cast<std::int64_t>(list.size()), 4}, at::dtype(at::kLong).device(device));
    for (std::size_t g = 0; g < list.size(); ++g) {
      const std::int64_t first = list[g].first, count = list[g].rows;
      const std::int64_t stride = std::max<std::int64_t>(1, count / kSampleRows);
      const std::int64_t samples = (count + stride - 1) / stride;
      auto* sums = as<std::int64_t>(bits) + 4 * g;
      if (state.has_basis()) {
        const at::Tensor some =
            bound.view(at::kDouble).slice(0, first, first + count, stride).contiguous();
        for (const auto* used : {ids, static_cast<const std::int32_t*>(nullptr)}) {
          const at::Tensor coefficients =
              coefficients_of(rows, first, samples, stride, nullptr, 0, used, state, device);
          launchers::estimate_rows<float>(
              used != nullptr ? sums : sums + 2,
              {as<const float>(coefficients), nullptr, samples, samples, rows.hidden}, 1,
              groups + g, as<const double>(some), nullptr, nullptr, sizeof(T), stream);
        }
      } else {
        launchers::RowsOf<T> part = rows;
        part.rows = count;
        if (rows.index != nullptr) {
          part.index += first;
        } else {
          part.x += first * rows.hidden;
        }
        const auto* bounds = as<const double>(bound) + first;
        launchers::estimate_rows<T>(sums, part, stride, groups + g, bounds, ids + first, nullptr,
                                    sizeof(T), stream);
        launchers::estimate_rows<T>(sums + 2, part, stride, groups + g, bounds, nullptr, nullptr,
                                    sizeof(T), stream);
      }
      launchers::choose_ids(groups + g, sums, sums + 2, samples, stream);
    }
  }

  // float [count, hidden]: what the rows first, first + stride, ... are in the basis.
  at::Tensor coefficients_of(const launchers::RowsOf<T>& rows, std::int64_t first,
                             std::int64_t count, std::int64_t stride,
                             const launchers::CodedGroup* groups, std::int64_t group_count,
                             const std::int32_t* ids, const DeviceState& state,
                             at::Device device) const {
    constexpr std::int64_t kChunk = 4096;
    const std::int64_t hidden = rows.hidden;
    at::Tensor out = at::empty({count, hidden}, at::dtype(at::kFloat).device(device));
    const at::Tensor residual =
        at::empty({std::min(kChunk, count), hidden}, at::dtype(at::kFloat).device(device));
    for (std::int64_t i = 0; i < count; i += kChunk) {
      const std::int64_t some = std::min(kChunk, count - i);
      launchers::basis_residuals<T>(as<float>(residual), rows, first + i * stride, some, stride,
                                    groups, group_count, as<const float>(state.bases), ids,
                                    current_stream(device));
      projection_.multiply(out.slice(0, i, i + some), residual, state.to_coefficients, some, hidden,
                           hidden);
    }
    return out;
  }

  // state null: rows as they are, or in parcels that explain themselves.
  Encoded encode_rows(const at::Tensor& x, const at::Tensor& row_index,
                      const std::vector<int64_t>& rows_per_group, const LearnedState* state) const {
    const at::Device device = x.device();
    const c10::DeviceGuard guard(device);
    const launchers::Stream stream = current_stream(device);
    const std::int64_t hidden = context().hidden_size, tokens = x.size(0);
    const RowIndex index(row_index, tokens, device, "encode");
    const Groups groups = groups_of(rows_per_group);
    const auto group_count = static_cast<std::int64_t>(groups.of_rows.size());
    const launchers::RowsOf<T> stream_rows{as<const T>(x), index.data(), tokens,
                                           row_index.defined() ? row_index.numel() : tokens,
                                           hidden};
    Encoded encoded;
    encoded.bytes_per_group.assign(rows_per_group.size(), 0);
    encoded.centroids_per_group.assign(rows_per_group.size(), 0);
    encoded.centroids = at::empty({0, hidden}, x.options());
    encoded.assignment = at::full({stream_rows.rows}, -1, at::dtype(at::kLong).device(device));
    CodecStats& stats = encoded.stats;
    stats.rows = stream_rows.rows;
    stats.raw_bytes = 2 * stream_rows.rows * hidden;
    encoded.bytes = at::empty({0}, at::dtype(at::kByte).device(device));
    if (stream_rows.rows == 0) return encoded;

    // A row's bytes do not depend on its group, unless the group has a common bound: a token that
    // goes to several ranks is coded once.
    launchers::RowsOf<T> rows = stream_rows;
    const std::int64_t* number = nullptr;
    const bool explains = state == nullptr && !whole_;
    if (!explains && !by_group_ && index.data() != nullptr && tokens <= stream_rows.rows) {
      number = index.data();
      rows.index = nullptr;
      rows.rows = tokens;
    }
    const at::Tensor squared = room<double>(rows.rows, device);
    mark_phase("norms");
    launchers::squared_norms<T>(as<double>(squared), rows, stream);
    const at::Tensor stream_groups = upload(groups.of_rows, device);
    const auto* of_rows = as<const launchers::CodedGroup>(stream_groups);

    launchers::CodedRows coded;
    at::Tensor bound, ids, coding_groups, records, payloads, payload_bytes, whole, error, offset;
    std::vector<launchers::CodedGroup> coding = groups.of_rows;
    std::optional<BatchPlan> plan;
    at::Tensor coded_bound, coefficients;  // with a basis
    double stretch = 1;
    if (!whole_) bound = room<double>(rows.rows, device);
    if (explains) {
      plan = plan_batch<T>(rows, groups, options(), projection_, dither_key_,
                           as<const double>(squared), as<double>(bound), device);
      coding_groups = plan->coded;
      ids = plan->ids;
    }
    if (state != nullptr) {
      const DeviceState known = on_device(*state, device);
      if (!by_group_) {
        coding.resize(1);
        coding[0] = {};
        coding[0].rows = rows.rows;
      }
      for (auto& group : coding) {
        group.dithered = dither_key_.has_value();
        group.dither_key = dither_key_.value_or(0);
        group.order = as<const std::int32_t>(known.order);
        group.place = as<const std::int32_t>(known.place);
        // Coefficients are coded as they are.
        group.bases = known.has_basis() ? nullptr : as<const float>(known.bases);
        group.centroids = static_cast<std::int32_t>(known.centroids);
        group.id_bytes = static_cast<std::int32_t>(centroid_id_bytes(known.centroids));
      }
      coding_groups = upload(coding, device);
      auto* coding_data = as<launchers::CodedGroup>(coding_groups);
      const auto coding_count = static_cast<std::int64_t>(coding.size());
      launchers::row_bounds(as<double>(bound), coding_data, coding_count, as<const double>(squared),
                            options().max_error(), by_group_, hidden, stream);
      if (known.has_basis()) {
        coded_bound = room<double>(rows.rows, device);
        launchers::coefficient_bounds(as<double>(coded_bound), as<const double>(bound),
                                      as<const double>(squared), known.stretch, kToBfloat16,
                                      rows.rows, hidden, stream);
      }
      if (known.centroids > 0) {
        ids = nearest(rows, known, device);
        choose_ids(coding_data, coding, rows, coded_bound.defined() ? coded_bound : bound,
                   as<const std::int32_t>(ids), known, device);
      }
      if (known.has_basis()) {
        mark_phase("product");
        coefficients = coefficients_of(rows, 0, rows.rows, 1, coding_data, coding_count,
                                       as<const std::int32_t>(ids), known, device);
        stretch = known.stretch;
      }
    }
    if (!whole_) {
      const RowLayout largest(hidden, StepCode(0, /*dithered=*/true), 2, sizeof(T));
      coded.record_stride = (static_cast<std::int64_t>(largest.record_bytes) + 31) / 16 * 16;
      coded.payload_stride = (hidden * static_cast<std::int64_t>(sizeof(T)) + 31) / 16 * 16;
      records = room<std::uint8_t>(rows.rows * coded.record_stride, device);
      payloads = room<std::uint8_t>(rows.rows * coded.payload_stride, device);
      payload_bytes = room<std::int64_t>(rows.rows, device);
      whole = room<std::uint8_t>(rows.rows, device);
      error = room<double>(rows.rows, device);
      offset = room<std::int64_t>(stream_rows.rows, device);
      coded.records = as<std::uint8_t>(records);
      coded.payloads = as<std::uint8_t>(payloads);
      coded.payload_bytes = as<std::int64_t>(payload_bytes);
      coded.whole = as<std::uint8_t>(whole);
      coded.error = as<double>(error);
      const auto* coding_data = as<const launchers::CodedGroup>(coding_groups);
      const auto coding_count = static_cast<std::int64_t>(coding.size());
      mark_phase("code");  // residual, step search, bands and packing: one kernel
      if (coefficients.defined()) {
        launchers::encode_coefficients<T>(coded, rows, as<const float>(coefficients), coding_data,
                                          coding_count, as<const double>(squared),
                                          as<const double>(coded_bound),
                                          as<const std::int32_t>(ids), stream);
        launchers::coefficient_errors(as<double>(error), as<const double>(bound),
                                      as<const double>(squared), as<const std::uint8_t>(whole),
                                      stretch, kToBfloat16, rows.rows, hidden, stream);
      } else {
        launchers::encode_rows<T>(coded, rows, coding_data, coding_count, as<const double>(squared),
                                  as<const double>(bound), as<const std::int32_t>(ids), stream);
      }
    } else {
      coding_groups = stream_groups;
    }
    const at::Tensor totals = room<launchers::RowTotals>(group_count, device);
    mark_phase("sizes");
    launchers::row_totals(
        as<launchers::RowTotals>(totals), as<std::int64_t>(offset), of_rows, group_count,
        as<const launchers::CodedGroup>(coding_groups), static_cast<std::int64_t>(coding.size()),
        number, rows.rows, as<const std::int64_t>(payload_bytes), as<const std::uint8_t>(whole),
        as<const double>(squared), as<const double>(bound), as<const double>(error), stream);

    // The one wait: sizes and statistics.
    const at::Tensor bad_index = index.bad().defined() ? index.bad() : none_bad(1, device);
    std::vector<at::Tensor> parts{bad_index.view(at::kByte), totals};
    if (plan) parts.push_back(plan->results);
    const auto found = download<std::uint8_t>(at::cat(parts));
    std::int64_t bad = 0;
    std::vector<launchers::RowTotals> total(groups.of_rows.size());
    std::vector<launchers::PlanResult> results(plan ? total.size() : 0);
    std::memcpy(&bad, found.data(), sizeof bad);
    std::memcpy(total.data(), found.data() + sizeof bad, total.size() * sizeof total[0]);
    std::memcpy(results.data(), found.data() + sizeof bad + total.size() * sizeof total[0],
                results.size() * sizeof(launchers::PlanResult));
    index.check(bad);
    Assembly assembly;
    double relative_sum = 0;
    std::vector<launchers::SharedPlace> shared_places;
    std::vector<std::int64_t> centroids_before(total.size(), -1), used_slots;
    for (std::size_t i = 0; i < total.size(); ++i) {
      if (total[i].bad_row >= 0) refuse_row(*this, row_number(row_index, total[i].bad_row));
      const std::int64_t before = assembly.bytes();
      const auto* result = plan ? &results[i] : nullptr;
      const auto rest = add_parcel(assembly, groups.of_rows[i], state, plan ? &*plan : nullptr,
                                   result, total[i], stats, relative_sum);
      encoded.bytes_per_group[groups.number[i]] = assembly.bytes() - before;
      if (!rest) continue;
      shared_places.push_back({static_cast<std::int64_t>(i), *rest});
      centroids_before[i] = std::ssize(used_slots);
      encoded.centroids_per_group[groups.number[i]] = result->count;
      for (std::int64_t k = 0; k < result->count; ++k) {
        used_slots.push_back(plan->groups[i].slot + k);
      }
    }
    mark_phase("assemble");
    assembly.allocate(device);
    encoded.bytes = assembly.out();
    launchers::assemble<T>(as<std::uint8_t>(encoded.bytes), assembly.places(), group_count,
                           assembly.heads(), coded, stream_rows, number,
                           as<const std::int64_t>(offset), stream);
    if (!shared_places.empty()) {
      const at::Tensor places = upload(shared_places, device);
      launchers::write_shared(
          as<std::uint8_t>(encoded.bytes), as<const launchers::SharedPlace>(places),
          std::ssize(shared_places), as<const launchers::PlanResult>(plan->results), plan->rows,
          plan->means, plan->centroids, plan->place, plan->record_bytes, hidden, stream);
    }
    mark_phase("checksum");
    assembly.seal();
    mark_phase("rest");
    if (!used_slots.empty()) {
      const at::Tensor before = upload(centroids_before, device);
      launchers::assignments(as<std::int64_t>(encoded.assignment), plan->rows.id, plan->rows,
                             as<const std::int64_t>(before), stream);
      const at::Tensor slots = upload(used_slots, device).view(at::kLong);
      encoded.centroids = plan->natural.view(at::kFloat)
                              .view({-1, hidden})
                              .index_select(0, slots)
                              .to(context().dtype);
    }
    stats.clusters = std::ssize(used_slots);
    stats.sent_bytes = assembly.bytes();
    stats.mean_relative_error = relative_sum / static_cast<double>(stream_rows.rows);
    return encoded;
  }

  // Returns where a parcel that explains itself goes on behind its steps.
  std::optional<std::int64_t> add_parcel(Assembly& assembly, const launchers::CodedGroup& group,
                                         const LearnedState* state, const BatchPlan* plan,
                                         const launchers::PlanResult* result,
                                         const launchers::RowTotals& total, CodecStats& stats,
                                         double& relative_sum) const {
    ParcelHeader header;
    header.kind = ParcelKind::lsh_expert;
    header.dtype = context().dtype;
    header.rows = static_cast<std::uint32_t>(group.rows);
    header.hidden_size = static_cast<std::uint32_t>(context().hidden_size);
    const auto n = static_cast<std::size_t>(group.rows);
    const RowLayout layout(context().hidden_size, steps_of(total.step),
                           static_cast<std::size_t>(total.id_bytes), sizeof(T));
    const std::size_t bytes =
        n * layout.record_bytes + static_cast<std::size_t>(total.payload_bytes);
    std::vector<std::uint8_t> steps;
    const auto append = [&](const auto& value, std::uint8_t flag) {
      header.flags |= flag;
      steps.resize(steps.size() + 4);
      std::memcpy(steps.data() + steps.size() - 4, &value, 4);
    };
    if (total.step > 0) append(total.step, kGroupStep);
    if (dither_key_) append(*dither_key_, kDither);
    const std::size_t shared =
        plan != nullptr ? steps.size() + static_cast<std::size_t>(plan->shared_bytes(*result)) : 0;
    if ((state == nullptr && plan == nullptr) || bytes + shared >= n * layout.whole_bytes) {
      header.flags = kAllWhole;
      header.body_bytes = n * layout.whole_bytes;
      stats.whole_rows += group.rows;
      assembly.add(group.first, header, {}, 0);
      return std::nullopt;
    }
    header.body_bytes = bytes;
    header.shared_bytes = static_cast<std::uint32_t>(steps.size());
    if (state != nullptr) {
      header.centroids = total.id_bytes > 0 ? static_cast<std::uint32_t>(state->centroids) : 0;
      header.state_version = state->version;
      if (state->basis.defined()) header.flags |= kBasis;
    } else {
      header.shared_bytes = static_cast<std::uint32_t>(shared);
      header.centroids = static_cast<std::uint32_t>(result->count);
      if (result->ordered != 0) header.flags |= kHasOrder;
      if (result->variant != launchers::kPlain) header.flags |= kHasMean;
    }
    const std::int64_t rest =
        assembly.add(group.first, header, steps, static_cast<std::int64_t>(layout.record_bytes));
    add_totals(stats, total, relative_sum);
    return plan != nullptr ? std::optional(rest) : std::nullopt;
  }

  // decode ---------------------------------------------------------------------------------------

  // The state a parcel was coded against; null: none, or not known here.
  static const LearnedState* state_of(const ParcelHeader& header, const LearnedStates& states) {
    for (const auto* state : {states.current.get(), states.previous.get()}) {
      if (state != nullptr && state->version == header.state_version) return state;
    }
    return nullptr;
  }

  // Whether the GPU decodes these; what it does not know the CPU decodes, or refuses.
  [[nodiscard]] bool decodes(const Opened& opened) const {
    const auto states = learned_states();
    return std::all_of(opened.parcels().begin(), opened.parcels().end(), [&](const auto& one) {
      const ParcelHeader& header = one.header;
      if (header.flags == kAllWhole) return true;
      if (header.state_version == 0) {
        return (header.flags & ~(kHasMean | kHasOrder | kGroupStep | kDither)) == 0;
      }
      const LearnedState* state = state_of(header, states);
      return state != nullptr && (header.flags & ~(kGroupStep | kDither | kBasis)) == 0 &&
             ((header.flags & kBasis) != 0) == state->basis.defined() &&
             (header.centroids == 0 || header.centroids == state->centroids);
    });
  }

  [[nodiscard]] RowLayout layout_of(const ParcelHeader& header) const {
    const StepCode steps((header.flags & kGroupStep) != 0 ? 1.0F : 0.0F,
                         (header.flags & kDither) != 0);
    return {context().hidden_size, steps, centroid_id_bytes(header.centroids), sizeof(T)};
  }

  void check_sizes(const Opened& opened) const {
    for (const auto& one : opened.parcels()) {
      const ParcelHeader& header = one.header;
      const RowLayout layout = layout_of(header);
      const std::size_t n = header.rows;
      if (header.flags == kAllWhole) {
        LSHMOE_VALIDATE(header.centroids == 0 && header.state_version == 0 &&
                            header.shared_bytes == 0 && header.body_bytes == n * layout.whole_bytes,
                        "decode: a parcel of ", n, " whole rows has ", header.body_bytes,
                        " bytes of them (damaged parcel)");
        continue;
      }
      const std::uint32_t step_bytes =
          ((header.flags & kGroupStep) != 0 ? 4 : 0) + ((header.flags & kDither) != 0 ? 4 : 0);
      LSHMOE_VALIDATE(n <= header.body_bytes / layout.record_bytes &&
                          (header.state_version != 0 ? header.shared_bytes == step_bytes
                                                     : header.shared_bytes >= step_bytes),
                      "decode: a parcel of ", header.body_bytes, " + ", header.shared_bytes,
                      " bytes says it has ", n, " rows (damaged parcel)");
    }
  }

  void decode_opened(at::Tensor& out, const RowIndex& index, const Opened& opened) const {
    check_sizes(opened);
    if (opened.rows() == 0) return;
    const at::Device device = out.device();
    const launchers::Stream stream = current_stream(device);
    const auto states = learned_states();
    const std::int64_t hidden = context().hidden_size;
    std::vector<launchers::CodedGroup> coded;
    std::vector<std::int64_t> body;  // bytes of payloads of each
    std::vector<launchers::RawPlace> raw;
    mark_phase("shared part");
    const auto steps = read_steps(opened);
    const Bytes shared = read_shared(opened, device);
    std::vector<DeviceState> alive;  // until the kernels are queued; one for each of `coded`
    bool any_basis = false;
    for (std::size_t i = 0; i < opened.parcels().size(); ++i) {
      const auto& one = opened.parcels()[i];
      if (one.header.flags == kAllWhole) {
        raw.push_back({one.first, one.header.rows, one.body});
        continue;
      }
      const DeviceState state = one.header.state_version != 0
                                    ? on_device(*state_of(one.header, states), device)
                                    : explained(one, bytes_of(shared, i), device);
      const RowLayout layout = layout_of(one.header);
      alive.push_back(state);
      launchers::CodedGroup group;
      group.first = one.first;
      group.rows = one.header.rows;
      group.step = steps[i].step;
      group.dithered = (one.header.flags & kDither) != 0;
      group.dither_key = steps[i].dither_key;
      group.id_bytes = static_cast<std::int32_t>(layout.id_bytes);
      group.centroids = static_cast<std::int32_t>(one.header.centroids);
      group.order = as<const std::int32_t>(state.order);
      group.place = as<const std::int32_t>(state.place);
      group.bases = as<const float>(state.bases);
      group.coefficients = state.has_basis();
      any_basis |= state.has_basis();
      group.records = one.body;
      group.payloads = one.body + group.rows * static_cast<std::int64_t>(layout.record_bytes);
      group.end = one.body + one.header.body_bytes;
      coded.push_back(group);
      body.push_back(group.end - group.payloads);
    }
    // Parcels of both kinds: each by its own launch, over its own rows.
    T* to = as<T>(out);
    const std::int64_t out_rows = out.size(0);
    for (const auto& place : raw) {
      const launchers::RawPlace alone{0, place.rows, place.body};
      const at::Tensor on_device = upload(std::vector<launchers::RawPlace>{alone}, device);
      launchers::scatter_raw<T>(index.data() != nullptr ? to : to + place.first * hidden,
                                index.data() != nullptr ? index.data() + place.first : nullptr,
                                out_rows - (index.data() != nullptr ? 0 : place.first),
                                as<const launchers::RawPlace>(on_device), 1, place.rows, hidden,
                                stream);
    }
    const at::Tensor bad = none_bad(launchers::kBadKinds, device);
    const auto count = static_cast<std::int64_t>(coded.size());
    const at::Tensor totals = room<launchers::RowTotals>(count, device);
    at::Tensor payload_bytes, offset, groups;
    if (count > 0) {
      // Rows in the order of the coded groups alone.
      std::int64_t coded_rows = 0;
      std::vector<std::int64_t> numbers;
      for (auto& group : coded) {
        for (std::int64_t i = 0; i < group.rows && !raw.empty(); ++i) {
          numbers.push_back(group.first + i);
        }
        group.first = coded_rows;
        coded_rows += group.rows;
      }
      groups = upload(coded, device);
      const auto* data = as<const launchers::CodedGroup>(groups);
      at::Tensor to_rows;
      const std::int64_t* to_index = index.data();
      if (!raw.empty()) {
        to_rows = upload(numbers, device).view(at::kLong);
        if (to_index != nullptr) to_rows = index.tensor().index_select(0, to_rows);
        to_index = as<const std::int64_t>(to_rows);
      }
      payload_bytes = room<std::int64_t>(coded_rows, device);
      offset = room<std::int64_t>(coded_rows, device);
      mark_phase("sizes");
      launchers::record_sizes(as<std::int64_t>(payload_bytes), as<std::int64_t>(bad), data, count,
                              coded_rows, hidden, sizeof(T), stream);
      launchers::row_totals(as<launchers::RowTotals>(totals), as<std::int64_t>(offset), data, count,
                            data, count, nullptr, coded_rows, as<const std::int64_t>(payload_bytes),
                            nullptr, nullptr, nullptr, nullptr, stream);
      mark_phase("unpack and restore");
      if (!any_basis) {
        launchers::decode_rows<T>(to, to_index, out_rows, as<std::int64_t>(bad), data, count,
                                  as<const std::int64_t>(offset), coded_rows, hidden, stream);
      } else {
        const auto floats = at::dtype(at::kFloat).device(device);
        const at::Tensor values = at::zeros({coded_rows, hidden}, floats);
        const at::Tensor residual = at::empty({coded_rows, hidden}, floats);
        const at::Tensor base_id = room<std::int32_t>(coded_rows, device);
        launchers::decode_coefficients<T>(to, as<float>(values), as<std::int32_t>(base_id),
                                          to_index, out_rows, as<std::int64_t>(bad), data, count,
                                          as<const std::int64_t>(offset), coded_rows, hidden,
                                          stream);
        mark_phase("product");
        for (std::size_t i = 0; i < coded.size(); ++i) {
          if (!coded[i].coefficients) continue;
          projection_.multiply(residual.narrow(0, coded[i].first, coded[i].rows),
                               values.narrow(0, coded[i].first, coded[i].rows),
                               alive[i].to_residual, coded[i].rows, hidden, hidden);
        }
        mark_phase("add bases");
        launchers::add_bases<T>(to, to_index, as<const float>(residual),
                                as<const std::int32_t>(base_id), data, count, coded_rows, hidden,
                                stream);
      }
    }
    mark_phase("checks");
    const at::Tensor bad_index = index.bad().defined() ? index.bad() : none_bad(1, device);
    const auto found = download<std::uint8_t>(
        at::cat({bad.view(at::kByte), bad_index.view(at::kByte), totals, opened.sums()}));
    std::int64_t faults[launchers::kBadKinds + 1];
    const std::uint8_t* at = found.data();
    std::memcpy(faults, at, sizeof faults);
    at += sizeof faults;
    std::vector<launchers::RowTotals> total(coded.size());
    std::memcpy(total.data(), at, total.size() * sizeof(launchers::RowTotals));
    at += total.size() * sizeof(launchers::RowTotals);
    std::vector<std::uint32_t> sums(opened.parcels().size());
    std::memcpy(sums.data(), at, 4 * sums.size());
    opened.check_sums(sums.data());
    const char* kFaults[] = {"'s record is none that is ever written",
                             " names a centroid that does not exist",
                             "'s payload holds a number out of its range"};
    for (int kind = 0; kind < launchers::kBadKinds; ++kind) {
      LSHMOE_VALIDATE(faults[kind] == kNoneBad, "decode: row ", faults[kind], kFaults[kind],
                      " (damaged parcel)");
    }
    for (std::size_t i = 0; i < coded.size(); ++i) {
      LSHMOE_VALIDATE(total[i].payload_bytes == body[i], "decode: the rows of a parcel have ",
                      total[i].payload_bytes, " bytes of payload, the parcel has ", body[i],
                      " (damaged parcel)");
    }
    index.check(faults[launchers::kBadKinds]);
  }

  // The shared parts of parcels that explain themselves, on the host: small beside the rows. Waits
  // for the device where there are any.
  struct Bytes {
    std::vector<std::uint8_t> data;
    std::vector<std::size_t> begin;  // [parcels + 1]
  };
  [[nodiscard]] static Bytes read_shared(const Opened& opened, at::Device device) {
    Bytes bytes;
    std::vector<at::Tensor> parts;
    std::size_t size = 0;
    for (const auto& one : opened.parcels()) {
      bytes.begin.push_back(size);
      if (one.header.flags == kAllWhole || one.header.state_version != 0) continue;
      parts.push_back(at::from_blob(const_cast<std::uint8_t*>(one.shared),
                                    {static_cast<std::int64_t>(one.header.shared_bytes)},
                                    at::dtype(at::kByte).device(device)));
      size += one.header.shared_bytes;
    }
    bytes.begin.push_back(size);
    if (size > 0) bytes.data = download<std::uint8_t>(at::cat(parts));
    return bytes;
  }
  static std::span<const std::uint8_t> bytes_of(const Bytes& bytes, std::size_t parcel) {
    return {bytes.data.data() + bytes.begin[parcel], bytes.begin[parcel + 1] - bytes.begin[parcel]};
  }
  // What a parcel that explains itself says, on the device.
  [[nodiscard]] DeviceState explained(const Opened::One& one, std::span<const std::uint8_t> shared,
                                      at::Device device) const {
    const SharedPart part = internals().shared_part(one.header, shared);
    DeviceState state;
    state.bases = upload(part.bases, device);
    if (!part.order.empty()) state.order = upload(part.order, device);
    return state;
  }

  // What the shared parts begin with.
  struct Steps {
    float step = 0;  // of the group; 0: none
    std::uint32_t dither_key = 0;
  };
  [[nodiscard]] std::vector<Steps> read_steps(const Opened& opened) const {
    std::vector<Steps> steps(opened.parcels().size());
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const std::uint8_t flags = opened.parcels()[i].header.flags;
      if (flags == kAllWhole) continue;
      const std::uint8_t* at = opened.shared_head(i);
      if ((flags & kGroupStep) != 0) {
        std::memcpy(&steps[i].step, at, 4);
        at += 4;
        LSHMOE_VALIDATE(
            steps[i].step >= 4 * kernels::kMinStep && steps[i].step <= kernels::kMaxStep,
            "decode: a parcel's step is out of range (damaged parcel)");
      }
      if ((flags & kDither) != 0) std::memcpy(&steps[i].dither_key, at, 4);
    }
    return steps;
  }
};

}  // namespace

std::shared_ptr<Codec> make_lsh_codec(const CodecOptions& options, const CodecContext& context) {
  if (context.dtype == at::kBFloat16) {
    return std::make_shared<LshCodec<kernels::Bfloat16>>(options, context);
  }
  return std::make_shared<LshCodec<float>>(options, context);
}

}  // namespace lshmoe::cuda
