#include "pool.hpp"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace hal {
namespace {

std::atomic<hal_runner> guest{nullptr};

// Threads that wait for the next job. One job runs at a time; a caller that finds the pool busy works alone.
class Pool {
 public:
  bool run(int threads, void (*function)(void*), void* data) {
    std::unique_lock<std::mutex> turn(busy_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (started_ < threads - 1) {
          std::thread(&Pool::work, this, started_).detach();
          started_++;
        }
      } catch (const std::system_error&) {  // no more threads: those that there are do the work
      }
      function_ = function;
      data_ = data;
      helpers_ = started_ < threads - 1 ? started_ : threads - 1;
      left_ = helpers_;
      job_++;
    }
    wake_.notify_all();
    function(data);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
    return true;
  }

 private:
  void work(int number) {
    long seen = 0;
    for (;;) {
      void (*function)(void*);
      void* data;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return job_ != seen; });
        seen = job_;
        if (number >= helpers_) continue;
        function = function_;
        data = data_;
      }
      function(data);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  void (*function_)(void*) = nullptr;
  void* data_ = nullptr;
  int started_ = 0, helpers_ = 0, left_ = 0;
  long job_ = 0;
};

// Never destroyed: its threads wait on it until the process ends. A forked child has none of the threads and makes a
// pool of its own.
Pool& pool() {
  static std::mutex making;
  static Pool* made = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(making);
  if (!made || owner != getpid()) {
    made = new Pool;
    owner = getpid();
  }
  return *made;
}

}  // namespace

void set_runner(hal_runner run) { guest.store(run); }

void run_on_threads(int threads, void (*function)(void*), void* data) {
  if (threads <= 1) return function(data);
  if (hal_runner run = guest.load()) return run(function, data, (unsigned)threads, 0);
  if (!pool().run(threads, function, data)) function(data);
}

}  // namespace hal
