// Kind lsh on a GPU.

#include <algorithm>
#include <cstring>
#include <optional>

#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/cuda/batch.hpp"
#include "lshmoe/compress/cuda/kinds.hpp"
#include "lshmoe/compress/cuda/lsh_decoder.hpp"
#include "lshmoe/compress/cuda/lsh_state.hpp"
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
        projection_(options, context),
        decoder_(context, internals(), states_, projection_) {}

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
    if (!decoder_.decodes(opened)) {
      return StagedCodec::decode_into(out, row_index, bytes, bytes_per_group, rows_per_group);
    }
    opened.check_rows(rows_per_group);
    decoder_.decode(out, RowIndex(row_index, out.size(0), bytes.device(), "decode"), opened);
  }

  [[nodiscard]] Decoded decode(const at::Tensor& bytes,
                               const std::vector<int64_t>& bytes_per_group) const override {
    if (!on_gpu_) return StagedCodec::decode(bytes, bytes_per_group);
    check_bytes(context(), bytes, bytes_per_group);
    const c10::DeviceGuard guard(bytes.device());
    const Opened opened(bytes, bytes_per_group, ParcelKind::lsh_expert, context());
    if (!decoder_.decodes(opened)) return StagedCodec::decode(bytes, bytes_per_group);
    decoder_.check_sizes(opened);
    Decoded decoded;
    decoded.rows_per_group = opened.rows_per_group();
    decoded.rows = at::empty({opened.rows(), context().hidden_size},
                             at::dtype(context().dtype).device(bytes.device()));
    decoder_.decode(decoded.rows, RowIndex({}, opened.rows(), bytes.device(), "decode"), opened);
    return decoded;
  }

  bool refresh(Communicator& comm) override {
    const bool changed = StagedCodec::refresh(comm);
    if (changed) states_.forget_oldest();
    return changed;
  }

 private:
  bool by_group_;
  bool whole_;
  bool on_gpu_;
  std::optional<std::uint32_t> dither_key_;
  Projection projection_;
  DeviceStates states_;
  LshDecoder<T> decoder_;

  [[nodiscard]] const LshInternals& internals() const {
    return dynamic_cast<const LshInternals&>(cpu());
  }
  [[nodiscard]] LearnedStates learned_states() const { return internals().learned_states(); }

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
    at::Tensor cap;
    if (!whole_) {
      bound = room<double>(rows.rows, device);
      cap = room<double>(1, device);
      launchers::find_norm_cap(as<double>(cap), as<const double>(squared), number, stream_rows.rows,
                               rows.rows, stream);
    }
    if (explains) {
      plan = plan_batch<T>(rows, groups, options(), projection_, dither_key_,
                           as<const double>(squared), as<const double>(cap), as<double>(bound),
                           device);
      coding_groups = plan->coded;
      ids = plan->ids;
    }
    if (state != nullptr) {
      const DeviceState known = states_.get(*state, options().projection(), device);
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
                            as<const double>(cap), options().max_error(), by_group_, hidden,
                            stream);
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
      if (total[i].bad_row >= 0) throw NonFiniteRow(*this, row_number(row_index, total[i].bad_row));
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
};

}  // namespace

std::shared_ptr<Codec> make_lsh_codec(const CodecOptions& options, const CodecContext& context) {
  if (context.dtype == at::kBFloat16) {
    return std::make_shared<LshCodec<kernels::Bfloat16>>(options, context);
  }
  return std::make_shared<LshCodec<float>>(options, context);
}

}  // namespace lshmoe::cuda
