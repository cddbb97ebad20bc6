// The threads that run one kernel together.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fused_resnet::cpu {

// What the threads of a team share: a barrier, and work that is dealt out between two passages of
// it. Every thread has a share of its own, whose data its caches are likely to hold, and takes from
// those of the others once it has none left: cores that are slower, or busy with something else, do
// not hold up the rest.
class Meeting {
 public:
  explicit Meeting(int most_threads) : left_(static_cast<size_t>(most_threads)) {}

  // Lets nobody on before all `size` threads have arrived.
  void wait(int size);

  // The next of `units` <= kMostUnits units of work for thread `rank` of `size`, or -1 when all are
  // taken: its own from the first on, those of others from the last on.
  int64_t claim(int64_t units, int rank, int size);

  static constexpr int64_t kMostUnits = (int64_t{1} << 24) - 1;

 private:
  // The units that a thread's share still holds, and which passage of the barrier dealt it out.
  struct alignas(64) Left {
    std::atomic<uint64_t> packed{~uint64_t{0}};
  };

  int64_t claim_from(int owner, bool own, int64_t units, int size);

  std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
  std::vector<Left> left_;
};

// A kernel is called by every thread of a team with the same arguments and its own `rank`.
struct Team {
  int rank = 0;
  int size = 1;
  Meeting* meeting = nullptr;  // null where size is 1

  void sync() const {
    if (size > 1) meeting->wait(size);
  }

  // Calls body(unit) for units 0 .. `units` - 1, each in one of the threads. A team's threads pass
  // sync() between two of these.
  template <class Body>
  void for_each(int64_t units, Body body) const {
    if (size == 1) {
      for (int64_t unit = 0; unit < units; ++unit) body(unit);
      return;
    }
    for (int64_t unit; (unit = meeting->claim(units, rank, size)) >= 0;) body(unit);
  }

  // Into how many units a thing of `count` parts is best divided.
  int64_t units_of(int64_t count) const {
    const int64_t units = size == 1 ? 1 : int64_t{kUnitsOfThread} * size;
    return units < count ? units : count;
  }

  // More lets the last threads wait less, and costs more at the borders of units.
  static constexpr int kUnitsOfThread = 8;
};

}  // namespace fused_resnet::cpu
