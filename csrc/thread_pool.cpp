#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace {

// Long enough to bridge the gap between the phases of one call, short enough not to be in the way of another pool.
constexpr std::chrono::microseconds spin_time(40);
constexpr int most_threads = 1024;
// Longer than a thread that is spinning or sleeping takes to come, shorter than the turn of another program.
constexpr std::chrono::microseconds patience(300);
// For so long nobody asks for it again.
constexpr std::chrono::milliseconds without_team(200);
using Clock = std::chrono::steady_clock;

// How many forks lie between the process that loaded this and the one that runs it. A process's number would not do: in
// another namespace a child may have its parent's, and long after its grandparent's end that one's.
std::atomic<int> forks{0};
#if !defined(_WIN32)
[[maybe_unused]] const int counted = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
#endif

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Rounding mode and treatment of denormal numbers: per thread, and part of what makes a result.
uint64_t float_mode() {
#if defined(__x86_64__) || defined(_M_X64)
  return _mm_getcsr() & ~uint64_t(0x3f);  // without the sticky exception flags
#elif defined(__aarch64__) && !defined(_MSC_VER)
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

void set_float_mode(uint64_t mode) {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_setcsr(uint32_t(mode));
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#else
  (void)mode;
#endif
}

// Spins until `done()` or the time is over; whether it is done.
template <class Done>
bool spin_until(Done done) {
  const auto stop = Clock::now() + spin_time;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < stop);
  return done();
}

// How compilers start a team of OpenMP threads: each runs part(data), the caller among them.
using StartTeam = void (*)(void (*part)(void*), void* data, unsigned threads, unsigned flags);

// That of the OpenMP threads which torch keeps, or NULL: where they are, threads of our own would take turns with theirs,
// which spin for milliseconds after each of torch's operators. Not after fork(), which leaves a child without them.
StartTeam torchs_team() {
#if defined(__linux__)
  if (forks.load()) return nullptr;
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!torch) return nullptr;
  void* const start = dlsym(torch, "GOMP_parallel");  // also found in what libtorch_cpu.so was linked to
  dlclose(torch);
  return reinterpret_cast<StartTeam>(start);
#else
  return nullptr;
#endif
}

struct Job {
  void (*task)(void*, int64_t, int) = nullptr;
  void* data = nullptr;
  int64_t num_tasks = 0;
  uint64_t mode = 0;
};

thread_local bool inside_a_task = false;

// Says so for as long as it lives, also within another one.
struct InsideATask {
  const bool before = inside_a_task;
  InsideATask() { inside_a_task = true; }
  ~InsideATask() { inside_a_task = before; }
};

class Pool {
 public:
  Pool() : start_team_(torchs_team()) {}

  void run(const Job& job, int threads) {
    if (start_team_ && Clock::now() >= no_team_before_) {
      run_with_team(job, threads);
    } else {
      run_with_own_threads(job, threads);
    }
  }

  const int born_after = forks.load();  // so many forks
  std::mutex busy;

 private:
  // `threads` may exceed the number of tasks: a team that keeps its size keeps its threads.
  //
  // A team ends when all its members have come, even those who find nothing left to do. Where other programs keep one of
  // them from running, each call would wait for its turn; own threads, which need not come, are then the better ones.
  void run_with_team(const Job& job, int threads) {
    job_ = job;
    caller_ = std::this_thread::get_id();
    absent_since_ = Clock::time_point::max();
    members_ = threads;
    next_.store(0, std::memory_order_relaxed);
    present_.store(0, std::memory_order_relaxed);
    const auto member = [](void* data) {
      Pool& pool = *static_cast<Pool*>(data);
      const int worker = pool.present_.fetch_add(1, std::memory_order_relaxed);
      const uint64_t before = float_mode();
      set_float_mode(pool.job_.mode);
      pool.work(pool.job_, worker);
      set_float_mode(before);
      if (pool.caller_ == std::this_thread::get_id() && pool.present_.load(std::memory_order_relaxed) < pool.members_) {
        pool.absent_since_ = Clock::now();
      }
    };
    start_team_(member, this, unsigned(threads), 0);
    if (absent_since_ == Clock::time_point::max()) return;
    const Clock::time_point now = Clock::now();
    if (now - absent_since_ > patience) no_team_before_ = now + without_team;
  }

  void run_with_own_threads(const Job& job, int threads) {
    if (threads > job.num_tasks) threads = int(job.num_tasks);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      job_ = job;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = threads - 1;
      joined_ = 0;
      epoch_.fetch_add(1, std::memory_order_release);
      if (sleeping_) wake_.notify_all();
    }
    work(job, 0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ = 0;  // who has not joined by now is not needed, and must not touch `job` any more
    }
    const auto idle = [this] { return running_.load(std::memory_order_acquire) == 0; };
    if (spin_until(idle)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, idle);
  }

  // Called with the mutex held. With fewer threads than asked for, these do all the work.
  void grow(int workers) {
    try {
      for (; workers_ < workers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      const auto called = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
      const bool awake = spin_until(called);
      std::unique_lock<std::mutex> lock(mutex_);
      if (!awake) {
        ++sleeping_;
        wake_.wait(lock, called);
        --sleeping_;
      }
      seen = epoch_.load(std::memory_order_relaxed);
      if (!wanted_) continue;
      --wanted_;
      running_.fetch_add(1, std::memory_order_relaxed);
      const int worker = ++joined_;
      const Job job = job_;
      lock.unlock();
      set_float_mode(job.mode);
      work(job, worker);
      lock.lock();
      if (running_.fetch_sub(1, std::memory_order_release) == 1) finished_.notify_one();
    }
  }

  void work(const Job& job, int worker) {
    const InsideATask inside;
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= job.num_tasks) break;
      job.task(job.data, index, worker);
    }
  }

  const StartTeam start_team_;
  Clock::time_point absent_since_, no_team_before_{};  // of the team, as are these three
  std::thread::id caller_;
  int members_ = 0;
  std::atomic<int> present_{0};
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  Job job_;                           // guarded by mutex_, as are the plain numbers below
  int workers_ = 0, sleeping_ = 0, wanted_ = 0, joined_ = 0;
  std::atomic<int> running_{0};
  std::atomic<uint64_t> epoch_{0};
  std::atomic<int64_t> next_{0};
};

// This process's pool. It is never destroyed: its threads live as long as the process. After fork() only the calling
// thread lives on in the child, and the parent's pool may have been copied in the middle of anything.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  while (!found || found->born_after != forks.load()) {
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

extern "C" void moesaic_parallel(int threads, int64_t num_tasks, void (*task)(void*, int64_t, int), void* data) {
  if (threads > most_threads) threads = most_threads;
  if (threads > 1 && num_tasks > 1 && !inside_a_task) {
    Pool& shared = pool();
    std::unique_lock<std::mutex> alone(shared.busy, std::try_to_lock);
    if (alone.owns_lock()) {
      shared.run(Job{task, data, num_tasks, float_mode()}, threads);
      return;
    }
  }
  const InsideATask inside;
  for (int64_t i = 0; i < num_tasks; ++i) task(data, i, 0);
}
