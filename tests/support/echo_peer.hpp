#pragma once
// A group of two ranks in one process: the other sends back whatever this one sends it, and a test
// may damage that on its way.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "lshmoe/comm/communicator.hpp"
#include "lshmoe/runtime/error.hpp"

namespace lshmoe::testing {

/// An echo is a good answer wherever both ranks do the same: give the experts of both the same
/// tokens. As a mirrored rank 1, this one's broadcasts bring what it gathered last.
class EchoPeer final : public Communicator {
 public:
  /// Changes the peer's answer to collective number `call`, counted from 0, in place. An answer to
  /// all_to_all_v may change its size.
  using Tamper = std::function<void(int call, Purpose purpose, std::vector<std::byte>& answer)>;

  explicit EchoPeer(Tamper tamper = {}, int rank = 0) : rank_(rank), tamper_(std::move(tamper)) {}

  int rank() const override { return rank_; }
  int size() const override { return 2; }
  int world_rank(int rank) const override { return rank; }
  const std::string& name() const override { return name_; }
  std::string_view backend() const override { return "echo"; }
  const std::string& host(int) const override { return name_; }
  double timeout_seconds() const override { return 1; }
  [[nodiscard]] int calls() const { return calls_; }

 private:
  int rank_, calls_ = 0;
  Tamper tamper_;
  std::string name_ = "echo";

  std::vector<std::byte> answer(const void* sent, std::size_t bytes, Purpose purpose) {
    const auto* from = static_cast<const std::byte*>(sent);
    std::vector<std::byte> echo(from, from + bytes);
    if (tamper_) tamper_(calls_, purpose, echo);
    ++calls_;
    return echo;
  }
  static void copy(void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }

  std::shared_ptr<Communicator> do_split(int, int, const std::string&) override {
    throw NotConfigured("an EchoPeer does not split");
  }
  void do_barrier(Purpose) override {}
  void do_all_reduce(void*, std::size_t, Element, ReduceOp, Purpose) override {
    throw NotConfigured("an EchoPeer does not reduce");
  }
  void do_broadcast(void* data, std::size_t bytes, int root, Purpose purpose) override {
    if (root == rank_) return;
    const auto answered = answer(data, bytes, purpose);
    copy(data, answered.data(), std::min(bytes, answered.size()));
  }
  std::vector<std::vector<std::byte>> do_gather(std::span<const std::byte> data, int root,
                                                Purpose purpose) override {
    if (root != rank_) return {};
    std::vector<std::vector<std::byte>> both(2, {data.begin(), data.end()});
    both[static_cast<std::size_t>(1 - rank_)] = answer(data.data(), data.size(), purpose);
    return both;
  }
  void do_all_to_all(const void* send, void* recv, std::size_t bytes, Purpose purpose) override {
    const auto own = static_cast<std::size_t>(rank_) * bytes;
    const auto other = bytes - own;
    auto* to = static_cast<std::byte*>(recv);
    const auto* from = static_cast<const std::byte*>(send);
    copy(to + own, from + own, bytes);
    const auto answered = answer(from + other, bytes, purpose);
    copy(to + other, answered.data(), std::min(bytes, answered.size()));
  }
  void do_all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes, void* recv,
                       std::span<const std::int64_t> recv_bytes, Purpose purpose) override {
    const auto own = static_cast<std::size_t>(rank_), other = 1 - own;
    const auto size = [](std::span<const std::int64_t> sizes, std::size_t r) {
      return static_cast<std::size_t>(sizes[r]);
    };
    const auto* from = static_cast<const std::byte*>(send);
    auto* to = static_cast<std::byte*>(recv);
    const auto answered =
        answer(from + (other == 0 ? 0 : size(send_bytes, own)), size(send_bytes, other), purpose);
    if (answered.size() != size(recv_bytes, other)) {
      throw CommError(detail::message("rank ", other, " sends ", answered.size(),
                                      " bytes, expected are ", recv_bytes[other]));
    }
    copy(to + (own == 0 ? 0 : size(recv_bytes, other)),
         from + (own == 0 ? 0 : size(send_bytes, other)), size(send_bytes, own));
    copy(to + (other == 0 ? 0 : size(recv_bytes, own)), answered.data(), answered.size());
  }
};

}  // namespace lshmoe::testing
