// Runs jobs of random sizes on the thread pool of the CPU kernels.
//
//     g++ -std=gnu++17 -O1 -pthread -fsanitize=thread -Ikernels/cpu/csrc tests/support/pool_harness.cpp
//     ./a.out jobs COUNT | fork | starved
//
// jobs: two threads call at once. fork: forked children call, while a thread of the parent does. starved: the system
// refuses to start threads. Pieces write to plain memory, so that a sanitizer sees two of them that meet.
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "pool.h"

using magicdec::Pool;

namespace {

constexpr int MAX_THREADS = 9;

struct Job {
  std::vector<int> runs;       // of each piece
  int busy[MAX_THREADS] = {};  // pieces that a thread is at
  int threads;
  unsigned delays;
};

std::atomic<int64_t> helped{0};  // pieces that workers have run

void fail(const char* what) {
  std::printf("%s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

void wait_for(unsigned microseconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
  while (std::chrono::steady_clock::now() < end) {
  }
}

void work(void* context, int64_t piece, int thread) {
  auto& job = *static_cast<Job*>(context);
  if (thread < 0 || thread >= std::max(1, job.threads)) fail("a thread's number is too large");
  if (job.busy[thread]++) fail("two threads have one number");
  job.runs[piece]++;
  if (thread > 0) helped.fetch_add(1, std::memory_order_relaxed);
  const unsigned delay = unsigned(piece) * 2654435761u ^ job.delays;
  if (delay % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(delay / 64 % 300));
  if (delay % 16 == 1) wait_for(delay / 16 % 30);
  job.busy[thread]--;
}

void run_jobs(int count, unsigned seed, int min_threads = 0) {
  std::minstd_rand random(seed);
  const auto below = [&](int n) { return int(random() % n); };
  for (int i = 0; i < count; i++) {
    Job job;
    job.threads = min_threads + below(MAX_THREADS - min_threads), job.delays = random();
    job.runs.resize(below(8) ? below(12) : below(300));
    Pool::instance().run(job.threads, int64_t(job.runs.size()), work, &job);
    for (int runs : job.runs)
      if (runs != 1) fail("a piece did not run once");
    if (below(4) == 0) wait_for(below(40));
    if (below(16) == 0) std::this_thread::sleep_for(std::chrono::microseconds(below(400)));  // workers fall asleep
  }
}

void fork_children() {
  std::atomic<bool> done{false};
  run_jobs(20, 1, 2);
  std::thread beside([&] {
    for (unsigned seed = 100; !done; seed++) run_jobs(5, seed, 2);
  });
  for (unsigned child = 0; child < 20; child++) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(20);  // a lost wake-up would be waited for
      run_jobs(50, child, 2);
      std::_Exit(0);
    }
    int status = 0;
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0) fail("a forked child failed");
  }
  done = true;
  beside.join();
}

void starve() {
  run_jobs(1, 0);
  long pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  const rlim_t bytes = rlim_t(pages) * rlim_t(sysconf(_SC_PAGESIZE)) + (1 << 20);  // no room for the stack of a thread
  const rlimit limit{bytes, bytes};
  if (setrlimit(RLIMIT_AS, &limit) != 0) fail("no limit can be set");
  std::thread* started = nullptr;
  try {
    started = new std::thread([] {});
  } catch (const std::exception&) {
  }
  if (started) fail("the system has started a thread");
  sigset_t before, after;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  run_jobs(2000, 1, 4);
  pthread_sigmask(SIG_SETMASK, nullptr, &after);
  for (int signal = 1; signal < 32; signal++)
    if (sigismember(&before, signal) != sigismember(&after, signal)) fail("signals remain blocked");
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "jobs";
  if (mode == "jobs") {
    const int jobs = count > 2 ? std::atoi(arguments[2]) : 3000;
    std::thread other(run_jobs, jobs, 1, 0);
    run_jobs(jobs, 2);
    other.join();
    if (helped == 0) fail("no worker has run a piece");
  } else if (mode == "fork") {
    fork_children();
  } else {
    starve();
  }
  std::printf("%s: done\n", mode.c_str());
}
