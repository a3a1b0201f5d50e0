#include "lshmoe/compress/row_coder.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "lshmoe/compress/phases.hpp"
#include "lshmoe/kernels/checksum.hpp"
#include "lshmoe/kernels/rows.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

RowLayout::RowLayout(std::int64_t hidden_size, const StepCode& steps, std::size_t id,
                     std::size_t element_bytes)
    : hidden(hidden_size),
      bands((hidden_size + kernels::kBandValues - 1) / kernels::kBandValues),
      step_bytes(steps.bytes()),
      salt_bytes(steps.dithered() ? 1 : 0),
      id_bytes(id),
      index_bytes(static_cast<std::size_t>(bands + 1) / 2),
      record_bytes(step_bytes + salt_bytes + id + index_bytes),
      whole_bytes(static_cast<std::size_t>(hidden_size) * element_bytes) {}

template <class T>
RowCoder<T>::RowCoder(std::int64_t hidden, StepCode steps, std::size_t id_bytes)
    : layout_(hidden, steps, id_bytes, sizeof(T)),
      steps_(steps),
      residual_(static_cast<std::size_t>(hidden)),
      offset_(steps.dithered() ? static_cast<std::size_t>(hidden) : 0),
      q_(static_cast<std::size_t>(hidden)),
      ordered_(static_cast<std::size_t>(hidden)),
      index_(static_cast<std::size_t>(layout_.bands) + 1) {}

template <class T>
void RowCoder<T>::set_salt(std::uint32_t salt) {
  for (std::size_t j = 0; j < offset_.size(); ++j) {
    offset_[j] = kernels::dither(steps_.dither_key(), static_cast<std::uint32_t>(j), salt);
  }
}

template <class T>
void RowCoder<T>::write_record(std::uint8_t* record, std::uint16_t step, std::uint32_t salt,
                               std::uint32_t id) const {
  std::memcpy(record, &step, layout_.step_bytes);
  record += layout_.step_bytes;
  std::memcpy(record, &salt, layout_.salt_bytes);
  record += layout_.salt_bytes;
  std::memcpy(record, &id, layout_.id_bytes);
  std::uint8_t* indices = record + layout_.id_bytes;
  for (std::size_t i = 0; i < layout_.index_bytes; ++i) {
    indices[i] = static_cast<std::uint8_t>(index_[2 * i] | index_[2 * i + 1] << 4);
  }
}

template <class T>
std::uint16_t RowCoder<T>::step_of(const std::uint8_t* record) const {
  std::uint16_t step = 0;
  std::memcpy(&step, record, layout_.step_bytes);
  return step;
}

template <class T>
std::uint32_t RowCoder<T>::id(const std::uint8_t* record) const {
  std::uint32_t id = 0;
  std::memcpy(&id, record + layout_.step_bytes + layout_.salt_bytes, layout_.id_bytes);
  return id;
}

template <class T>
void RowCoder<T>::read_index(const std::uint8_t* record) {
  const std::uint8_t* indices = record + layout_.step_bytes + layout_.salt_bytes + layout_.id_bytes;
  for (std::size_t i = 0; i < layout_.index_bytes; ++i) {
    index_[2 * i] = indices[i] & 15;
    index_[2 * i + 1] = indices[i] >> 4;
  }
}

template <class T>
bool RowCoder<T>::is_zero(const std::uint8_t* record) const {
  return step_of(record) == steps_.zero_row();
}

template <class T>
bool RowCoder<T>::is_whole(const std::uint8_t* record) const {
  return step_of(record) == steps_.whole_row();
}

template <class T>
template <class Received>
std::size_t RowCoder<T>::encode(std::uint8_t* record, std::uint8_t* payload, const float* x,
                                const float* base, const float* natural, double bound, double norm,
                                std::uint32_t id, double* error) {
  const std::int64_t hidden = layout_.hidden;
  std::fill(index_.begin(), index_.end(), std::uint8_t{0});
  *error = 0;
  if (norm == 0) {
    write_record(record, steps_.zero_row(), 0, id);
    return 0;
  }
  // The receiver's own arithmetic decides; the slack covers another order of these double sums.
  const double allowed = bound * (1 - 1e-12);
  double left = 0;
  {
    const PhaseTimer timer(Phase::order, 12 * hidden);
    for (std::int64_t j = 0; j < hidden; ++j) residual_[j] = x[j] - base[j];
    left = std::sqrt(kernels::squared_norm(residual_.data(), hidden));
  }
  std::uint32_t salt = 0;
  if (steps_.dithered()) {
    salt = kernels::checksum(natural, static_cast<std::size_t>(hidden) * sizeof(float),
                             steps_.dither_key()) %
           kernels::kDitherSalts;
    set_salt(salt);
  }
  // With a dither even a small residual counts, or the rows' mean would not be kept.
  if (left <= bound && offset() == nullptr) {
    // What the receiver has already is near enough: any step does.
    const std::uint16_t code = steps_.bytes() == 1 ? 0 : kernels::step_code(1.0F);
    std::fill(q_.begin(), q_.end(), 0);
    *error = std::sqrt(
        kernels::reconstruction_error<Received>(x, base, q_.data(), hidden, steps_.value(code)));
    if (*error <= allowed) {
      write_record(record, code, 0, id);
      return 0;
    }
  }
  // Rounding (adding the base back, the cast to T) may break a bound that the estimate kept:
  // smaller steps are tried, further and further down, then the row goes whole.
  std::uint16_t code = steps_.zero_row();
  if (bound > 0) {
    const PhaseTimer timer(Phase::step_search, 4 * hidden);
    code = steps_.below(kernels::search_step(residual_.data(), hidden, bound, offset()));
  }
  for (int attempt = 0; attempt < 6 && steps_.is_step(code); ++attempt) {
    const float step = steps_.value(code);
    {
      const PhaseTimer timer(Phase::quantize, 16 * hidden);
      if (!kernels::quantize(q_.data(), residual_.data(), hidden, step, offset())) break;
      *error = std::sqrt(
          kernels::reconstruction_error<Received>(x, base, q_.data(), hidden, step, offset()));
    }
    if (*error <= allowed) {
      const PhaseTimer timer(Phase::pack, 4 * hidden);
      const std::int64_t bits = kernels::choose_alphabets(index_.data(), q_.data(), hidden);
      const auto bytes = static_cast<std::size_t>((bits + 7) / 8);
      if (bytes >= layout_.whole_bytes) break;
      std::memset(payload, 0, bytes + 8);
      kernels::pack_bands(payload, q_.data(), hidden, index_.data());
      write_record(record, code, salt, id);
      return bytes;
    }
    code = steps_.smaller(code, 1 << attempt);
  }
  std::fill(index_.begin(), index_.end(), std::uint8_t{0});
  *error = 0;
  write_record(record, steps_.whole_row(), 0, id);
  for (std::int64_t j = 0; j < hidden; ++j) {
    const T value = kernels::from_float<T>(natural[j]);
    std::memcpy(payload + static_cast<std::size_t>(j) * sizeof(T), &value, sizeof(T));
  }
  return layout_.whole_bytes;
}

template <class T>
void RowCoder<T>::estimate(const float* r, double bound, const std::int32_t* order,
                           std::int64_t* bits_plain, std::int64_t* bits_ordered) {
  const std::int64_t hidden = layout_.hidden;
  const auto whole = static_cast<std::int64_t>(8 * layout_.whole_bytes);
  *bits_plain = *bits_ordered = 0;
  if (offset() == nullptr && std::sqrt(kernels::squared_norm(r, hidden)) <= bound) return;
  set_salt(0);  // all alike
  const std::uint16_t code = bound > 0
                                 ? steps_.below(kernels::search_step(r, hidden, bound, offset()))
                                 : steps_.zero_row();
  if (!steps_.is_step(code) ||
      !kernels::quantize(q_.data(), r, hidden, steps_.value(code), offset())) {
    *bits_plain = *bits_ordered = whole;
    return;
  }
  *bits_plain = std::min(whole, kernels::choose_alphabets(index_.data(), q_.data(), hidden));
  *bits_ordered = *bits_plain;
  if (order != nullptr) {
    for (std::int64_t j = 0; j < hidden; ++j) ordered_[j] = q_[order[j]];
    *bits_ordered =
        std::min(whole, kernels::choose_alphabets(index_.data(), ordered_.data(), hidden));
  }
}

template <class T>
std::size_t RowCoder<T>::payload_bytes(const std::uint8_t* record) {
  const std::uint16_t step = step_of(record);
  read_index(record);
  // With an odd number of bands the last half byte is padding.
  LSHMOE_VALIDATE(layout_.bands % 2 == 0 || index_[static_cast<std::size_t>(layout_.bands)] == 0,
                  "decode: a row's record has bits set in its padding (damaged parcel)");
  const std::int64_t bits = kernels::payload_bits(index_.data(), layout_.hidden);
  if (step == steps_.zero_row() || step == steps_.whole_row()) {
    LSHMOE_VALIDATE(bits == 0, "decode: a zero or whole row has band indices (damaged parcel)");
    return step == steps_.whole_row() ? layout_.whole_bytes : 0;
  }
  LSHMOE_VALIDATE(steps_.is_step(step), "decode: a row's step code ", step,
                  " is not one (damaged parcel)");
  return static_cast<std::size_t>((bits + 7) / 8);
}

template <class T>
template <class Received>
void RowCoder<T>::decode(Received* out, const std::uint8_t* record, const std::uint8_t* payload,
                         std::size_t readable, const float* base) {
  const std::int64_t hidden = layout_.hidden;
  const std::uint16_t code = step_of(record);
  if (code == steps_.zero_row()) {
    std::fill(out, out + hidden, Received{});
    return;
  }
  if (code == steps_.whole_row()) {
    LSHMOE_ASSERT((std::is_same_v<T, Received>));
    std::memcpy(out, payload, layout_.whole_bytes);
    return;
  }
  read_index(record);
  const auto bits = kernels::payload_bits(index_.data(), hidden);
  const auto bytes = static_cast<std::size_t>((bits + 7) / 8);
  if (readable < bytes + 8) {
    // The last rows: unpack_bands reads up to 8 bytes further.
    padded_.assign(bytes + 8, 0);
    if (bytes > 0) std::memcpy(padded_.data(), payload, bytes);
    payload = padded_.data();
  }
  {
    const PhaseTimer timer(Phase::unpack, 4 * hidden + static_cast<std::int64_t>(bytes));
    LSHMOE_VALIDATE(kernels::unpack_bands(q_.data(), payload, hidden, index_.data()),
                    "decode: a row's payload holds a number out of its range (damaged parcel)");
  }
  const PhaseTimer timer(Phase::reconstruct,
                         static_cast<std::int64_t>(8 + sizeof(Received)) * hidden);
  const float step = steps_.value(code);
  if (layout_.salt_bytes == 0) {
    for (std::int64_t j = 0; j < hidden; ++j) {
      out[j] = kernels::reconstruct<Received>(base[j], static_cast<float>(q_[j]), step);
    }
    return;
  }
  set_salt(record[layout_.step_bytes]);
  for (std::int64_t j = 0; j < hidden; ++j) {
    out[j] = kernels::reconstruct<Received>(base[j], static_cast<float>(q_[j]) - offset_[j], step);
  }
}

template class RowCoder<float>;
template class RowCoder<kernels::Bfloat16>;
#define LSHMOE_ROW_CODER(T, Received)                                                              \
  template std::size_t RowCoder<T>::encode<Received>(std::uint8_t*, std::uint8_t*, const float*,   \
                                                     const float*, const float*, double, double,   \
                                                     std::uint32_t, double*);                      \
  template void RowCoder<T>::decode<Received>(Received*, const std::uint8_t*, const std::uint8_t*, \
                                              std::size_t, const float*);
LSHMOE_ROW_CODER(float, float)
LSHMOE_ROW_CODER(kernels::Bfloat16, kernels::Bfloat16)
LSHMOE_ROW_CODER(kernels::Bfloat16, float)
#undef LSHMOE_ROW_CODER

}  // namespace lshmoe
