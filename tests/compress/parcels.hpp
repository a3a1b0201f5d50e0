#pragma once
// Good parcels of every kind, state and part, to damage.

#include <memory>
#include <string>
#include <vector>

#include "lshmoe/comm/self/self.hpp"
#include "lshmoe/compress/codec.hpp"
#include "tests/compress/rows.hpp"

namespace lshmoe::testing {

struct ParcelSetting {
  std::string name;
  std::shared_ptr<Codec> codec;
  std::vector<std::vector<uint8_t>> parcels;  ///< that the codec decodes
  std::int64_t rows = 0;                      ///< of the last one; as decoded
};

/// A codec and parcels of it: of `x`, and with a learned state one against each of two versions of
/// it, and one that explains itself.
inline ParcelSetting make_setting(std::string name, const CodecOptions& options,
                                  const CodecContext& context, const at::Tensor& x) {
  ParcelSetting setting{std::move(name), make_codec(options, context), {}, 0};
  const at::Tensor rows = x.to(context.dtype);
  const auto add = [&](const at::Tensor& group) {
    const Encoded encoded = setting.codec->encode(group, {group.size(0)});
    setting.parcels.push_back(bytes_of(encoded.bytes));
    setting.rows = setting.codec->decode(encoded.bytes, encoded.bytes_per_group).rows.size(0);
  };
  if (options.state() == "learned") {
    const auto alone = make_self_communicator();
    for (int version = 1; version <= 2; ++version) {
      const at::Tensor seen = rows * (1.0 / version);
      setting.codec->observe(seen, {});
      static_cast<void>(setting.codec->refresh(*alone));
      add(seen.slice(0, 0, 12));
    }
    add(rows.narrow(0, 0, 1).expand({8, rows.size(1)}).contiguous());
  }
  add(rows.slice(0, 0, 40));
  return setting;
}

/// Made once.
inline const std::vector<ParcelSetting>& parcel_settings() {
  static const std::vector<ParcelSetting> all = [] {
    const CodecContext f32{40, 0, Direction::dispatch, at::kFloat};
    const CodecContext b16{40, 0, Direction::combine, at::kBFloat16};
    const CodecContext gradient{40, 0, Direction::combine_backward, at::kBFloat16};
    const CodecContext narrow{7, 0, Direction::dispatch, at::kFloat};
    const at::Tensor rows = clustered(400, 40, 3, 0.1, 1) + 2;
    at::Tensor some_whole = gaussian(12, 40, 2);
    some_whole.select(0, 3).zero_();
    some_whole.select(0, 4).mul_(1e-36);  // steps below the least one
    const at::Tensor few = some_whole.narrow(1, 0, 7);
    const CodecOptions learned = CodecOptions().state("learned").codebook_size(20).sample_rows(400);
    std::vector<ParcelSetting> settings{
        make_setting("none f32", CodecOptions().kind("none"), narrow, few),
        make_setting("none bf16", CodecOptions().kind("none"), b16, some_whole),
        make_setting("bf16 of f32", CodecOptions().kind("bf16"), narrow, few),
        make_setting("bf16", CodecOptions().kind("bf16"), b16, some_whole),
        make_setting("row", CodecOptions(), f32, rows),
        make_setting("row bf16", CodecOptions().error_reference("row"), b16, rows),
        make_setting("group", CodecOptions(), b16, rows),
        make_setting("group f32", CodecOptions().error_reference("group"), f32, rows),
        make_setting("dithered", CodecOptions(), gradient, rows),
        make_setting("no clusters", CodecOptions().max_clusters(0), f32, some_whole),
        make_setting("whole rows", CodecOptions().max_error(0.03), f32, some_whole),
        make_setting("fine", CodecOptions().max_error(1e-4), f32, some_whole),
        make_setting("one band", CodecOptions(), narrow, few),
        make_setting("all whole", CodecOptions().max_error(0), f32, rows.narrow(0, 0, 4)),
        make_setting("source", CodecOptions().restore("source"), f32, rows),
        make_setting("source bf16", CodecOptions().restore("source").error_reference("row"), b16,
                     rows),
        make_setting("learned", learned, f32, rows),
        make_setting("learned bf16", learned, b16, rows),
        make_setting("learned dithered", learned, gradient, rows),
        make_setting("learned narrow", learned, narrow, rows.narrow(1, 0, 7)),
        make_setting("basis", CodecOptions(learned).transform("basis"), f32, rows),
        make_setting("basis bf16", CodecOptions(learned).transform("basis"), b16, rows),
        make_setting("basis dithered", CodecOptions(learned).transform("basis"), gradient, rows),
        make_setting("basis narrow", CodecOptions(learned).transform("basis"), narrow,
                     rows.narrow(1, 0, 7)),
    };
    for (const char* kind : {"fp8", "int8", "int4"}) {
      const auto options = CodecOptions().kind(kind);
      settings.push_back(make_setting(kind, options, f32, some_whole));
      settings.push_back(make_setting(std::string(kind) + " bf16", options, b16, some_whole));
      settings.push_back(make_setting(std::string(kind) + " narrow", options, narrow, few));
    }
    return settings;
  }();
  return all;
}

}  // namespace lshmoe::testing
