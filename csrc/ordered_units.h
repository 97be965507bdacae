// Units of work on the threads of torch's pool. Whatever thread runs a unit, sums that several units add to get their
// terms in the order of the units: results do not depend on the timing, nor on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace avppc {

// What failed first; everybody else stops waiting and leaves.
class Failure {
 public:
  bool happened() const { return happened_.load(std::memory_order_relaxed); }
  void record(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (error_ == nullptr) error_ = error;
    happened_.store(true);
  }
  void rethrow() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> happened_ = false;
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Doors that let tickets 0, 1, 2, ... through one after another, one door for each sum.
class Doors {
 public:
  explicit Doors(int64_t count) : next_(count) {}

  // Holds a door from the moment its ticket is called until it goes out of scope.
  class Turn {
   public:
    Turn(Doors& doors, int64_t door, int64_t ticket, const Failure& failure)
        : next_(doors.next_[door]), ticket_(ticket) {
      while (next_.load(std::memory_order_acquire) != ticket && !failure.happened()) std::this_thread::yield();
    }
    ~Turn() { next_.store(ticket_ + 1, std::memory_order_release); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    std::atomic<int64_t>& next_;
    const int64_t ticket_;
  };

 private:
  std::vector<std::atomic<int64_t>> next_;
};

// Calls body(unit, thread, failure) for each unit from 0 to units - 1, on up to `threads` threads at once. A unit
// starts after all lower ones have started, so it may wait for their turns: the lowest one running never waits.
template <class Body>
void run_in_order(int64_t units, int64_t threads, const Body& body) {
  std::atomic<int64_t> next = 0;
  Failure failure;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    try {
      for (int64_t unit = next++; unit < units && !failure.happened(); unit = next++) body(unit, begin, failure);
    } catch (...) {
      failure.record(std::current_exception());
    }
  });
  failure.rethrow();
}

}  // namespace avppc
