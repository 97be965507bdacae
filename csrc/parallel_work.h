// Work items on the threads of torch's pool, and turns for those that add to the same sum: it gets its terms in the
// order of the items, whichever thread runs one. So results depend neither on timing nor on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

namespace avppc {

// Calls work(thread, next) on up to `threads` threads at once. Each call of next() takes the next of the items
// 0 .. items - 1, and gives `items` or more when there is none: so a thread that the machine holds up delays one item
// and not its whole share. When work throws, no more items are given out, on_error() is called, and the first exception
// is thrown here.
template <class Work, class OnError>
void share_items(int64_t items, int64_t threads, const Work& work, const OnError& on_error) {
  std::atomic<int64_t> first_left = 0;
  std::mutex mutex;
  std::exception_ptr error;
  torch::stable::parallel_for(0, std::min(threads, items), 1, [&](int64_t thread, int64_t) {
    try {
      work(thread, [&] { return first_left++; });
    } catch (...) {
      first_left = items;
      const std::lock_guard lock(mutex);
      if (error == nullptr) error = std::current_exception();
      on_error();
    }
  });
  if (error != nullptr) std::rethrow_exception(error);
}

// Ticket locks: each lets tickets 0, 1, 2, ... through one after another; one lock for each sum.
class TicketLocks {
 public:
  explicit TicketLocks(int64_t count) : next_(count) {}

  // Holds a lock from the moment its ticket is called until it goes out of scope.
  class Turn {
   public:
    Turn(TicketLocks& locks, int64_t lock, int64_t ticket) : next_(locks.next_[lock]) {
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

  // Lets every ticket through: an item failed, and its turn will never come.
  void release_all() {
    for (auto& next : next_) {
      next.store(1 << 30);
      next.notify_all();
    }
  }

 private:
  std::vector<std::atomic<int32_t>> next_;
};

// Calls body(item, thread, locks) for each item from 0 to items - 1, on up to `threads` threads at once, with `count`
// new locks. An item starts after all lower ones have started, so it may wait for their turns: the lowest one running
// never waits. When an item throws, nobody waits any longer, no more items start, and the exception is thrown here.
template <class Body>
void run_in_order(int64_t items, int64_t threads, int64_t count, const Body& body) {
  TicketLocks locks(count);
  share_items(
      items, threads,
      [&](int64_t thread, const auto& next) {
        for (int64_t item = next(); item < items; item = next()) body(item, thread, locks);
      },
      [&] { locks.release_all(); });
}

}  // namespace avppc
