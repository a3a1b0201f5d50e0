#include "lshmoe/launch/npy.hpp"

#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <regex>
#include <string>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
namespace {
// float16 -> float32; exact.
float from_half(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t exponent = half >> 10 & 31;
  const std::uint32_t mantissa = half & 1023;
  std::uint32_t bits = 0;
  if (exponent == 31) {
    bits = sign | 0x7F800000u | mantissa << 13;
  } else if (exponent > 0) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float value = static_cast<float>(mantissa) * 0x1p-24F;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace

Array read_npy(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  LSHMOE_VALIDATE(file, path.string(), " cannot be opened: check --input");
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  LSHMOE_VALIDATE(bytes.size() >= 12 && bytes.compare(0, 6, "\x93NUMPY") == 0, path.string(),
                  " is not an .npy file (no magic string): save it with numpy.save");
  const auto major = static_cast<unsigned char>(bytes[6]);
  LSHMOE_VALIDATE(major >= 1 && major <= 3, path.string(), ": unknown .npy version ", int{major});
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  std::uint32_t length = 0;
  std::memcpy(&length, bytes.data() + 8, length_bytes);
  const std::size_t start = 8 + length_bytes + length;
  LSHMOE_VALIDATE(start <= bytes.size(), path.string(), ": the header is cut off");
  const std::string header = bytes.substr(8 + length_bytes, length);

  std::smatch match;
  LSHMOE_VALIDATE(std::regex_search(header, match, std::regex("'descr': *'([^']*)'")),
                  path.string(), ": no plain dtype in the header");
  const std::string dtype = match[1];
  LSHMOE_VALIDATE(dtype == "<f2" || dtype == "<f4", path.string(), ": dtype ", dtype,
                  " (only little-endian float16 and float32 are read)");
  LSHMOE_VALIDATE(std::regex_search(header, std::regex("'fortran_order': *False")), path.string(),
                  ": not in C order");
  LSHMOE_VALIDATE(
      std::regex_search(header, match,
                        std::regex("'shape': *\\( *([0-9]{1,15}) *,? *([0-9]{0,15}) *,? *\\)")),
      path.string(), ": only 1-D and 2-D arrays are read");
  Array array;
  array.rows = std::stoll(match[1]);
  array.columns = match[2].length() > 0 ? std::stoll(match[2]) : 1;
  const std::size_t element = dtype == "<f2" ? 2 : 4;
  const std::size_t count = (bytes.size() - start) / element;
  LSHMOE_VALIDATE((bytes.size() - start) % element == 0 &&
                      static_cast<unsigned __int128>(array.rows) *
                              static_cast<unsigned __int128>(array.columns) ==
                          count,
                  path.string(), ": shape ", array.rows, " x ", array.columns, ", but ", count,
                  " elements follow");
  array.values.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (element == 4) {
      std::memcpy(&array.values[i], bytes.data() + start + 4 * i, 4);
    } else {
      std::uint16_t half = 0;
      std::memcpy(&half, bytes.data() + start + 2 * i, 2);
      array.values[i] = from_half(half);
    }
  }
  return array;
}

}  // namespace lshmoe
