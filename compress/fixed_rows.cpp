#include "lshmoe/compress/fixed_rows.hpp"

#include <numeric>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

Encoded encode_fixed_rows(const CodecContext& context, ParcelKind kind, std::size_t row_bytes,
                          const std::vector<int64_t>& rows_per_group, const FillRows& fill) {
  Encoded encoded;
  for (const int64_t rows : rows_per_group) {
    encoded.bytes_per_group.push_back(rows == 0 ? 0
                                                : static_cast<int64_t>(ParcelHeader::kBytes) +
                                                      rows * static_cast<int64_t>(row_bytes));
  }
  const int64_t size =
      std::accumulate(encoded.bytes_per_group.begin(), encoded.bytes_per_group.end(), int64_t{0});
  encoded.bytes = at::empty({size}, at::kByte);
  encoded.centroids_per_group.assign(rows_per_group.size(), 0);
  auto* out = encoded.bytes.mutable_data_ptr<std::uint8_t>();
  int64_t first = 0;
  for (std::size_t group = 0; group < rows_per_group.size(); ++group) {
    const int64_t rows = rows_per_group[group];
    if (rows == 0) continue;
    fill(first, rows, out + ParcelHeader::kBytes);
    ParcelHeader header;
    header.kind = kind;
    header.dtype = context.dtype;
    header.rows = static_cast<std::uint32_t>(rows);
    header.hidden_size = static_cast<std::uint32_t>(context.hidden_size);
    header.body_bytes = static_cast<std::uint64_t>(rows) * row_bytes;
    const auto bytes = static_cast<std::size_t>(encoded.bytes_per_group[group]);
    seal_parcel(header, {out, bytes});
    out += bytes;
    first += rows;
  }
  encoded.stats.rows = first;
  encoded.stats.raw_bytes = 2 * first * context.hidden_size;
  encoded.stats.sent_bytes = size;
  return encoded;
}

void check_fixed_rows(const Parcel& parcel, std::size_t row_bytes) {
  const std::size_t expected = parcel.header.rows * row_bytes;
  LSHMOE_VALIDATE(parcel.header.flags == 0 && parcel.header.centroids == 0 &&
                      parcel.shared.empty() && parcel.body.size() == expected,
                  "decode: a parcel of ", parcel.header.rows, " rows has ", parcel.body.size(),
                  " bytes of them, expected ", expected, " (damaged parcel)");
}

}  // namespace lshmoe
