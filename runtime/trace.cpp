#include "lshmoe/runtime/trace.hpp"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <unordered_set>

#include "lshmoe/runtime/error.hpp"

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
  const std::ofstream probe(path_);
  LSHMOE_VALIDATE(probe.good(), "cannot write a trace to '", path_, "' (", std::strerror(errno),
                  "): choose a path in a folder that exists and is writable");
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
  result->save(path_);
  std::ifstream written(path_, std::ios::ate);
  if (!written.good() || written.tellg() <= 0) {
    throw Error(detail::message("torch's profiler wrote no trace to '", path_,
                                "': check the disk, and that this torch was built with kineto"));
  }
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
