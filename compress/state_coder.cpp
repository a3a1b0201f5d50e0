#include "lshmoe/compress/state_coder.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "lshmoe/compress/phases.hpp"
#include "lshmoe/kernels/basis.hpp"
#include "lshmoe/kernels/lsh.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
constexpr std::int64_t kSampleRows = 64;
/// Rows that are multiplied with the basis at a time.
constexpr std::int64_t kBlockRows = 256;
}  // namespace

std::size_t centroid_id_bytes(std::int64_t centroids) {
  return centroids == 0 ? 0 : centroids < 256 ? 1 : 2;
}

template <class T>
StateCoder<T>::StateCoder(const LearnedState& state, StepCode steps, const CodecOptions& options,
                          const kernels::PackedMatrix& projection)
    : state_(state), steps_(steps), options_(options), projection_(projection) {}

template <class T>
double StateCoder<T>::coefficient_bound(double bound, double norm) const {
  return kernels::coefficient_bound(bound, norm, state_.stretch, !std::is_same_v<T, float>,
                                    state_.hidden);
}

// The nearest centroid of each row, or -1.
template <class T>
std::vector<std::int64_t> StateCoder<T>::nearest(const RowsView<T>& rows) const {
  const std::int64_t hidden = state_.hidden, columns = projection_.columns();
  const std::int64_t block = block_rows(hidden);
  std::vector<float> z(static_cast<std::size_t>(rows.rows * columns));
  {
    const PhaseScope timer(Phase::project,
                           static_cast<std::int64_t>(sizeof(T)) * rows.rows * hidden +
                               4 * columns * (hidden + rows.rows),
                           2 * rows.rows * hidden * columns);
    std::vector<float> x(static_cast<std::size_t>(block * hidden));
    for (std::int64_t i = 0; i < rows.rows; i += block) {
      const std::int64_t count = std::min(block, rows.rows - i);
      rows.read(x.data(), i, count);
      projection_.multiply(z.data() + i * columns, x.data(), count);
    }
    for (float* row = z.data(); row < z.data() + z.size(); row += columns) {
      for (std::int64_t j = 0; j < columns; ++j) row[j] -= state_.mean_z[std::size_t(j)];
    }
  }
  const PhaseScope timer(Phase::nearest,
                         4 * (rows.rows + state_.centroids) * columns + 8 * rows.rows,
                         2 * rows.rows * state_.centroids * columns);
  std::vector<std::int64_t> nearest(static_cast<std::size_t>(rows.rows));
  std::vector<float> scratch(
      static_cast<std::size_t>(kernels::nearest_scratch(state_.centroids, columns)));
  kernels::nearest_centroid(nearest.data(), nullptr, scratch.data(), z.data(),
                            state_.centroids_z.data(), rows.rows, state_.centroids, columns,
                            /*or_none=*/true);
  return nearest;
}

template <class T>
std::int64_t StateCoder<T>::sample_bits(const BoundedRows<T>& rows,
                                        const std::vector<std::int64_t>& assignment) const {
  const std::int64_t hidden = state_.hidden, count = rows.rows.rows;
  const std::int64_t stride = std::max<std::int64_t>(1, count / kSampleRows);
  const std::int64_t samples = (count + stride - 1) / stride;
  const bool basis = state_.basis.defined();
  // In coding order; with a basis that is the channels' own.
  const std::vector<std::int32_t> none;
  const std::vector<float>& bases = basis ? state_.bases : state_.ordered_bases;
  OrderedRows<T> ordered(hidden, basis ? none : state_.order);
  std::vector<float> residual(static_cast<std::size_t>(samples * hidden));
  for (std::int64_t s = 0; s < samples; ++s) {
    const float* x = ordered.read(rows.rows.part(s * stride, 1));
    const float* base =
        bases.data() + (assignment[static_cast<std::size_t>(s * stride)] + 1) * hidden;
    for (std::int64_t j = 0; j < hidden; ++j)
      residual[std::size_t(s * hidden + j)] = x[j] - base[j];
  }
  if (basis) {
    const PhaseScope timer(Phase::product, 4 * hidden * (2 * samples + hidden),
                           2 * samples * hidden * hidden);
    const std::vector<float> natural = residual;
    state_.to_coefficients.multiply(residual.data(), natural.data(), samples);
  }
  RowCoder<T> coder(hidden, steps_, 0);
  std::int64_t sum = 0;
  for (std::int64_t s = 0; s < samples; ++s) {
    const auto row = static_cast<std::size_t>(s * stride);
    const double bound =
        basis ? coefficient_bound(rows.bound[row], rows.norm[row]) : rows.bound[row];
    std::int64_t bits = 0, unused = 0;
    coder.estimate(residual.data() + s * hidden, bound, nullptr, &bits, &unused);
    sum += bits;
  }
  return sum;
}

template <class T>
StateRows StateCoder<T>::encode(const BoundedRows<T>& rows) const {
  const std::int64_t count = rows.rows.rows;
  const auto n = static_cast<std::size_t>(count);
  StateRows out;
  out.assignment.assign(n, -1);
  out.errors.assign(n, 0);
  out.whole.assign(n, false);
  if (state_.centroids > 0 && count > 0) {
    std::vector<std::int64_t> named = nearest(rows.rows);
    const PhaseScope timer(Phase::plan);
    const auto id_bits = static_cast<std::int64_t>(8 * centroid_id_bytes(state_.centroids));
    const std::int64_t stride = std::max<std::int64_t>(1, count / kSampleRows);
    const std::int64_t samples = (count + stride - 1) / stride;
    if (sample_bits(rows, named) + samples * id_bits < sample_bits(rows, out.assignment)) {
      out.codebook = true;
      out.assignment = std::move(named);
    }
  }
  out.offsets.assign(1, 0);
  if (state_.basis.defined()) {
    encode_basis(out, rows);
  } else {
    encode_channels(out, rows);
  }
  return out;
}

namespace {
// Appends coded rows to `out`.
template <class T, class Received>
class Appender {
 public:
  Appender(StateRows& out, RowCoder<T>& coder, std::int64_t rows) : out_(out), coder_(coder) {
    out.record_bytes = coder.layout().record_bytes;
    out.records.resize(static_cast<std::size_t>(rows) * out.record_bytes);
  }
  void add(std::span<typename RowCoder<T>::Row> rows) {
    const std::size_t at = out_.offsets.back(), most = at + rows.size() * coder_.max_payload();
    if (out_.payloads.size() < most) out_.payloads.resize(most + at / 2);
    coder_.template encode<Received>(rows, out_.records.data() + row_ * out_.record_bytes,
                                     out_.payloads.data() + at);
    for (const auto& row : rows) {
      out_.errors[row_] = row.error;
      out_.whole[row_++] = row.step == coder_.steps().whole_row();
      out_.offsets.push_back(out_.offsets.back() + row.payload_bytes);
    }
  }
  void finish() { out_.payloads.resize(out_.offsets.back()); }

 private:
  StateRows& out_;
  RowCoder<T>& coder_;
  std::size_t row_ = 0;
};
}  // namespace

template <class T>
void StateCoder<T>::encode_channels(StateRows& out, const BoundedRows<T>& rows) const {
  const std::int64_t hidden = state_.hidden, count = rows.rows.rows;
  RowCoder<T> coder(hidden, steps_, out.codebook ? centroid_id_bytes(state_.centroids) : 0);
  Appender<T, T> appender(out, coder, count);
  OrderedRows<T> ordered(hidden, state_.order);
  const std::int64_t block = block_rows(hidden);
  std::vector<typename RowCoder<T>::Row> coded;
  for (std::int64_t first = 0; first < count; first += block) {
    const RowsView<T> part = rows.rows.part(first, std::min(block, count - first));
    const float* x = ordered.read(part);
    coded.clear();
    for (std::int64_t i = 0; i < part.rows; ++i) {
      const auto row = static_cast<std::size_t>(first + i);
      const auto id = static_cast<std::uint32_t>(out.assignment[row] + 1);
      coded.push_back({x + i * hidden,
                       state_.ordered_bases.data() + static_cast<std::int64_t>(id) * hidden,
                       part.row(i), rows.bound[row], rows.norm[row], id});
    }
    appender.add(coded);
  }
  appender.finish();
}

template <class T>
void StateCoder<T>::encode_basis(StateRows& out, const BoundedRows<T>& rows) const {
  const std::int64_t hidden = state_.hidden, count = rows.rows.rows;
  const std::int64_t most = std::min(kBlockRows, count), block = block_rows(hidden);
  RowCoder<T> coder(hidden, steps_, out.codebook ? centroid_id_bytes(state_.centroids) : 0);
  Appender<T, float> appender(out, coder, count);
  const std::vector<float> zeros(static_cast<std::size_t>(hidden), 0.0F);
  std::vector<float> residual(static_cast<std::size_t>(most * hidden)),
      coefficients(residual.size());
  std::vector<typename RowCoder<T>::Row> coded;
  for (std::int64_t first = 0; first < count; first += kBlockRows) {
    const RowsView<T> part = rows.rows.part(first, std::min(kBlockRows, count - first));
    {
      const PhaseScope timer(Phase::order,
                             static_cast<std::int64_t>(8 + sizeof(T)) * part.rows * hidden);
      for (std::int64_t i = 0; i < part.rows; ++i) {
        float* r = residual.data() + i * hidden;
        const auto centroid = out.assignment[static_cast<std::size_t>(first + i)];
        const float* base = state_.bases.data() + (centroid + 1) * hidden;
        part.read(r, i);
        for (std::int64_t j = 0; j < hidden; ++j) r[j] -= base[j];
      }
    }
    {
      const PhaseScope timer(Phase::product, 4 * hidden * (2 * part.rows + hidden),
                             2 * part.rows * hidden * hidden);
      state_.to_coefficients.multiply(coefficients.data(), residual.data(), part.rows);
    }
    for (std::int64_t i = 0; i < part.rows; i += block) {
      coded.clear();
      for (std::int64_t k = i; k < std::min(i + block, part.rows); ++k) {
        const auto row = static_cast<std::size_t>(first + k);
        const double allowed = coefficient_bound(rows.bound[row], rows.norm[row]);
        coded.push_back({coefficients.data() + k * hidden, zeros.data(), part.row(k),
                         std::max(allowed, 0.0), rows.norm[row],
                         static_cast<std::uint32_t>(out.assignment[row] + 1)});
      }
      appender.add(coded);
    }
  }
  appender.finish();
  // What coefficient_bound kept back, at its most.
  for (std::size_t row = 0; row < out.errors.size(); ++row) {
    if (out.whole[row] || rows.norm[row] == 0) continue;
    const double allowed = coefficient_bound(rows.bound[row], rows.norm[row]);
    out.errors[row] = rows.bound[row] - (allowed - out.errors[row]) * state_.stretch;
  }
}

template <class T>
void StateCoder<T>::decode_with_basis(T* out, const std::int64_t* to, std::int64_t n,
                                      std::span<const std::uint8_t> body, bool codebook) const {
  const std::int64_t hidden = state_.hidden, most = std::min(kBlockRows, n);
  RowCoder<T> coder(hidden, steps_, codebook ? centroid_id_bytes(state_.centroids) : 0);
  RowReader<T> reader(coder, body, n, state_.centroids);
  const std::vector<float> zeros(static_cast<std::size_t>(hidden), 0.0F);
  const std::int64_t part = block_rows(hidden);
  std::vector<std::int32_t> q(static_cast<std::size_t>(part * hidden));
  std::vector<float> coefficients(static_cast<std::size_t>(most * hidden)),
      residual(coefficients.size());
  struct Coded {
    const std::uint8_t* record;
    T* to;
    const float* base;
  };
  std::vector<Coded> coded;
  for (std::int64_t first = 0; first < n; first += kBlockRows) {
    const std::int64_t end = std::min(n, first + kBlockRows);
    coded.clear();
    for (std::int64_t from = first; from < end; from += part) {
      const std::size_t before = coded.size();
      const std::int64_t rows = std::min(part, end - from);
      {
        PhaseScope timer(Phase::unpack, 4 * rows * hidden);
        const std::size_t left = reader.left();
        for (std::int64_t i = 0; i < rows; ++i) {
          T* row = out + to[from + i] * hidden;
          const auto read = reader.next();
          if (coder.is_whole(read.record) || coder.is_zero(read.record)) {
            coder.decode(row, read.record, read.payload, read.readable, zeros.data());
            continue;
          }
          coder.unpack(q.data() + static_cast<std::int64_t>(coded.size() - before) * hidden,
                       read.record, read.payload, read.readable);
          coded.push_back({read.record, row, state_.bases.data() + read.id * hidden});
        }
        timer.add_bytes(static_cast<std::int64_t>(left - reader.left()));
      }
      const PhaseScope timer(Phase::reconstruct,
                             8 * static_cast<std::int64_t>(coded.size() - before) * hidden);
      for (std::size_t i = before; i < coded.size(); ++i) {
        coder.template reconstruct<float>(
            coefficients.data() + static_cast<std::int64_t>(i) * hidden, coded[i].record,
            q.data() + static_cast<std::int64_t>(i - before) * hidden, zeros.data());
      }
    }
    const auto count = static_cast<std::int64_t>(coded.size());
    {
      const PhaseScope timer(Phase::product, 4 * hidden * (2 * count + hidden),
                             2 * count * hidden * hidden);
      state_.to_residual.multiply(residual.data(), coefficients.data(), count);
    }
    const PhaseScope timer(Phase::scatter,
                           static_cast<std::int64_t>(8 + sizeof(T)) * count * hidden);
    const float* r = residual.data();
    for (const Coded& row : coded) {
      for (std::int64_t j = 0; j < hidden; ++j) {
        row.to[j] = kernels::from_float<T>(row.base[j] + r[j]);
      }
      r += hidden;
    }
  }
  reader.finish();
}

template class StateCoder<float>;
template class StateCoder<kernels::Bfloat16>;

}  // namespace lshmoe
