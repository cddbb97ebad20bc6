// The threads that run one kernel together.
#pragma once

#include <atomic>

namespace fused_resnet::cpu {

// Lets nobody on before all have arrived; used again and again.
class Barrier {
 public:
  void wait(int size);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
};

// A kernel is called by every thread of a team with the same arguments and its own `rank`.
struct Team {
  int rank = 0;
  int size = 1;
  Barrier* barrier = nullptr;  // null where size is 1

  void sync() const {
    if (size > 1) barrier->wait(size);
  }
};

}  // namespace fused_resnet::cpu
