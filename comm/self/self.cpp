#include "lshmoe/comm/self/self.hpp"

#include <unistd.h>

#include <array>
#include <cstring>

namespace lshmoe {
namespace {

std::string host_name() {
  std::array<char, 256> text{};
  ::gethostname(text.data(), text.size() - 1);
  return text.data();
}

// memcpy may not be given a null pointer, even for nothing.
void copy_bytes(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

class SelfCommunicator final : public Communicator {
 public:
  SelfCommunicator(std::string name, double timeout_seconds)
      : name_(std::move(name)), host_(host_name()), timeout_seconds_(timeout_seconds) {}

  int rank() const override { return 0; }
  int size() const override { return 1; }
  int world_rank(int) const override { return 0; }
  const std::string& name() const override { return name_; }
  std::string_view backend() const override { return "self"; }
  const std::string& host(int) const override { return host_; }
  double timeout_seconds() const override { return timeout_seconds_; }

 private:
  std::shared_ptr<Communicator> do_split(int, int, const std::string& name) override {
    return std::make_shared<SelfCommunicator>(name_ + "/" + name, timeout_seconds_);
  }
  void do_barrier(Purpose) override {}
  void do_all_reduce(void*, std::size_t, Element, ReduceOp, Purpose) override {}
  void do_broadcast(void*, std::size_t, int, Purpose) override {}
  std::vector<std::vector<std::byte>> do_gather(std::span<const std::byte> data, int,
                                                Purpose) override {
    return {std::vector<std::byte>(data.begin(), data.end())};
  }
  void do_all_to_all(const void* send, void* recv, std::size_t bytes_per_rank, Purpose) override {
    copy_bytes(recv, send, bytes_per_rank);
  }
  void do_all_to_all_v(const void* send, std::span<const std::int64_t> send_bytes, void* recv,
                       std::span<const std::int64_t>, Purpose) override {
    copy_bytes(recv, send, static_cast<std::size_t>(send_bytes[0]));
  }

  std::string name_;
  std::string host_;
  double timeout_seconds_;
};

}  // namespace

std::shared_ptr<Communicator> make_self_communicator(const std::string& name,
                                                     double timeout_seconds) {
  return std::make_shared<SelfCommunicator>(name, timeout_seconds);
}

}  // namespace lshmoe
