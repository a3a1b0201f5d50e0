#include "lshmoe/compress/parcel.hpp"

#include <bit>
#include <cstring>
#include <string>

#include "lshmoe/compress/phases.hpp"
#include "lshmoe/kernels/checksum.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
static_assert(std::endian::native == std::endian::little, "parcels are little-endian");

constexpr std::uint32_t kMagic = 0x5048534C;  // "LSHP"
constexpr std::uint8_t kFormat = 1;

template <class T>
void put(std::uint8_t* at, T value) {
  std::memcpy(at, &value, sizeof value);
}
template <class T>
T get(const std::uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

std::uint8_t dtype_code(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return 0;
    case at::kBFloat16:
      return 1;
    case at::kDouble:
      return 2;
    default:
      throw InvalidArgument(detail::message("no parcel holds rows of dtype ", dtype,
                                            ": use float32, bfloat16 or float64"));
  }
}

std::uint32_t parcel_checksum(std::span<const std::uint8_t> parcel) {
  const PhaseScope timer(Phase::checksum, static_cast<std::int64_t>(parcel.size()));
  // The header without the field itself seeds the rest.
  const std::uint32_t head = kernels::checksum(parcel.data(), kChecksumOffset);
  return kernels::block_checksum(parcel.data() + ParcelHeader::kBytes,
                                 parcel.size() - ParcelHeader::kBytes, head);
}

constexpr const char* kDamaged =
    " (the parcel was damaged on its way, or comes from another version or another codec setting): "
    "check that all ranks run the same build with the same options";
}  // namespace

std::uint32_t write_header(const ParcelHeader& header, std::uint8_t* out) {
  put(out, kMagic);
  put(out + 4, kFormat);
  put(out + 5, header.kind);
  put(out + 6, dtype_code(header.dtype));
  put(out + 7, header.flags);
  put(out + 8, header.rows);
  put(out + 12, header.hidden_size);
  put(out + 16, header.centroids);
  put(out + 20, header.state_version);
  put(out + 24, header.body_bytes);
  put(out + 32, header.shared_bytes);
  return kernels::checksum(out, kChecksumOffset);
}

void seal_parcel(const ParcelHeader& header, std::span<std::uint8_t> parcel) {
  LSHMOE_ASSERT(parcel.size() == ParcelHeader::kBytes + header.shared_bytes + header.body_bytes);
  write_header(header, parcel.data());
  put(parcel.data() + kChecksumOffset, parcel_checksum(parcel));
}

ParcelHeader read_header(const std::uint8_t* at, std::size_t size, ParcelKind kind,
                         at::ScalarType dtype, std::int64_t hidden_size) {
  LSHMOE_VALIDATE(get<std::uint32_t>(at) == kMagic, "a parcel does not start with its magic number",
                  kDamaged);
  LSHMOE_VALIDATE(get<std::uint8_t>(at + 4) == kFormat, "a parcel has format ",
                  int{get<std::uint8_t>(at + 4)}, ", this build reads ", int{kFormat}, kDamaged);
  LSHMOE_VALIDATE(get<std::uint8_t>(at + 5) == static_cast<std::uint8_t>(kind),
                  "a parcel has kind ", int{get<std::uint8_t>(at + 5)}, ", expected ",
                  static_cast<int>(kind), kDamaged);
  LSHMOE_VALIDATE(get<std::uint8_t>(at + 6) == dtype_code(dtype), "a parcel has dtype code ",
                  int{get<std::uint8_t>(at + 6)}, ", expected ", int{dtype_code(dtype)}, kDamaged);

  ParcelHeader header;
  header.kind = kind;
  header.dtype = dtype;
  header.flags = get<std::uint8_t>(at + 7);
  header.rows = get<std::uint32_t>(at + 8);
  header.hidden_size = get<std::uint32_t>(at + 12);
  header.centroids = get<std::uint32_t>(at + 16);
  header.state_version = get<std::uint32_t>(at + 20);
  header.body_bytes = get<std::uint64_t>(at + 24);
  header.shared_bytes = get<std::uint32_t>(at + 32);

  LSHMOE_VALIDATE(header.rows > 0, "a parcel holds no rows", kDamaged);
  LSHMOE_VALIDATE(header.hidden_size == hidden_size, "a parcel has hidden size ",
                  header.hidden_size, ", expected ", hidden_size, kDamaged);
  LSHMOE_VALIDATE(header.state_version == 0 || kind == ParcelKind::lsh_expert,
                  "a parcel of a kind without learned state names version ", header.state_version,
                  kDamaged);
  const std::uint64_t rest = size - ParcelHeader::kBytes;
  LSHMOE_VALIDATE(header.shared_bytes <= rest && header.body_bytes == rest - header.shared_bytes,
                  "a parcel of ", size, " bytes says it has ", header.shared_bytes, " + ",
                  header.body_bytes, " after its header", kDamaged);
  return header;
}

void check_checksum(const std::uint8_t* head, std::uint32_t computed) {
  LSHMOE_VALIDATE(get<std::uint32_t>(head + kChecksumOffset) == computed,
                  "a parcel's checksum is wrong", kDamaged);
}

void check_has_header(std::size_t size) {
  LSHMOE_VALIDATE(size >= ParcelHeader::kBytes, "a parcel of ", size,
                  " bytes is shorter than its header of ", ParcelHeader::kBytes, kDamaged);
}

Parcel open_parcel(std::span<const std::uint8_t> bytes, ParcelKind kind, at::ScalarType dtype,
                   std::int64_t hidden_size) {
  check_has_header(bytes.size());
  Parcel parcel;
  parcel.header = read_header(bytes.data(), bytes.size(), kind, dtype, hidden_size);
  check_checksum(bytes.data(), parcel_checksum(bytes));
  parcel.shared = bytes.subspan(ParcelHeader::kBytes, parcel.header.shared_bytes);
  parcel.body = bytes.subspan(ParcelHeader::kBytes + parcel.header.shared_bytes);
  return parcel;
}

}  // namespace lshmoe
