#pragma once
// Whole files in and out, with errors that name the file and the reason.

#include <cstdio>
#include <span>
#include <string>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// The bytes of a file. Throws InvalidArgument with the path and the system's reason.
[[nodiscard]] std::string read_file(const std::string& path);

/// Appends the bytes of a file to `out`; returns their number. Throws as read_file.
std::size_t append_file(const std::string& path, std::string& out);

/// Writes a whole file so that a crash leaves the old one or the new one, never a part: to a
/// temporary beside it, synced, then renamed. Symbolic links are followed, also to a file that is
/// not there yet. An existing file keeps its mode and its owner; one whose owner a new file cannot
/// get, or that has several names, is overwritten where it is. What is no regular file (a device, a
/// pipe, /dev/stdout) is opened and written; a pipe waits for its reader a minute at most, and not
/// once a stop is requested (runtime/abandon.hpp). Throws Error with the path, the system's reason
/// and what to do.
void write_file_atomically(const std::string& path, std::span<const char> bytes);

/// Opens a file that is written bit by bit: truncates or creates a regular one, follows links and
/// waits for a pipe's reader as above; of what this process has opened already (/dev/stdout,
/// /dev/fd/3) it goes on where that stands. The caller closes it. Throws InvalidArgument as above.
[[nodiscard]] std::FILE* open_to_write(const std::string& path);

/// Throws as open_to_write if a file that is to be written later cannot be; makes one that is not
/// there, and changes none. Pipes are left alone: a reader would take this opening for all there
/// is.
void check_writable(const std::string& path);

/// For "-", or a path that leads to this process's standard output: from now on everything else
/// that is printed there goes to standard error, and the path returned leads to the standard output
/// of before. Any other path is returned as it is. Local; before other threads print.
[[nodiscard]] std::string with_stdout_to_itself(const std::string& path);

/// Whether two files to be written would be one: by path, by links, or both this process's standard
/// output ("-" too). A device takes both, /dev/null for one. Empty paths are no files. Local.
[[nodiscard]] bool same_output(const std::string& a, const std::string& b);

/// Sends what was printed to standard output on its way. Throws Error when that fails (the disk is
/// full, a reader has gone).
void flush_stdout();

/// "cannot write 'PATH' (the system's reason): what to do" for an errno of opening or writing it.
[[nodiscard]] std::string not_written(const std::string& path, int error);

}  // namespace lshmoe
