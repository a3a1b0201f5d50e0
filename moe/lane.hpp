#pragma once
// Two lanes of work on one device: what the caller computes, and exchanges beside it.

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/torch.h>

#include <memory>
#include <optional>
#include <vector>

namespace lshmoe {

/// On a GPU: work given to exchange() is queued on a second stream, and the two wait for each other
/// only where a Mark says so. On the CPU everything runs at once, in the order of the calls.
///
/// Tensors that one lane makes and the other reads are handed over by `give`, so that the caching
/// allocator does not reuse their memory too early.
class Lanes {
 public:
  /// `exchange_stream`: the lane's stream where `device` is a GPU; not used on the CPU.
  Lanes(at::Device device, std::optional<at::Stream> exchange_stream) : device_(device) {
    if (device.is_cpu()) return;
    compute_ = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
    exchange_ = exchange_stream;
  }

  /// A point in one lane's work.
  class Mark {
   public:
    Mark() = default;

   private:
    friend class Lanes;
    std::shared_ptr<c10::Event> event_;
  };

  /// Everything queued so far on the compute, or the exchange lane.
  [[nodiscard]] Mark mark_compute() const { return record(compute_); }
  [[nodiscard]] Mark mark_exchange() const { return record(exchange_); }

  /// What is queued on the lane from now on waits for `mark`.
  void compute_after(const Mark& mark) const { wait(compute_, mark); }
  void exchange_after(const Mark& mark) const { wait(exchange_, mark); }

  /// Runs `work` with the exchange lane as the current stream.
  template <class Work>
  auto exchange(Work work) const {
    const c10::OptionalStreamGuard guard(exchange_);
    return work();
  }

  /// Tensors made on one lane that the other will read (CPU tensors are left alone).
  void give_to_compute(const std::vector<at::Tensor>& tensors) const { give(compute_, tensors); }
  void give_to_exchange(const std::vector<at::Tensor>& tensors) const { give(exchange_, tensors); }

 private:
  using Stream = std::optional<at::Stream>;
  at::Device device_;
  Stream compute_, exchange_;

  [[nodiscard]] Mark record(const Stream& stream) const {
    Mark mark;
    if (stream) {
      mark.event_ = std::make_shared<c10::Event>(device_.type());
      mark.event_->record(*stream);
    }
    return mark;
  }
  static void wait(const Stream& stream, const Mark& mark) {
    if (stream && mark.event_) mark.event_->block(*stream);
  }
  static void give(const Stream& stream, const std::vector<at::Tensor>& tensors) {
    if (!stream) return;
    for (const at::Tensor& tensor : tensors)
      if (tensor.defined() && !tensor.is_cpu()) tensor.record_stream(*stream);
  }
};

}  // namespace lshmoe
