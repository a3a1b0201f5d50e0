#pragma once
// Reading .npy files (NumPy's format 1, 2 and 3).

#include <cstdint>
#include <filesystem>
#include <vector>

namespace lshmoe {

/// A 1-D (columns = 1) or 2-D array, as float32.
struct Array {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::vector<float> values;  ///< [rows, columns]
};

/// Reads a C-ordered little-endian float16 or float32 array. Throws InvalidArgument for anything
/// else, and for a file shorter or longer than its header says.
[[nodiscard]] Array read_npy(const std::filesystem::path& path);

}  // namespace lshmoe
