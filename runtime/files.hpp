#pragma once
// Whole files in and out, with errors that name the file and the reason.

#include <span>
#include <string>

namespace lshmoe {

/// The bytes of a file. Throws InvalidArgument with the path and the system's reason.
[[nodiscard]] std::string read_file(const std::string& path);

/// Appends the bytes of a file to `out`; returns their number. Throws as read_file.
std::size_t append_file(const std::string& path, std::string& out);

/// Writes a file so that a crash leaves the old one or the new one, never a part: to a temporary
/// beside it, synced, then renamed. Throws Error with the path and the system's reason.
void write_file_atomically(const std::string& path, std::span<const char> bytes);

}  // namespace lshmoe
