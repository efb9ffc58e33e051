#include "thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ossia {
namespace {

// A pause lasts 10 to 40 ns: workers stay awake for 40 to 150 microseconds.
constexpr int kSpins = 4000;

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads), shares_(new Share[num_threads_]) {
  for (int worker = 1; worker < num_threads_; ++worker) threads_.emplace_back([this, worker] { work(worker); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    job_.fetch_add(1, std::memory_order_seq_cst);
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(int64_t num_items, Task task, const void* context) {
  for (int i = 0; i < num_threads_; ++i) {
    shares_[i].next.store(num_items * i / num_threads_, std::memory_order_relaxed);
    shares_[i].end = num_items * (i + 1) / num_threads_;
  }
  task_ = task;
  context_ = context;
  num_busy_.store(num_threads_ - 1, std::memory_order_relaxed);
  // Sequentially consistent with the sleeper's own count and look: one of the two sees the other.
  job_.fetch_add(1, std::memory_order_seq_cst);
  if (num_asleep_.load(std::memory_order_seq_cst) > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  take_part(0);
  for (int spins = 0; num_busy_.load(std::memory_order_acquire) != 0; ++spins) {
    // With more threads than free cores the one waited for may need ours.
    if (spins < kSpins) pause_briefly(); else std::this_thread::yield();
  }
}

void ThreadPool::take_part(int worker) {
  for (int i = 0; i < num_threads_; ++i) {
    Share& share = shares_[(worker + i) % num_threads_];
    for (;;) {
      const int64_t item = share.next.fetch_add(1, std::memory_order_relaxed);
      if (item >= share.end) break;
      task_(context_, item, worker);
    }
  }
}

void ThreadPool::work(int worker) {
  uint64_t done = 0;
  for (;;) {
    for (int spins = 0; spins < kSpins && job_.load(std::memory_order_acquire) == done; ++spins) pause_briefly();
    if (job_.load(std::memory_order_acquire) == done) {
      std::unique_lock<std::mutex> lock(mutex_);
      num_asleep_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return job_.load(std::memory_order_seq_cst) != done; });
      num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
    // Jobs never overlap, so a worker can miss none: run() waits for all of them.
    done = job_.load(std::memory_order_acquire);
    if (stop_) return;
    take_part(worker);
    num_busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace ossia
