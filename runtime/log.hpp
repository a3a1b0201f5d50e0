#pragma once
// Log lines with the rank in each. Rank 0 informs; the other ranks only warn.

#include <string>

namespace lshmoe {

/// "[time] [rank R] [level] text" on stderr, without the rank where there is but one process;
/// thread-safe, local. log_info is silent on ranks > 0.
void log_info(const std::string& text);
void log_warn(const std::string& text);
void log_error(const std::string& text);

}  // namespace lshmoe
