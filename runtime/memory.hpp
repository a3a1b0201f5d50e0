#pragma once
// Settings of the C library's allocator for programs that allocate the same sizes every step.

namespace lshmoe {

/// Keeps freed memory in the process instead of giving it back to the system: fresh pages cost
/// 0.4-3 ms a MiB in page faults, every step again. Call it first thing in a program's main; a
/// library must not. No-op where the C library is not glibc.
void tune_allocator();

}  // namespace lshmoe
