// Units of work on the threads of torch's pool. Whichever thread runs a unit, the sums that several units add to get
// their terms in the order of the units: of the same units, results depend neither on timing nor on threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

namespace avppc {

// Doors that let tickets 0, 1, 2, ... through one after another; one door for each sum.
class Doors {
 public:
  explicit Doors(int64_t count) : next_(count) {}

  // Holds a door from the moment its ticket is called until it goes out of scope.
  class Turn {
   public:
    Turn(Doors& doors, int64_t door, int64_t ticket) : next_(doors.next_[door]) {
      // A short wait spins. A longer one sleeps: a thread that yields instead falls behind those of other processes.
      int32_t now = next_.load(std::memory_order_acquire);
      for (int spin = 0; now < ticket && spin < 2000; ++spin) now = next_.load(std::memory_order_acquire);
      while (now < ticket) {
        next_.wait(now, std::memory_order_acquire);
        now = next_.load(std::memory_order_acquire);
      }
    }
    ~Turn() {
      next_.fetch_add(1, std::memory_order_release);
      next_.notify_all();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    std::atomic<int32_t>& next_;
  };

  // Lets everybody through: somebody failed and will never pass.
  void open() {
    for (auto& next : next_) {
      next.store(1 << 30);
      next.notify_all();
    }
  }

 private:
  std::vector<std::atomic<int32_t>> next_;
};

// Calls body(unit, thread, doors) for each unit from 0 to units - 1, on up to `threads` threads at once, with `count`
// new doors. A unit starts after all lower ones have started, so it may wait for their turns: the lowest one running
// never waits. When a unit throws, the doors are opened, no more units start, and the first exception is thrown here.
template <class Body>
void run_in_order(int64_t units, int64_t threads, int64_t count, const Body& body) {
  Doors doors(count);
  std::atomic<int64_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  torch::stable::parallel_for(0, std::min(threads, units), 1, [&](int64_t begin, int64_t) {
    try {
      for (int64_t unit = next++; unit < units; unit = next++) body(unit, begin, doors);
    } catch (...) {
      next = units;
      const std::lock_guard lock(mutex);
      if (error == nullptr) error = std::current_exception();
      doors.open();
    }
  });
  if (error != nullptr) std::rethrow_exception(error);
}

}  // namespace avppc
