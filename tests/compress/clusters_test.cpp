// Clusters: means of their members, of one group each, and never at a loss.

#include "lshmoe/compress/clusters.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "lshmoe/compress/lsh_codec.hpp"
#include "tests/compress/rows.hpp"

namespace lshmoe {
namespace {
using testing::bytes_of;
using testing::clustered;
using testing::gaussian;

// Means of the members of each cluster in double; rows at -1 belong to none.
at::Tensor means(const at::Tensor& x, const at::Tensor& assignment, int64_t count) {
  const at::Tensor members = assignment.ge(0).nonzero().squeeze(1);
  const at::Tensor id = assignment.index_select(0, members);
  const at::Tensor rows = x.to(at::kDouble).index_select(0, members);
  const at::Tensor sizes = at::bincount(id, {}, count).to(at::kDouble).unsqueeze(1);
  EXPECT_GT(sizes.min().item<double>(), 0) << "a cluster without members";
  return at::zeros({count, x.size(1)}, at::kDouble).index_add(0, id, rows) / sizes;
}

// C1: centroids are the means, so the residuals of a cluster sum to zero; both to `tolerance` of
// the largest value.
void expect_means(const at::Tensor& x, const at::Tensor& assignment, const at::Tensor& centroids,
                  double tolerance) {
  const int64_t count = centroids.size(0);
  ASSERT_EQ(assignment.size(0), x.size(0));
  ASSERT_LT(assignment.max().item<int64_t>(), count);
  const double scale = x.abs().max().item<double>();
  const at::Tensor exact = means(x, assignment, count);
  EXPECT_LE((centroids.to(at::kDouble) - exact).abs().max().item<double>(), tolerance * scale);
  const at::Tensor members = assignment.ge(0).nonzero().squeeze(1);
  const at::Tensor id = assignment.index_select(0, members);
  const at::Tensor residual =
      x.to(at::kDouble).index_select(0, members) - centroids.to(at::kDouble).index_select(0, id);
  const at::Tensor sums = at::zeros_like(exact).index_add(0, id, residual);
  const double most = at::bincount(id).max().item<double>();
  EXPECT_LE(sums.abs().max().item<double>(), most * tolerance * scale);
}

struct Group {
  at::Tensor x, z;
  CodecOptions options;
  [[nodiscard]] ClusterInput input() const {
    return {x.size(0), x.size(1), x.const_data_ptr<float>(), z.const_data_ptr<float>()};
  }
};
Group make_group(const at::Tensor& x, const CodecOptions& options) {
  const auto matrix = projection_matrix(options, x.size(1), 0);
  const at::Tensor r = at::tensor(at::ArrayRef<float>(matrix)).view({x.size(1), -1});
  return {x, at::mm(x - x.mean(0), r).contiguous(), options};
}
at::Tensor to_tensor(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }
at::Tensor centroids_of(const Clusters& clusters, int64_t hidden) {
  return at::tensor(at::ArrayRef<float>(clusters.centroids)).view({clusters.count, hidden});
}

// Bucket of a row from its z, in words: per hash, the coordinate largest in size and its sign.
std::vector<int> bucket(const at::Tensor& z, int64_t row, const CodecOptions& options) {
  std::vector<int> name;
  for (int64_t hash = 0; hash < options.hashes(); ++hash) {
    const at::Tensor part =
        z[row].narrow(0, hash * options.hash_dim(), options.hash_dim()).to(at::kDouble);
    const auto largest = part.abs().argmax().item<int>();
    name.push_back(part[largest].item<double>() < 0 ? -largest - 1 : largest + 1);
  }
  return name;
}

TEST(Clusters, WithoutRefiningAreTheBuckets) {
  const Group group = make_group(clustered(300, 24, 12, 0.4, 1),
                                 CodecOptions().hashes(2).hash_dim(4).projection(16).refine(0));
  const Clusters clusters = bucket_clusters(group.input(), group.options);
  std::map<std::vector<int>, std::set<int64_t>> ids;
  for (int64_t i = 0; i < 300; ++i) {
    ids[bucket(group.z, i, group.options)].insert(clusters.assignment[static_cast<std::size_t>(i)]);
  }
  std::set<int64_t> all;
  for (const auto& [name, of_bucket] : ids) {
    EXPECT_EQ(of_bucket.size(), 1U);  // equal keys, one cluster
    all.insert(*of_bucket.begin());
  }
  EXPECT_EQ(all.size(), ids.size());  // different keys, different clusters
  EXPECT_EQ(clusters.count, static_cast<int64_t>(ids.size()));
  EXPECT_GT(clusters.count, 10);
  expect_means(group.x, to_tensor(clusters.assignment), centroids_of(clusters, 24), 1e-6);
}

TEST(Clusters, RefiningMovesRowsToTheNearestSeed) {
  Group group = make_group(clustered(300, 24, 12, 0.4, 1),
                           CodecOptions().hashes(2).hash_dim(4).projection(16));
  // The seeds: means in Z of the largest buckets, as many as are larger than all others.
  std::map<std::vector<int>, std::vector<int64_t>> members;
  for (int64_t i = 0; i < 300; ++i) members[bucket(group.z, i, group.options)].push_back(i);
  std::vector<std::vector<int64_t>> by_size;
  for (const auto& [name, rows] : members) by_size.push_back(rows);
  std::sort(by_size.begin(), by_size.end(),
            [](const auto& a, const auto& b) { return a.size() > b.size(); });
  std::size_t count = 6;
  while (by_size[count - 1].size() == by_size[count].size()) ++count;
  group.options.max_clusters(static_cast<int64_t>(count));
  const Clusters clusters = bucket_clusters(group.input(), group.options);
  ASSERT_EQ(clusters.assignment.size(), 300U);
  EXPECT_LE(clusters.count, static_cast<int64_t>(count));
  EXPECT_GT(clusters.count, 4);
  expect_means(group.x, to_tensor(clusters.assignment), centroids_of(clusters, 24), 1e-6);

  std::vector<at::Tensor> seeds;
  for (std::size_t k = 0; k < count; ++k) {
    seeds.push_back(group.z.to(at::kDouble).index_select(0, to_tensor(by_size[k])).mean(0));
  }
  const at::Tensor distance = at::cdist(group.z.to(at::kDouble), at::stack(seeds));
  const auto [two, nearest] = distance.topk(2, 1, /*largest=*/false);
  std::map<int64_t, std::set<int64_t>> seed_of_cluster, cluster_of_seed;
  for (int64_t i = 0; i < 300; ++i) {
    if (two[i][1].item<double>() - two[i][0].item<double>() < 1e-4) continue;
    const int64_t seed = nearest[i][0].item<int64_t>();
    const int64_t cluster = clusters.assignment[static_cast<std::size_t>(i)];
    seed_of_cluster[cluster].insert(seed);
    cluster_of_seed[seed].insert(cluster);
  }
  for (const auto& [cluster, of] : seed_of_cluster) EXPECT_EQ(of.size(), 1U) << cluster;
  for (const auto& [seed, of] : cluster_of_seed) EXPECT_EQ(of.size(), 1U) << seed;
}

TEST(Clusters, ThatPayAreMeans) {
  for (const int64_t refine : {0, 1, 3}) {
    const at::Tensor x = clustered(400, 32, 10, 0.2, 4);
    const Group group = make_group(x, CodecOptions().projection(32).refine(refine));
    // In units of |z|^2: with as many columns as channels, Z holds all of the energy.
    const at::Tensor bound = (0.1 * x.norm(2, 1)).square();
    const std::vector<float> squared_bound(bound.const_data_ptr<float>(),
                                           bound.const_data_ptr<float>() + 400);
    const Clusters clusters = paying_clusters(group.input(), group.options, squared_bound, 4.0);
    ASSERT_GE(clusters.count, 6) << "refine " << refine;
    ASSERT_LE(clusters.count, 128);
    expect_means(x, to_tensor(clusters.assignment), centroids_of(clusters, 32), 1e-6);

    // No centroid is worth a price that no group can pay back.
    const Clusters none = paying_clusters(group.input(), group.options, squared_bound, 1e6);
    EXPECT_EQ(none.count, 0);
    EXPECT_EQ(none.assignment, std::vector<int64_t>(400, -1));
  }
}

TEST(Clusters, OfSourceAreMeansOfTheirGroup) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t refine : {0, 1, 2}) {
      // The same rows in three groups: a cluster must not reach across (C9).
      const at::Tensor rows = clustered(90, 20, 6, 0.3, 2).to(dtype);
      const at::Tensor x = at::cat({rows, rows.narrow(0, 0, 40), rows, rows.narrow(0, 5, 1)});
      const std::vector<int64_t> groups{90, 40, 0, 90, 1};
      const auto codec = make_codec(CodecOptions().restore("source").refine(refine).max_clusters(8),
                                    {20, 1, Direction::dispatch, dtype});
      const Encoded encoded = codec->encode(x, groups);
      EXPECT_EQ(encoded.stats.clusters, encoded.centroids.size(0));
      // What arrives is what the sender subtracted.
      EXPECT_EQ(bytes_of(codec->decode(encoded.bytes, encoded.bytes_per_group).rows),
                bytes_of(encoded.centroids));
      int64_t first = 0, first_centroid = 0, at_byte = 0;
      for (std::size_t g = 0; g < groups.size(); ++g) {
        const int64_t count = encoded.centroids_per_group[g];
        const int64_t bytes = encoded.bytes_per_group[g];
        EXPECT_EQ(count == 0, groups[g] == 0);
        if (count > 0) {
          const at::Tensor own = x.narrow(0, first, groups[g]);
          const at::Tensor id = encoded.assignment.narrow(0, first, groups[g]) - first_centroid;
          ASSERT_GE(id.min().item<int64_t>(), 0);
          expect_means(own, id, encoded.centroids.narrow(0, first_centroid, count),
                       dtype == at::kFloat ? 1e-6 : 1.0 / 256);
          // A group's parcel does not depend on the groups beside it.
          const Encoded alone = codec->encode(own, {groups[g]});
          EXPECT_EQ(bytes_of(alone.bytes), bytes_of(encoded.bytes.narrow(0, at_byte, bytes)));
          EXPECT_EQ(bytes_of(alone.assignment), bytes_of(id));
        }
        first += groups[g];
        first_centroid += count;
        at_byte += bytes;
      }
    }
  }
}

TEST(Probes, LeaveTheirClustersAndStandAlone) {
  const at::Tensor x = clustered(300, 24, 12, 0.4, 1);
  for (const int64_t most : {1, 4, 40, 1000}) {
    SCOPED_TRACE(most);
    const Group group = make_group(
        x, CodecOptions().hashes(2).hash_dim(4).projection(16).refine(0).alpha_probes(most));
    const Clusters before = bucket_clusters(group.input(), group.options);
    Clusters after = before;
    const std::vector<Probe> probes = split_off_probes(group.input(), group.options, after);
    // Rows that are not the first of their cluster.
    std::vector<int64_t> followers;
    std::set<int64_t> met;
    for (int64_t i = 0; i < 300; ++i)
      if (!met.insert(before.assignment[static_cast<std::size_t>(i)]).second)
        followers.push_back(i);
    ASSERT_GT(followers.size(), 100U);
    const auto count = std::min<std::size_t>(static_cast<std::size_t>(most), followers.size() / 4);
    ASSERT_EQ(probes.size(), count);
    EXPECT_EQ(after.count, before.count + static_cast<int64_t>(count));
    std::vector<int64_t> expected = before.assignment;
    for (std::size_t p = 0; p < count; ++p) {
      // One from each of `count` equal parts of them.
      const auto at = std::find(followers.begin(), followers.end(), probes[p].row);
      ASSERT_NE(at, followers.end());
      const auto place = static_cast<double>(at - followers.begin());
      const double part = static_cast<double>(followers.size()) / static_cast<double>(count);
      EXPECT_GE(place, part * static_cast<double>(p) - 1);
      EXPECT_LT(place, part * static_cast<double>(p + 1));
      int64_t& cluster = expected[static_cast<std::size_t>(probes[p].row)];
      EXPECT_EQ(probes[p].cluster, cluster);
      cluster = before.count + static_cast<int64_t>(p);
    }
    EXPECT_EQ(after.assignment, expected);
    // Also that no cluster is without members.
    expect_means(x, to_tensor(after.assignment), centroids_of(after, 24), 1e-6);
  }
}

TEST(Probes, TravelWithTheCentroidsOfTheirGroup) {
  const at::Tensor x = clustered(250, 20, 6, 0.3, 2).to(at::kBFloat16);
  const std::vector<int64_t> groups{120, 1, 0, 9, 120};
  const auto options = CodecOptions().restore("source").refine(1).max_clusters(8);
  const CodecContext context{20, 1, Direction::dispatch, at::kBFloat16};
  const auto codec =
      make_codec(CodecOptions(options).estimate_alpha(true).alpha_probes(3), context);
  const Encoded encoded = codec->encode(x, groups),
                without = make_codec(options, context)->encode(x, groups);
  EXPECT_TRUE(without.probes.empty());
  EXPECT_EQ(bytes_of(codec->decode(encoded.bytes, encoded.bytes_per_group).rows),
            bytes_of(encoded.centroids));
  std::vector<std::size_t> per_group(groups.size(), 0);
  for (const Probe& probe : encoded.probes) {
    const int64_t alone = encoded.assignment[probe.row].item<int64_t>();
    EXPECT_EQ(encoded.assignment.eq(alone).sum().item<int64_t>(), 1);
    EXPECT_EQ(bytes_of(encoded.centroids[alone]), bytes_of(x[probe.row]));
    std::size_t g = 0;
    int64_t first_row = 0, first_centroid = 0;
    for (; probe.row >= first_row + groups[g]; ++g) {
      first_row += groups[g];
      first_centroid += encoded.centroids_per_group[g];
    }
    ++per_group[g];
    // Of the same group, and somebody else's.
    EXPECT_GE(probe.cluster, first_centroid);
    EXPECT_LT(probe.cluster, first_centroid + encoded.centroids_per_group[g]);
    EXPECT_NE(probe.cluster, alone);
    EXPECT_TRUE(encoded.assignment.eq(probe.cluster).any().item<bool>());
  }
  EXPECT_EQ(per_group[0], 3U);
  EXPECT_EQ(per_group[4], 3U);
  EXPECT_EQ(per_group[1], 0U);
  EXPECT_LE(per_group[3], 2U);
  // A probe costs its row.
  EXPECT_EQ(encoded.stats.sent_bytes - without.stats.sent_bytes,
            static_cast<int64_t>(encoded.probes.size()) * 2 * 20);
}

TEST(Clusters, OfExpertDoNotMixGroups) {
  const at::Tensor rows = clustered(200, 48, 8, 0.1, 6);
  const at::Tensor x = at::cat({rows, rows.flip(0), rows.narrow(0, 0, 60)});
  const std::vector<int64_t> groups{200, 200, 60};
  const auto codec = make_codec(CodecOptions(), {48});
  const Encoded encoded = codec->encode(x, groups);
  int64_t first = 0, first_centroid = 0, at_byte = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const int64_t count = encoded.centroids_per_group[g];
    ASSERT_GT(count, 2);
    const at::Tensor id = encoded.assignment.narrow(0, first, groups[g]);
    const at::Tensor named = id.masked_select(id.ge(0));
    EXPECT_GE(named.min().item<int64_t>(), first_centroid);
    EXPECT_LT(named.max().item<int64_t>(), first_centroid + count);
    const Encoded alone = codec->encode(x.narrow(0, first, groups[g]), {groups[g]});
    EXPECT_EQ(bytes_of(alone.bytes),
              bytes_of(encoded.bytes.narrow(0, at_byte, encoded.bytes_per_group[g])));
    // Coded to a tenth of what is left of the mean once the group's mean is taken off: never
    // further from the members' mean than that.
    const at::Tensor exact =
        means(x.narrow(0, first, groups[g]), at::where(id.ge(0), id - first_centroid, id), count);
    const at::Tensor error =
        (encoded.centroids.narrow(0, first_centroid, count).to(at::kDouble) - exact).norm(2, 1);
    EXPECT_TRUE((error <= 0.11 * exact.norm(2, 1) + 0.05).all().item<bool>());
    first += groups[g];
    first_centroid += count;
    at_byte += encoded.bytes_per_group[g];
  }
}

// C2, the codec's part: a token alone in its cluster, or equal to all others there, is its
// centroid.
TEST(Clusters, OfEqualOrLonelyRowsAreTheRows) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t refine : {0, 1}) {
      const auto codec = make_codec(CodecOptions().restore("source").refine(refine),
                                    {16, 0, Direction::dispatch, dtype});
      const at::Tensor x = gaussian(8, 16, 3).to(dtype);
      const Encoded lonely = codec->encode(x, std::vector<int64_t>(8, 1));
      EXPECT_EQ(bytes_of(lonely.centroids), bytes_of(x));
      EXPECT_EQ(lonely.stats.max_relative_error, 0);
      const at::Tensor equal = x.narrow(0, 2, 1).expand({32, 16});
      const Encoded one = codec->encode(equal, {32});
      ASSERT_EQ(one.centroids.size(0), 1);
      // The sum of 32 equal rows rounds.
      EXPECT_TRUE(at::allclose(one.centroids, equal.narrow(0, 0, 1), 1e-6, 0));
    }
  }
}

// C8: every rank and every start draws the same rotations.
TEST(Projection, IsFixed) {
  const auto matrix = [](uint64_t seed, int64_t layer) {
    return projection_matrix(CodecOptions().seed(seed), 96, layer);
  };
  const auto sum = [](const std::vector<float>& m) {
    return kernels::checksum(m.data(), m.size() * sizeof(float));
  };
  EXPECT_EQ(sum(matrix(0, 0)), 716913755U);
  EXPECT_EQ(sum(matrix(7, 3)), 1178381543U);
  EXPECT_EQ(matrix(7, 3), matrix(7, 3));

  // Neighboring seeds and layers share nothing: no column is another's, shifted or not.
  const std::vector<std::vector<float>> drawn{matrix(0, 0), matrix(1, 0), matrix(2, 0),
                                              matrix(0, 1), matrix(0, 2), matrix(1, 1)};
  for (std::size_t a = 0; a < drawn.size(); ++a) {
    for (std::size_t b = 0; b < a; ++b) {
      for (int64_t shift = -8; shift <= 8; ++shift) {
        double dot = 0;
        for (int64_t i = 8; i < 88; ++i) {
          dot += static_cast<double>(drawn[a][static_cast<std::size_t>(64 * i)]) *
                 static_cast<double>(drawn[b][static_cast<std::size_t>(64 * (i + shift))]);
        }
        EXPECT_LT(std::abs(dot), 0.5) << a << " " << b << " shifted by " << shift;
      }
    }
  }
}

struct Bytes {
  double with_clusters = 0, without = 0, worst = 0;  // worst: of one group, with / without
};
Bytes compare(const at::Tensor& x, int64_t group, const CodecOptions& options) {
  const std::vector<int64_t> groups(static_cast<std::size_t>(x.size(0) / group), group);
  const auto sizes = [&](int64_t max_clusters) {
    const auto codec = make_codec(CodecOptions(options).max_clusters(max_clusters), {x.size(1), 0});
    return codec->encode(x, groups).bytes_per_group;
  };
  const auto with_clusters = sizes(128), without = sizes(0);
  Bytes bytes;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    bytes.with_clusters += static_cast<double>(with_clusters[g]);
    bytes.without += static_cast<double>(without[g]);
    bytes.worst = std::max(bytes.worst,
                           static_cast<double>(with_clusters[g]) / static_cast<double>(without[g]));
  }
  return bytes;
}

TEST(Cost, ClustersNeverCostMoreThanTheySave) {
  for (const int64_t group : {16, 64, 256, 1024}) {
    for (const char* reference : {"row", "group"}) {
      for (const double max_error : {0.05, 0.1, 0.3}) {
        SCOPED_TRACE(::testing::Message() << group << " " << reference << " " << max_error);
        const auto options = CodecOptions().error_reference(reference).max_error(max_error);
        for (const at::Tensor& x :
             {gaussian(2048, 96, 1), clustered(2048, 96, 20, 0.3, 1),
              clustered(2048, 96, 20, 1.0, 1), clustered(2048, 96, 200, 0.5, 1)}) {
          // The choice reads 256 rows of a group at most: a larger one may be misjudged by a
          // little.
          EXPECT_LE(compare(x, group, options).worst, group <= 256 ? 1.001 : 1.004);
        }
      }
    }
  }
}

TEST(Cost, ClustersSaveWhereThereAreSome) {
  // 20 centers, spread 0.3: what is left of a row is 0.3 of it, so an ideal code of the residuals
  // takes log2(1 / 0.3) = 1.7 bits less; centroids and ids take some of that back.
  const at::Tensor x = clustered(2048, 192, 20, 0.3, 5);
  for (const auto& [group, most] : {std::pair<int64_t, double>{256, 0.82}, {1024, 0.74}}) {
    const Bytes bytes = compare(x, group, CodecOptions());
    EXPECT_LE(bytes.with_clusters, most * bytes.without) << group;
  }
}

TEST(Cost, WhiteRows) {
  const at::Tensor x = gaussian(1024, 384, 1);
  const Encoded encoded = make_codec(CodecOptions(), {384})->encode(x, {1024});
  const double bits = 8.0 * static_cast<double>(encoded.bytes.numel()) / (1024 * 384);
  EXPECT_LE(bits, 4.2);
  // Below the rate of a uniform quantizer with an ideal entropy coder, log2(1 / 0.1) + 0.25, the
  // bound could not have been kept.
  EXPECT_GT(bits, std::log2(10) + 0.25);
}

TEST(Cost, OutlierChannelsCostOnlyThemselves) {
  // One channel of a hundred far above the others: bands keep its size from the rest.
  const at::Tensor x = gaussian(512, 384, 2);
  at::Tensor spiked = x.clone();
  spiked.slice(1, 0, 384, 100).mul_(50);
  const auto bits = [](const at::Tensor& rows, double max_error) {
    const Encoded encoded =
        make_codec(CodecOptions().max_error(max_error), {384})->encode(rows, {rows.size(0)});
    return 8.0 * static_cast<double>(encoded.bytes.numel()) / static_cast<double>(rows.numel());
  };
  // The same absolute error for both.
  const double factor = (x.norm() / spiked.norm()).item<double>();
  EXPECT_LE(bits(spiked, 0.1 * factor), bits(x, 0.1) + 0.5);
}

}  // namespace
}  // namespace lshmoe
