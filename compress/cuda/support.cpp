#include "lshmoe/compress/cuda/support.hpp"

#include <algorithm>
#include <cstring>

#include "lshmoe/compress/cpu_codec.hpp"
#include "lshmoe/compress/cuda/stream_phases.hpp"
#include "lshmoe/kernels/checksum.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::cuda {

void wait_for_stream(at::Device device) {
  if (device.is_cpu()) return;
  c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
}

at::Tensor upload_bytes(const void* data, std::size_t bytes, at::Device device) {
  // From pinned memory, or torch would wait for the stream.
  at::Tensor host = at::empty({static_cast<std::int64_t>(bytes)},
                              at::dtype(at::kByte).pinned_memory(device.is_cuda()));
  if (bytes > 0) std::memcpy(host.mutable_data_ptr(), data, bytes);
  return host.to(device, at::kByte, /*non_blocking=*/true);
}

at::Tensor none_bad(std::int64_t count, at::Device device) {
  return at::full({count}, kNoneBad, at::dtype(at::kLong).device(device));
}

RowIndex::RowIndex(const at::Tensor& row_index, std::int64_t rows, at::Device device,
                   const char* what)
    : count_(0), rows_(rows), what_(what) {
  if (!row_index.defined()) return;
  count_ = row_index.numel();
  if (row_index.is_cpu()) check_index_values(row_index, rows, what);
  index_ =
      row_index.is_cpu()
          ? upload_bytes(row_index.const_data_ptr(), row_index.nbytes(), device).view(at::kLong)
          : row_index;
  if (row_index.is_cpu() || count_ == 0) return;
  LSHMOE_VALIDATE(rows > 0, what, ": row_index names rows, but there are none");
  bad_ = none_bad(1, device);
  launchers::check_index(as<std::int64_t>(bad_), data(), count_, rows, current_stream(device));
}

void RowIndex::check(std::int64_t bad) const {
  LSHMOE_VALIDATE(bad == kNoneBad, what_, ": row_index[", bad, "] is not one of the ", rows_,
                  " rows");
}

Groups groups_of(const std::vector<int64_t>& rows_per_group) {
  Groups groups;
  std::int64_t first = 0;
  for (std::size_t g = 0; g < rows_per_group.size(); ++g) {
    if (rows_per_group[g] == 0) continue;
    launchers::CodedGroup group;
    group.first = first;
    group.rows = rows_per_group[g];
    groups.of_rows.push_back(group);
    groups.number.push_back(g);
    first += group.rows;
  }
  return groups;
}

void block_checksums(std::vector<Summed> summed, at::Device device) {
  constexpr auto kBlock = static_cast<std::int64_t>(kernels::kChecksumBlock);
  std::vector<at::Tensor> levels;  // read by the level after
  while (!summed.empty()) {
    std::vector<launchers::ChecksumSpan> spans;
    std::int64_t blocks = 0, scratch_blocks = 0;
    for (const Summed& one : summed) {
      const std::int64_t count = std::max<std::int64_t>(1, (one.size + kBlock - 1) / kBlock);
      spans.push_back({one.data, one.size, one.seed, one.out, blocks});
      blocks += count;
      if (count > 1) scratch_blocks += count;
    }
    levels.push_back(room<std::uint32_t>(scratch_blocks, device));
    auto* at = as<std::uint8_t>(levels.back());
    std::vector<Summed> next;
    for (std::size_t i = 0; i < spans.size(); ++i) {
      const std::int64_t count = (spans[i].size + kBlock - 1) / kBlock;
      if (count <= 1) continue;
      spans[i].out = at;
      next.push_back({at, 4 * count, summed[i].seed, summed[i].out});
      at += 4 * count;
    }
    const at::Tensor on_device = upload(spans, device);
    launchers::checksum_blocks(as<const launchers::ChecksumSpan>(on_device),
                               static_cast<std::int64_t>(spans.size()), blocks,
                               current_stream(device));
    summed = std::move(next);
  }
}

std::int64_t Assembly::add(std::int64_t first, const ParcelHeader& header,
                           std::span<const std::uint8_t> shared, std::int64_t record_bytes) {
  launchers::ParcelPlace place;
  place.first = first;
  place.rows = header.rows;
  place.begin = bytes_;
  place.head_begin = static_cast<std::int64_t>(heads_.size());
  place.head_copied = static_cast<std::int64_t>(ParcelHeader::kBytes + shared.size());
  place.head_bytes = static_cast<std::int64_t>(ParcelHeader::kBytes + header.shared_bytes);
  place.record_bytes = record_bytes;
  places_.push_back(place);
  std::uint8_t head[ParcelHeader::kBytes] = {};
  seeds_.push_back(write_header(header, head));
  heads_.insert(heads_.end(), head, head + ParcelHeader::kBytes);
  heads_.insert(heads_.end(), shared.begin(), shared.end());
  sizes_.push_back(place.head_bytes + static_cast<std::int64_t>(header.body_bytes));
  bytes_ += sizes_.back();
  return place.begin + place.head_copied;
}

void Assembly::allocate(at::Device device) {
  out_ = at::empty({bytes_}, at::dtype(at::kByte).device(device));
  device_places_ = upload(places_, device);
  // 16 bytes more: copies read whole words.
  heads_.resize(heads_.size() + 16);
  device_heads_ = upload(heads_, device);
}

void Assembly::seal() const {
  std::vector<Summed> summed;
  auto* out = as<std::uint8_t>(out_);
  constexpr auto kHead = static_cast<std::int64_t>(ParcelHeader::kBytes);
  for (std::size_t i = 0; i < places_.size(); ++i) {
    std::uint8_t* parcel = out + places_[i].begin;
    summed.push_back({parcel + kHead, sizes_[i] - kHead, seeds_[i], parcel + kChecksumOffset});
  }
  block_checksums(std::move(summed), out_.device());
}

Opened::Opened(const at::Tensor& bytes, const std::vector<int64_t>& bytes_per_group,
               ParcelKind kind, const CodecContext& context)
    : groups_(bytes_per_group.size()) {
  constexpr auto kHead = static_cast<std::int64_t>(ParcelHeader::kBytes);
  const at::Device device = bytes.device();
  std::vector<std::int64_t> begin, place;
  std::int64_t at = 0;
  for (std::size_t g = 0; g < groups_; at += bytes_per_group[g++]) {
    if (bytes_per_group[g] == 0) continue;
    check_has_header(static_cast<std::size_t>(bytes_per_group[g]));
    parcels_.push_back({g, {}, nullptr, nullptr, 0});
    begin.push_back(at);
    // Past a short parcel's end: its last byte again.
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(kHeadBytes); ++i) {
      place.push_back(at + std::min(i, bytes_per_group[g] - 1));
    }
  }
  mark_phase("headers");
  sums_ = room<std::uint32_t>(static_cast<std::int64_t>(parcels_.size()), device);
  if (parcels_.empty()) return;
  const at::Tensor index = upload(place, device).view(at::kLong);
  heads_ = download<std::uint8_t>(bytes.index_select(0, index));
  std::vector<Summed> summed;
  const auto* data = static_cast<const std::uint8_t*>(bytes.const_data_ptr());
  for (std::size_t i = 0; i < parcels_.size(); ++i) {
    One& one = parcels_[i];
    const std::uint8_t* head = heads_.data() + i * kHeadBytes;
    const std::int64_t size = bytes_per_group[one.group];
    one.header =
        read_header(head, static_cast<std::size_t>(size), kind, context.dtype, context.hidden_size);
    one.shared = data + begin[i] + kHead;
    one.body = one.shared + one.header.shared_bytes;
    one.first = rows_;
    rows_ += one.header.rows;
    summed.push_back({one.shared, size - kHead, kernels::checksum(head, kChecksumOffset),
                      as<std::uint8_t>(sums_) + 4 * i});
  }
  mark_phase("checksum");
  block_checksums(std::move(summed), device);
}

std::vector<int64_t> Opened::rows_per_group() const {
  std::vector<int64_t> rows(groups_, 0);
  for (const One& one : parcels_) rows[one.group] = one.header.rows;
  return rows;
}

void Opened::check_rows(const std::vector<int64_t>& rows_per_group) const {
  const std::vector<int64_t> rows = this->rows_per_group();
  for (std::size_t g = 0; g < rows.size(); ++g) {
    LSHMOE_VALIDATE(rows[g] == rows_per_group[g], "decode: the parcel of group ", g, " holds ",
                    rows[g], " rows, expected ", rows_per_group[g]);
  }
}

void Opened::check_sums(const std::uint32_t* sums) const {
  for (std::size_t i = 0; i < parcels_.size(); ++i) {
    check_checksum(heads_.data() + i * kHeadBytes, sums[i]);
  }
}

void add_totals(CodecStats& stats, const launchers::RowTotals& totals, double& relative_sum) {
  stats.whole_rows += totals.whole_rows;
  relative_sum += totals.relative_sum;
  stats.max_relative_error = std::max(stats.max_relative_error, totals.relative_max);
  stats.max_error_ratio = std::max(stats.max_error_ratio, totals.ratio_max);
}

}  // namespace lshmoe::cuda
