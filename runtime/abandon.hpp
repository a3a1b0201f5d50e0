#pragma once
// Abandoning a step: all ranks give up the step they are in, together, and the job goes on.
//
// A rank cannot leave a step alone: its peers would wait for it. What makes a rank want to leave (a
// signal, rows that are not finite) travels in the header of its next exchange, so that all ranks
// of its expert group throw StepAbandoned from the same call. No communicator is hurt: discard the
// gradients of the step, then end the job or take the next batch.

#include <string>

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {

/// Thrown by every rank of an expert group in the same exchange. The ranks of other groups learn of
/// it by run_together(); see comm/agreement.hpp.
class StepAbandoned : public Error {
 public:
  enum class Reason : unsigned char {
    stop,        ///< request_abandon() was called on some rank
    not_finite,  ///< NaN or infinity that no codec can send, or in the loss or its gradients
  };
  /// `cause`: what happened and on which rank, the same text on every rank; what() adds what to do.
  StepAbandoned(Reason reason, const std::string& cause);

  const Reason reason;
  const std::string cause;
  /// Thrown by all ranks of a run_together(): there is nobody left to tell.
  bool agreed = false;
};

/// Asks for the current step to be abandoned: the next exchange of this process throws
/// StepAbandoned on all ranks of its group. The wish stays until it is withdrawn. Local;
/// async-signal-safe and thread-safe.
void request_abandon() noexcept;
void withdraw_abandon() noexcept;
[[nodiscard]] bool abandon_requested() noexcept;

}  // namespace lshmoe
