#pragma once
// The study: one model trained with each codec, at matched bytes and over several seeds.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lshmoe/comm/groups.hpp"
#include "lshmoe/launch/data.hpp"
#include "lshmoe/launch/train_options.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::launch {

/// What the study trains where --study-setting names nothing: lines of lshmoe-train's options, in
/// groups of about equal bytes (twice bf16's, its own, a half, a quarter, a sixth). The first is
/// the reference.
[[nodiscard]] const std::vector<std::string>& default_study_settings();

/// `options` with the codec (group "compress") and the capacity (--capacity-factor, --drop-policy)
/// of `setting`, a line of these options of lshmoe-train; any other is refused. Throws
/// InvalidArgument naming the line. Local.
[[nodiscard]] TrainOptions with_setting(const TrainOptions& options, const std::string& setting);

/// Refuses options on lshmoe-train's command line, as `parser` found them, that the settings
/// replace. A file's may stay. Throws InvalidArgument. Local.
void check_beside_study(const OptionParser& parser);

/// Everything else that can be checked before the first run: settings among them that are refused,
/// or given twice. Throws InvalidArgument. Local.
void validate_study(const TrainOptions& options, int world_size);

/// Trains the model of `options` once for each setting and seed (options.seed, + 1, ...), all else
/// equal, and tells the held-out loss, the bytes sent in share of the bf16 bytes of the reference's
/// plan, times, and what the codec adds to the gradient: after the training, over 8 fresh batches
/// at equal parameters, the mean squared difference to the gradient of an uncompressed exchange,
/// over the variance of that gradient from batch to batch; and how much of it is bias. Rank 0
/// prints a line a run and a table at the end, and writes one JSON object a run to
/// options.metrics. `open_data`: the data for options of another seed. Collective over the world.
void study(const TrainOptions& options, const ExpertGroups& groups,
           const std::function<std::unique_ptr<DataSource>(const TrainOptions&)>& open_data,
           const std::function<bool()>& stop_requested);

}  // namespace lshmoe::launch
