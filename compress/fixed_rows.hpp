#pragma once
// Parcels of kinds whose rows all take the same number of bytes and share nothing.

#include <functional>

#include "lshmoe/compress/codec.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Writes rows first .. first + rows of the stream to body.
using FillRows = std::function<void(int64_t first, int64_t rows, std::uint8_t* body)>;

/// One sealed parcel a group, its body written by `fill`. Sets the statistics that the sizes tell.
[[nodiscard]] Encoded encode_fixed_rows(const CodecContext& context, ParcelKind kind,
                                        std::size_t row_bytes,
                                        const std::vector<int64_t>& rows_per_group,
                                        const FillRows& fill);

/// Throws InvalidArgument unless the parcel is header and rows, nothing else.
void check_fixed_rows(const Parcel& parcel, std::size_t row_bytes);

}  // namespace lshmoe
