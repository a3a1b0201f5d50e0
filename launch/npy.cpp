#include "lshmoe/launch/npy.hpp"

#include <cstring>
#include <regex>

#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"

namespace lshmoe::launch {

at::Tensor read_npy(const std::string& path) {
  const std::string bytes = read_file(path);
  LSHMOE_VALIDATE(bytes.size() >= 12 && bytes.starts_with("\x93NUMPY"), "'", path,
                  "' is no .npy file (its first bytes are not NumPy's): save it with numpy.save");
  const auto major = static_cast<unsigned char>(bytes[6]);
  LSHMOE_VALIDATE(major >= 1 && major <= 3, "'", path, "' has .npy version ", int{major},
                  " (1 to 3 are known): save it with numpy.save");
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  std::uint32_t length = 0;
  std::memcpy(&length, bytes.data() + 8, length_bytes);
  const std::size_t start = 8 + length_bytes + length;
  LSHMOE_VALIDATE(start <= bytes.size(), "'", path,
                  "' ends within its header (damaged, or half written): make it again");
  std::string header = bytes.substr(8 + length_bytes, length);
  header.erase(header.find_last_not_of(" \n") + 1);  // what aligns the data

  std::smatch match;
  LSHMOE_VALIDATE(
      std::regex_search(header, match, std::regex("'descr': *'(<f2|<f4|[<|]V2|bfloat16)'")), "'",
      path, "' holds no little-endian float16, float32 or bfloat16 (header ", header,
      "): convert it, e.g. array.astype('<f4')");
  const at::ScalarType dtype = match[1] == "<f2"   ? at::kHalf
                               : match[1] == "<f4" ? at::kFloat
                                                   : at::kBFloat16;
  LSHMOE_VALIDATE(std::regex_search(header, std::regex("'fortran_order': *False")), "'", path,
                  "' is not in C order: save numpy.ascontiguousarray(array)");
  LSHMOE_VALIDATE(
      std::regex_search(header, match,
                        std::regex("'shape': *\\( *([0-9]{1,12}) *, *([0-9]{1,12}) *,? *\\)")),
      "'", path, "' is no array of two dimensions, rows x hidden size (header ", header,
      "): reshape it, e.g. array.reshape(-1, hidden)");
  const int64_t rows = std::stoll(match[1]);
  const int64_t columns = std::stoll(match[2]);
  LSHMOE_VALIDATE(rows > 0 && columns > 0, "'", path, "' is an array of ", rows, " x ", columns,
                  " (there is nothing in it): save rows");
  const std::size_t element = at::elementSize(dtype);
  LSHMOE_VALIDATE(
      static_cast<unsigned __int128>(rows) * static_cast<unsigned __int128>(columns) * element ==
          bytes.size() - start,
      "'", path, "' has ", bytes.size() - start, " bytes for an array of ", rows, " x ", columns,
      " (damaged, or half written): make it again");
  at::Tensor array = at::empty({rows, columns}, dtype);
  if (array.numel() > 0) {
    std::memcpy(array.mutable_data_ptr(), bytes.data() + start, bytes.size() - start);
  }
  return array;
}

}  // namespace lshmoe::launch
