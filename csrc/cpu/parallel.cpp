#include "cpu/parallel.h"

#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <thread>
#endif

namespace fused_resnet::cpu {

#if defined(_OPENMP)

namespace {

std::atomic<bool> in_forked_child{false};

[[maybe_unused]] const int kAtFork =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });

void run_region(int threads, const std::function<void(const Team&)>& body) {
  Meeting meeting(threads);
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
}

}  // namespace

void run_team(int threads, const std::function<void(const Team&)>& body) {
  if (threads <= 1 || omp_in_parallel() != 0) return body(Team{});
  if (!in_forked_child.load(std::memory_order_relaxed)) return run_region(threads, body);
  // A thread that OpenMP has not seen yet gets a pool of its own, which ends with it.
  std::thread(run_region, threads, std::cref(body)).join();
}

#else

void run_team(int, const std::function<void(const Team&)>& body) { body(Team{}); }

#endif

}  // namespace fused_resnet::cpu
