#pragma once
// Memory that a failed collective may still be reading; see the errors in communicator.hpp.

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// call(), a collective that sends from `buffer`. When it throws CommError, keeps the buffer for
/// the rest of the process: a send that no peer took cannot be taken back.
template <class Buffer, class Call>
void keep_buffer_on_error(Buffer& buffer, Call call) {
  try {
    call();
  } catch (const CommError&) {
    static auto* const kept = new std::vector<std::shared_ptr<void>>;
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    kept->push_back(std::make_shared<Buffer>(std::move(buffer)));
    throw;
  }
}

}  // namespace lshmoe
