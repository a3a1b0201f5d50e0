#include "lshmoe/runtime/trace.hpp"

#include <torch/csrc/autograd/profiler_kineto.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <unordered_set>

#include "lshmoe/runtime/error.hpp"
#include "lshmoe/runtime/files.hpp"

namespace lshmoe {
namespace {
namespace prof = torch::autograd::profiler;
namespace impl = torch::profiler::impl;

const std::unordered_set<at::RecordScope> kScopes = {
    at::RecordScope::FUNCTION, at::RecordScope::USER_SCOPE, at::RecordScope::BACKWARD_FUNCTION};
}  // namespace

std::string trace_path(const std::string& path, int rank, int world_size) {
  if (world_size <= 1) return path;
  const std::size_t slash = path.find_last_of('/');
  std::size_t dot = path.find_last_of('.');
  if (dot == std::string::npos || (slash != std::string::npos && dot < slash)) dot = path.size();
  return path.substr(0, dot) + ".rank" + std::to_string(rank) + path.substr(dot);
}

TraceSession::TraceSession(std::string path) : path_(std::move(path)) {
  check_writable(path_);
  const std::set<impl::ActivityType> activities = {impl::ActivityType::CPU};
  const impl::ProfilerConfig config(impl::ProfilerState::KINETO);
  prof::prepareProfiler(config, activities);
  prof::enableProfiler(config, activities, kScopes);
  recording_ = true;
}

TraceSession::~TraceSession() {
  if (recording_) {
    try {
      prof::disableProfiler();
    } catch (...) {  // a destructor may run while another error unwinds
    }
  }
}

void TraceSession::write() {
  LSHMOE_ASSERT(recording_);
  recording_ = false;
  const auto result = prof::disableProfiler();
  // The profiler knows regular files only.
  std::string temporary = std::filesystem::temp_directory_path() / "lshmoe-trace.XXXXXX.json";
  const int made = ::mkstemps(temporary.data(), 5);  // nobody else's, nor a link
  if (made < 0) throw Error(not_written(temporary, errno));
  ::close(made);
  result->save(temporary);
  const std::string bytes = read_file(temporary);
  std::filesystem::remove(temporary);
  if (bytes.empty()) {
    throw Error(detail::message("torch's profiler wrote no trace to '", temporary,
                                "': check the disk, and that this torch was built with kineto"));
  }
  write_file_atomically(path_, bytes);
}

NvtxRanges::NvtxRanges() {
  try {
    prof::enableProfiler(impl::ProfilerConfig(impl::ProfilerState::NVTX), {}, kScopes);
  } catch (const c10::Error&) {
    throw NotConfigured(
        "NVTX ranges (this lshmoe was built without CUDA): rebuild with -DLSHMOE_CUDA=ON, or use "
        "--trace");
  }
}
NvtxRanges::~NvtxRanges() {
  try {
    prof::disableProfiler();
  } catch (...) {  // a destructor may run while another error unwinds
  }
}

}  // namespace lshmoe
