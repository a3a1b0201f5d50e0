#pragma once
// lshmoe-train from its arguments to its exit status.

#include <functional>
#include <memory>

#include "lshmoe/launch/data.hpp"
#include "lshmoe/launch/train_options.hpp"

namespace lshmoe::launch {

using OpenData = std::function<std::unique_ptr<DataSource>(const TrainOptions&)>;

/// Parses, joins the job, trains; the only place that catches. What is wrong on every rank is said
/// once, by rank 0; an error of one rank is logged there and ends the job. Returns the exit status.
[[nodiscard]] int train_program(int argc, char** argv, const OpenData& open_data);

}  // namespace lshmoe::launch
