// A persistent team of threads that share out numbered pieces of work.
//
// Workers spin for some tens of microseconds after a job, since the next operation of a forward pass follows at once,
// and then sleep. The calling thread is worker 0, and it waits only for workers that have joined: where other programs
// hold the cores, a worker that gets none in time is not missed. Which worker takes a piece never changes what the piece
// computes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace ossia {

class ThreadPool {
 public:
  using Task = void (*)(const void* context, int64_t item, int worker);

  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls task(context, item, worker) for every item in 0 .. num_items-1 and returns when all are done. Each worker
  // begins with a contiguous share, so that it reads memory in sequence, and then helps the others.
  void run(int64_t num_items, Task task, const void* context);

  // body(item, worker); on the calling thread alone when the work is too small to be worth waking others.
  template <class Body>
  inline __attribute__((always_inline)) void for_each(int64_t num_items, bool worth_sharing, const Body& body) {
    if (!worth_sharing || num_threads_ == 1 || num_items <= 1) {
      for (int64_t item = 0; item < num_items; ++item) body(item, 0);
      return;
    }
    run(num_items, [](const void* b, int64_t item, int worker) { (*static_cast<const Body*>(b))(item, worker); }, &body);
  }

 private:
  // On a cache line of its own: workers count on it without disturbing each other.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  // The job's number, whether it may still be joined, and how many workers have.
  static constexpr uint64_t kJoined = 0xffff, kOpen = 0x10000, kNext = 0x20000;
  static uint64_t number(uint64_t job) { return job / kNext; }

  void work(int worker);
  bool join(uint64_t job);
  void take_part(int worker);

  int num_threads_;
  std::unique_ptr<Share[]> shares_;
  Task task_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> job_{0};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace ossia
