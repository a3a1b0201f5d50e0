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

std::int64_t block_rows(std::int64_t hidden) {
  return std::clamp<std::int64_t>(32768 / hidden, 1, 256);
}

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
const float* OrderedRows<T>::read(const RowsView<T>& rows) {
  const PhaseScope timer(Phase::order,
                         static_cast<std::int64_t>(4 + sizeof(T)) * rows.rows * rows.hidden);
  const auto values = static_cast<std::size_t>(rows.rows * rows.hidden);
  if (ordered_.size() < values) ordered_.resize(values);
  if (order_.empty()) {
    rows.read(ordered_.data(), 0, rows.rows);
    return ordered_.data();
  }
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    rows.read(natural_.data(), i);
    kernels::permute(ordered_.data() + i * rows.hidden, natural_.data(), order_.data(),
                     rows.hidden);
  }
  return ordered_.data();
}

template <class T>
RowCoder<T>::RowCoder(std::int64_t hidden, StepCode steps, std::size_t id_bytes)
    : layout_(hidden, steps, id_bytes, sizeof(T)),
      steps_(steps),
      residual_(static_cast<std::size_t>(hidden)),
      offset_(steps.dithered() ? static_cast<std::size_t>(hidden) : 0),
      wide_(offset_.size()),
      q_(static_cast<std::size_t>(hidden)),
      ordered_(static_cast<std::size_t>(hidden)),
      index_(static_cast<std::size_t>(layout_.bands) + 1) {}

template <class T>
float* RowCoder<T>::offset(std::size_t row) {
  return steps_.dithered() ? offset_.data() + row * static_cast<std::size_t>(layout_.hidden)
                           : nullptr;
}

template <class T>
void RowCoder<T>::set_salt(float* offset, std::uint32_t salt) const {
  const auto hidden = static_cast<std::size_t>(layout_.hidden);
  for (std::size_t j = 0; j < hidden; ++j) {
    offset[j] = kernels::dither(steps_.dither_key(), static_cast<std::uint32_t>(j), salt);
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

namespace {
// The receiver's own arithmetic decides; the slack covers another order of its double sums.
double allowed_error(double bound) { return bound * (1 - 1e-12); }
}  // namespace

template <class T>
void RowCoder<T>::set_residual(const Row& row) {
  for (std::size_t j = 0; j < residual_.size(); ++j) residual_[j] = row.x[j] - row.base[j];
}

template <class T>
template <class Received>
void RowCoder<T>::search(Row& row, float* offset) {
  const std::int64_t hidden = layout_.hidden;
  row.error = 0;
  row.salt = 0;
  row.is_near = false;
  row.step = steps_.zero_row();
  if (row.norm == 0) return;
  set_residual(row);
  if (steps_.dithered()) {
    kernels::convert(wide_.data(), row.natural, hidden);
    row.salt = kernels::checksum(wide_.data(), wide_.size() * sizeof(float), steps_.dither_key()) %
               kernels::kDitherSalts;
    set_salt(offset, row.salt);
  } else if (std::sqrt(kernels::squared_norm(residual_.data(), hidden)) <= row.bound) {
    // What the receiver has already is near enough: any step does. (With a dither even a small
    // residual counts, or the rows' mean would not be kept.)
    row.step = steps_.bytes() == 1 ? 0 : kernels::step_code(1.0F);
    std::fill(ordered_.begin(), ordered_.end(), 0);
    row.error = std::sqrt(kernels::reconstruction_error<Received>(row.x, row.base, ordered_.data(),
                                                                  hidden, steps_.value(row.step)));
    row.is_near = row.error <= allowed_error(row.bound);
    if (row.is_near) return;
  }
  row.step = row.bound > 0
                 ? steps_.below(kernels::search_step(residual_.data(), hidden, row.bound, offset))
                 : steps_.zero_row();
  if (!steps_.is_step(row.step)) row.step = steps_.whole_row();
}

template <class T>
template <class Received>
void RowCoder<T>::quantize(Row& row, const float* offset, std::int32_t* q) {
  const std::int64_t hidden = layout_.hidden;
  if (row.is_near) std::fill_n(q, hidden, 0);
  if (row.is_near || !steps_.is_step(row.step)) return;
  set_residual(row);
  // Rounding (adding the base back, the cast to T) may break a bound that the estimate kept:
  // smaller steps are tried, further and further down, then the row goes whole.
  for (int attempt = 0; attempt < 6 && steps_.is_step(row.step); ++attempt) {
    const float step = steps_.value(row.step);
    if (!kernels::quantize(q, residual_.data(), hidden, step, offset)) break;
    row.error = std::sqrt(
        kernels::reconstruction_error<Received>(row.x, row.base, q, hidden, step, offset));
    if (row.error <= allowed_error(row.bound)) return;
    row.step = steps_.smaller(row.step, 1 << attempt);
  }
  row.step = steps_.whole_row();
}

template <class T>
void RowCoder<T>::pack(Row& row, const std::int32_t* q, std::uint8_t* record,
                       std::uint8_t* payload) {
  const std::int64_t hidden = layout_.hidden;
  index_.back() = 0;
  if (steps_.is_step(row.step)) {
    const std::int64_t bits = kernels::choose_alphabets(index_.data(), q, hidden);
    row.payload_bytes = static_cast<std::size_t>((bits + 7) / 8);
    if (row.payload_bytes < layout_.whole_bytes) {
      std::memset(payload, 0, row.payload_bytes + 8);
      kernels::pack_bands(payload, q, hidden, index_.data());
      write_record(record, row.step, row.salt, row.id);
      return;
    }
    row.step = steps_.whole_row();
  }
  std::fill(index_.begin(), index_.end(), std::uint8_t{0});
  row.error = 0;
  write_record(record, row.step, 0, row.id);
  row.payload_bytes = row.step == steps_.whole_row() ? layout_.whole_bytes : 0;
  if (row.payload_bytes > 0) std::memcpy(payload, row.natural, row.payload_bytes);
}

template <class T>
template <class Received>
std::size_t RowCoder<T>::encode(std::span<Row> rows, std::uint8_t* records,
                                std::uint8_t* payloads) {
  const std::int64_t hidden = layout_.hidden;
  const auto values = static_cast<std::int64_t>(rows.size()) * hidden;
  if (q_.size() < static_cast<std::size_t>(values)) q_.resize(static_cast<std::size_t>(values));
  if (steps_.dithered() && offset_.size() < q_.size()) offset_.resize(q_.size());
  {
    const PhaseScope timer(Phase::step_search, 8 * values);
    for (std::size_t i = 0; i < rows.size(); ++i) search<Received>(rows[i], offset(i));
  }
  std::int32_t* q = q_.data();
  {
    const PhaseScope timer(Phase::quantize, 12 * values);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      quantize<Received>(rows[i], offset(i), q);
      q += hidden;
    }
  }
  q = q_.data();
  PhaseScope timer(Phase::pack, 4 * values);
  std::size_t bytes = 0;
  for (Row& row : rows) {
    pack(row, q, records, payloads + bytes);
    q += hidden;
    records += layout_.record_bytes;
    bytes += row.payload_bytes;
  }
  timer.add_bytes(static_cast<std::int64_t>(bytes));
  return bytes;
}

template <class T>
template <class Received>
std::size_t RowCoder<T>::encode(std::uint8_t* record, std::uint8_t* payload, const float* x,
                                const float* base, const float* natural, double bound, double norm,
                                std::uint32_t id, double* error) {
  natural_.resize(static_cast<std::size_t>(layout_.hidden));
  kernels::convert(natural_.data(), natural, layout_.hidden);
  Row row{x, base, natural_.data(), bound, norm, id};
  const std::size_t bytes = encode<Received>(std::span(&row, 1), record, payload);
  *error = row.error;
  return bytes;
}

template <class T>
void RowCoder<T>::estimate(const float* r, double bound, const std::int32_t* order,
                           std::int64_t* bits_plain, std::int64_t* bits_ordered) {
  const std::int64_t hidden = layout_.hidden;
  const auto whole = static_cast<std::int64_t>(8 * layout_.whole_bytes);
  *bits_plain = *bits_ordered = 0;
  if (!steps_.dithered() && std::sqrt(kernels::squared_norm(r, hidden)) <= bound) return;
  if (steps_.dithered()) set_salt(offset(0), 0);  // all alike
  const std::uint16_t code = bound > 0
                                 ? steps_.below(kernels::search_step(r, hidden, bound, offset(0)))
                                 : steps_.zero_row();
  if (!steps_.is_step(code) ||
      !kernels::quantize(q_.data(), r, hidden, steps_.value(code), offset(0))) {
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
  if (is_zero(record)) {
    std::fill_n(out, layout_.hidden, Received{});
  } else if (is_whole(record)) {
    LSHMOE_ASSERT((std::is_same_v<T, Received>));
    std::memcpy(out, payload, layout_.whole_bytes);
  } else {
    unpack(q_.data(), record, payload, readable);
    reconstruct(out, record, q_.data(), base);
  }
}

template <class T>
void RowCoder<T>::unpack(std::int32_t* q, const std::uint8_t* record, const std::uint8_t* payload,
                         std::size_t readable) {
  read_index(record);
  const auto bits = kernels::payload_bits(index_.data(), layout_.hidden);
  const auto bytes = static_cast<std::size_t>((bits + 7) / 8);
  if (readable < bytes + 8) {
    // The last rows: unpack_bands reads up to 8 bytes further.
    padded_.assign(bytes + 8, 0);
    if (bytes > 0) std::memcpy(padded_.data(), payload, bytes);
    payload = padded_.data();
  }
  LSHMOE_VALIDATE(kernels::unpack_bands(q, payload, layout_.hidden, index_.data()),
                  "decode: a row's payload holds a number out of its range (damaged parcel)");
}

template <class T>
template <class Received>
void RowCoder<T>::reconstruct(Received* out, const std::uint8_t* record, const std::int32_t* q,
                              const float* base) {
  const std::int64_t hidden = layout_.hidden;
  const float step = steps_.value(step_of(record));
  if (!steps_.dithered()) {
    for (std::int64_t j = 0; j < hidden; ++j) {
      out[j] = kernels::reconstruct<Received>(base[j], static_cast<float>(q[j]), step);
    }
    return;
  }
  set_salt(offset(0), record[layout_.step_bytes]);
  for (std::int64_t j = 0; j < hidden; ++j) {
    out[j] = kernels::reconstruct<Received>(base[j], static_cast<float>(q[j]) - offset_[j], step);
  }
}

template <class T>
RowReader<T>::RowReader(RowCoder<T>& coder, std::span<const std::uint8_t> body, std::int64_t rows,
                        std::int64_t centroids)
    : coder_(coder), record_(body.data()), centroids_(centroids) {
  const auto directory = static_cast<std::size_t>(rows) * coder.layout().record_bytes;
  LSHMOE_ASSERT(directory <= body.size());  // checked when the parcel was opened
  payload_ = record_ + directory;
  left_ = body.size() - directory;
}

template <class T>
typename RowReader<T>::Row RowReader<T>::next() {
  const Row row{record_, payload_, left_, coder_.payload_bytes(record_), coder_.id(record_)};
  LSHMOE_VALIDATE(row.bytes <= left_, "decode: row ", row_, "'s payload of ", row.bytes,
                  " bytes goes beyond its parcel (damaged parcel)");
  LSHMOE_VALIDATE(row.id <= centroids_, "decode: row ", row_, " names centroid ", row.id, " of ",
                  centroids_, " (damaged parcel)");
  record_ += coder_.layout().record_bytes;
  payload_ += row.bytes;
  left_ -= row.bytes;
  ++row_;
  return row;
}

template <class T>
void RowReader<T>::finish() const {
  LSHMOE_VALIDATE(left_ == 0, "decode: ", left_,
                  " bytes are left over after the last row (damaged parcel)");
}

template class OrderedRows<float>;
template class OrderedRows<kernels::Bfloat16>;
template class RowCoder<float>;
template class RowCoder<kernels::Bfloat16>;
template class RowReader<float>;
template class RowReader<kernels::Bfloat16>;
#define LSHMOE_ROW_CODER(T, Received)                                                              \
  template std::size_t RowCoder<T>::encode<Received>(std::span<Row>, std::uint8_t*,                \
                                                     std::uint8_t*);                               \
  template std::size_t RowCoder<T>::encode<Received>(std::uint8_t*, std::uint8_t*, const float*,   \
                                                     const float*, const float*, double, double,   \
                                                     std::uint32_t, double*);                      \
  template void RowCoder<T>::decode<Received>(Received*, const std::uint8_t*, const std::uint8_t*, \
                                              std::size_t, const float*);                          \
  template void RowCoder<T>::reconstruct<Received>(Received*, const std::uint8_t*,                 \
                                                   const std::int32_t*, const float*);
LSHMOE_ROW_CODER(float, float)
LSHMOE_ROW_CODER(kernels::Bfloat16, kernels::Bfloat16)
LSHMOE_ROW_CODER(kernels::Bfloat16, float)
#undef LSHMOE_ROW_CODER

}  // namespace lshmoe
