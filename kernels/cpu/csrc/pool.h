// The threads of all kernels of this process: the caller, and workers that wait for its work.
//
// Machines are shared, so any thread may lose its core at any time, to another process or to a quota. Therefore
//   - work comes in pieces. Each thread has a range of them, and takes from the ranges of others when its own is done. A
//     job is finished when its pieces are, also if a worker never came to it: the caller waits only for those that have
//     joined, each in its last piece.
//   - whoever waits spins for some microseconds, then sleeps. A core that sleeps is given to a thread that waits for one,
//     and that may be the very thread waited for.
#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

namespace magicdec {

class Pool {
 public:
  using Work = void (*)(void* context, int64_t piece, int thread);

  // Calls work(context, piece, thread) for all pieces on up to `threads` threads, the caller's included. A second caller at the
  // same time computes all of its own pieces itself. Work throws no exceptions: nobody would catch those of a worker.
  void run(int threads, int64_t pieces, Work work, void* context) {
    std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
    threads = int(std::min<int64_t>(threads, pieces));
    if (only) threads = std::min(threads, 1 + start(threads - 1));
    if (!only || threads <= 1) {
      for (int64_t piece = 0; piece < pieces; piece++) work(context, piece, 0);
      return;
    }
    for (int i = 0; i < threads; i++) {
      ranges_[i].next.store(pieces * i / threads, std::memory_order_relaxed);
      ranges_[i].end = pieces * (i + 1) / threads;
    }
    job_ = {work, context, threads};
    seats_.store(1, std::memory_order_relaxed);
    const uint32_t open = (((state_.load(std::memory_order_relaxed) >> SHIFT) + 1) << SHIFT) | OPEN;
    state_.store(open);
    if (asleep_.load() > 0) futex(state_, FUTEX_WAKE_PRIVATE, threads - 1);
    compute(0);
    // Close the job: from here on no worker can join.
    if ((state_.fetch_and(~OPEN) & JOINED) == 0) return;
    const auto finished = [&] { return (state_.load() & JOINED) == 0; };
    if (spin(finished)) return;
    for (;;) {
      caller_sleeps_.store(open);
      if (finished()) break;
      futex(caller_sleeps_, FUTEX_WAIT_PRIVATE, open);
    }
    caller_sleeps_.store(0);
  }

  // Forgets the workers, which a forked process does not have. The pool they belonged to is not freed: they may have held its lock.
  static Pool& instance() {
    static std::atomic<Pool*> pool{new Pool};
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
    (void)registered;
    return *pool.load(std::memory_order_acquire);
  }

 private:
  // state_: number of the job, whether workers may still join, and how many of them have not left yet.
  static constexpr uint32_t SHIFT = 12, OPEN = 1u << 11, JOINED = OPEN - 1;
  static constexpr int MAX_THREADS = 1024;
  static constexpr int REFUSED_JOBS = 1000;  // after the system has refused a thread, jobs until it is asked again
  static constexpr std::chrono::microseconds SPIN{100};

  struct Job {
    Work work;
    void* context;
    int threads;
  };
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  // Starts workers until there are `count`. Returns how many there are, at most `count`.
  int start(int count) {
    count = std::min(count, MAX_THREADS - 1);
    if (!ranges_) ranges_ = std::make_unique<Range[]>(MAX_THREADS);
    if (workers_ < count && --jobs_until_start_ < 0) {
      jobs_until_start_ = 0;
      sigset_t others, before;
      sigfillset(&others);
      for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&others, fault);  // Python reports these
      pthread_sigmask(SIG_SETMASK, &others, &before);  // signals are for the threads of Python
      try {
        for (; workers_ < count; workers_++) std::thread(&Pool::serve, this, state_.load()).detach();
      } catch (const std::exception&) {  // no more threads or memory for the process: the threads that there are do the work
        jobs_until_start_ = REFUSED_JOBS;
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    return std::min(count, workers_);
  }

  // Computes pieces of the open job until none is left, beginning with those of this thread's range.
  void compute(int thread) {
    const Job job = job_;
    for (int i = 0; i < job.threads; i++) {
      Range& range = ranges_[(thread + i) % job.threads];
      while (range.next.load(std::memory_order_relaxed) < range.end) {
        const int64_t piece = range.next.fetch_add(1, std::memory_order_relaxed);
        if (piece < range.end) job.work(job.context, piece, thread);
      }
    }
  }

  // A worker: waits for a job, joins it unless it is closed, and leaves it. seen: state of the pool when it was started.
  [[noreturn]] void serve(uint32_t seen) {
    pthread_setname_np(pthread_self(), "magicdec-cpu");
    for (;;) {
      const auto changed = [&] { return state_.load(std::memory_order_acquire) >> SHIFT != seen >> SHIFT; };
      if (!spin(changed)) {
        asleep_.fetch_add(1);
        for (uint32_t now = state_.load(); now >> SHIFT == seen >> SHIFT; now = state_.load()) futex(state_, FUTEX_WAIT_PRIVATE, now);
        asleep_.fetch_sub(1);
      }
      seen = state_.load(std::memory_order_acquire);
      bool joined = false;
      for (uint32_t now = seen; (now & OPEN) && !joined; seen = now) joined = state_.compare_exchange_weak(now, now + 1);
      if (!joined) continue;
      const int thread = seats_.fetch_add(1, std::memory_order_relaxed);
      if (thread < job_.threads) compute(thread);
      const uint32_t left = state_.fetch_sub(1) - 1;
      // By now the caller may have gone on, and sleep in a later job, which is for the last worker of that job to end.
      uint32_t mine = left | OPEN;
      if (!(left & OPEN) && (left & JOINED) == 0 && caller_sleeps_.compare_exchange_strong(mine, 0)) futex(caller_sleeps_, FUTEX_WAKE_PRIVATE, 1);
    }
  }

  // Waits for a short time. Returns whether `done` has come true.
  template <class F>
  static bool spin(F&& done) {
    const auto end = std::chrono::steady_clock::now() + SPIN;
    do {
      for (int i = 0; i < 16; i++) {
        if (done()) return true;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    return done();
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // lasts about as long as an x86 pause; yield returns at once
#endif
  }

  static void futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
    static_assert(sizeof(word) == sizeof(uint32_t));
    syscall(SYS_futex, &word, operation, value, nullptr, nullptr, 0);
  }

  std::mutex busy_;
  std::unique_ptr<Range[]> ranges_;
  int workers_ = 0, jobs_until_start_ = 0;
  Job job_{};
  std::atomic<int> seats_{0};  // threads of the job, the caller being the first
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<uint32_t> asleep_{0};
  std::atomic<uint32_t> caller_sleeps_{0};  // the open state of the job whose end the caller sleeps for; 0: it is awake
};

}  // namespace magicdec
