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
    stop_.store(true, std::memory_order_release);
    job_.fetch_add(kNext, std::memory_order_seq_cst);
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
  // The last job is closed and nobody is in it, so that nobody else writes here. Sequentially consistent with the
  // sleeper's own count and look: one of the two sees the other.
  job_.store((number(job_.load(std::memory_order_relaxed)) + 1) * kNext | kOpen, std::memory_order_seq_cst);
  if (num_asleep_.load(std::memory_order_seq_cst) > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }
  take_part(0);
  job_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; (job_.load(std::memory_order_acquire) & kJoined) != 0; ++spins) {
    // With more threads than free cores the one waited for may need ours.
    if (spins < kSpins) {
      pause_briefly();
    } else {
      std::this_thread::yield();
    }
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
  uint64_t seen = 0;
  const auto is_new = [&](uint64_t job) { return number(job) != seen; };
  for (;;) {
    for (int spins = 0; spins < kSpins && !is_new(job_.load(std::memory_order_acquire)); ++spins) pause_briefly();
    if (!is_new(job_.load(std::memory_order_acquire))) {
      std::unique_lock<std::mutex> lock(mutex_);
      num_asleep_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return is_new(job_.load(std::memory_order_seq_cst)); });
      num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
    const uint64_t job = job_.load(std::memory_order_acquire);
    seen = number(job);
    if (stop_.load(std::memory_order_acquire)) return;
    if (!join(job)) continue;
    take_part(worker);
    job_.fetch_sub(1, std::memory_order_release);
  }
}

// False when the job has been closed in the meantime.
bool ThreadPool::join(uint64_t job) {
  const uint64_t wanted = number(job);
  while ((job & kOpen) && number(job) == wanted)
    if (job_.compare_exchange_weak(job, job + 1, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
  return false;
}

}  // namespace ossia
