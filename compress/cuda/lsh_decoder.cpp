#include "lshmoe/compress/cuda/lsh_decoder.hpp"

#include <algorithm>
#include <cstring>

#include "lshmoe/compress/cuda/stream_phases.hpp"
#include "lshmoe/compress/state_coder.hpp"
#include "lshmoe/kernels/cuda/basis.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {
namespace {

// The state a parcel was coded against; null: none, or not known here.
const LearnedState* state_of(const ParcelHeader& header, const LearnedStates& states) {
  for (const auto* state : {states.current.get(), states.previous.get()}) {
    if (state != nullptr && state->version == header.state_version) return state;
  }
  return nullptr;
}

// The shared parts of parcels that explain themselves, on the host: small beside the rows. Waits
// for the device where there are any.
struct Bytes {
  std::vector<std::uint8_t> data;
  std::vector<std::size_t> begin;  // [parcels + 1]
};
Bytes read_shared(const Opened& opened, at::Device device) {
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
std::span<const std::uint8_t> bytes_of(const Bytes& bytes, std::size_t parcel) {
  return {bytes.data.data() + bytes.begin[parcel], bytes.begin[parcel + 1] - bytes.begin[parcel]};
}
// What the shared parts begin with.
struct Steps {
  float step = 0;  // of the group; 0: none
  std::uint32_t dither_key = 0;
};
std::vector<Steps> read_steps(const Opened& opened) {
  std::vector<Steps> steps(opened.parcels().size());
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const std::uint8_t flags = opened.parcels()[i].header.flags;
    if (flags == kAllWhole) continue;
    const std::uint8_t* at = opened.shared_head(i);
    if ((flags & kGroupStep) != 0) {
      std::memcpy(&steps[i].step, at, 4);
      at += 4;
      LSHMOE_VALIDATE(steps[i].step >= 4 * kernels::kMinStep && steps[i].step <= kernels::kMaxStep,
                      "decode: a parcel's step is out of range (damaged parcel)");
    }
    if ((flags & kDither) != 0) std::memcpy(&steps[i].dither_key, at, 4);
  }
  return steps;
}

}  // namespace

template <class T>
bool LshDecoder<T>::decodes(const Opened& opened) const {
  const auto states = cpu_.learned_states();
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

template <class T>
RowLayout LshDecoder<T>::layout_of(const ParcelHeader& header) const {
  const StepCode steps((header.flags & kGroupStep) != 0 ? 1.0F : 0.0F,
                       (header.flags & kDither) != 0);
  return {context_.hidden_size, steps, centroid_id_bytes(header.centroids), sizeof(T)};
}

template <class T>
void LshDecoder<T>::check_sizes(const Opened& opened) const {
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

template <class T>
void LshDecoder<T>::decode(at::Tensor& out, const RowIndex& index, const Opened& opened) const {
  check_sizes(opened);
  if (opened.rows() == 0) return;
  const at::Device device = out.device();
  const launchers::Stream stream = current_stream(device);
  const auto states = cpu_.learned_states();
  const std::int64_t hidden = context_.hidden_size;
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
    const DeviceState state =
        one.header.state_version != 0
            ? states_.get(*state_of(one.header, states), projection_.columns(), device)
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
      launchers::decode_coefficients<T>(to, as<float>(values), as<std::int32_t>(base_id), to_index,
                                        out_rows, as<std::int64_t>(bad), data, count,
                                        as<const std::int64_t>(offset), coded_rows, hidden, stream);
      mark_phase("product");
      for (std::size_t i = 0; i < coded.size(); ++i) {
        if (!coded[i].coefficients) continue;
        projection_.multiply(residual.narrow(0, coded[i].first, coded[i].rows),
                             values.narrow(0, coded[i].first, coded[i].rows), alive[i].to_residual,
                             coded[i].rows, hidden, hidden);
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

template <class T>
DeviceState LshDecoder<T>::explained(const Opened::One& one, std::span<const std::uint8_t> shared,
                                     at::Device device) const {
  const SharedPart part = cpu_.shared_part(one.header, shared);
  DeviceState state;
  state.bases = upload(part.bases, device);
  if (!part.order.empty()) state.order = upload(part.order, device);
  return state;
}

template class LshDecoder<float>;
template class LshDecoder<kernels::Bfloat16>;

}  // namespace lshmoe::cuda
