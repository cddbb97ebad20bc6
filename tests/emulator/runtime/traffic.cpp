// How much memory a kernel moves, and how well: bytes and widths per buffer; for each warp
// instruction, the wavefronts that its shared-memory banks need or the 32-byte sectors that it
// touches, against the fewest that would do.
//
// Lanes run one after another here, so the n-th execution of an instruction by each lane of a warp,
// counted from the warp's last synchronisation, is taken as one warp instruction.
#include <algorithm>
#include <unordered_map>

#include "runtime.h"

namespace emulator {
namespace {

constexpr int kBanks = 32;
constexpr int kWordBytes = 4;
constexpr int kWavefrontBytes = kBanks * kWordBytes;
constexpr int kSectorBytes = 32;

// One instruction of the kernel.
struct Instruction {
  Traffic kind;
  uintptr_t pc;
  int bytes;  // of one lane
  uint64_t executed, cost, ideal;
};
std::vector<Instruction> instructions;
std::unordered_map<uintptr_t, int> instruction_of;  // by pc and kind

struct WarpInstruction {
  uint64_t addresses[kWarpSize];
  unsigned lanes;
};

// The executions of one instruction by one warp since its last flush.
struct Group {
  std::vector<WarpInstruction> executions;
  int count = 0;
  int next[kWarpSize] = {};
};

struct WarpTraffic {
  std::vector<Group> groups;  // by instruction
  std::vector<int> pending;
};
WarpTraffic warp_traffic[kMaxThreads / kWarpSize];

int find_instruction(Traffic kind, uintptr_t pc, size_t bytes) {
  const uintptr_t key = pc << 3 | static_cast<uintptr_t>(kind);
  // A kernel has few instructions, so most look-ups end here.
  static struct {
    uintptr_t key;
    uint64_t launch;
    int index;
  } recent[1024];
  auto& slot = recent[(key ^ key >> 12) % 1024];
  if (slot.key == key && slot.launch == execution.launch) return slot.index;
  const auto [entry, is_new] = instruction_of.try_emplace(key, instructions.size());
  if (is_new) instructions.push_back({kind, pc, static_cast<int>(bytes), 0, 0, 0});
  slot = {key, execution.launch, entry->second};
  return entry->second;
}

// Most distinct words that one bank must deliver.
class Banks {
 public:
  void add(uint64_t word) {
    const int bank = static_cast<int>(word % kBanks);
    for (int i = 0; i < count_[bank]; ++i) {
      if (words_[bank][i] == word) return;
    }
    words_[bank][count_[bank]++] = word;
    most_ = std::max(most_, count_[bank]);
  }
  int most() const { return most_; }

 private:
  uint64_t words_[kBanks][kWarpSize];
  int count_[kBanks] = {};
  int most_ = 0;
};

// Hardware serves at most 128 bytes at once: of 8-byte accesses half a warp, of 16-byte accesses a
// quarter.
void count_shared(Instruction& instruction, const WarpInstruction& warp) {
  const int bytes = instruction.bytes;
  const int lanes_at_once = bytes <= kWordBytes ? kWarpSize : kWavefrontBytes / bytes;
  ++instruction.executed;
  for (int first = 0; first < kWarpSize; first += lanes_at_once) {
    Banks banks;
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if ((warp.lanes >> lane & 1u) == 0) continue;
      const uint64_t word = warp.addresses[lane] / kWordBytes;
      for (int i = 0; i < std::max(1, bytes / kWordBytes); ++i) banks.add(word + i);
    }
    instruction.cost += banks.most();
    instruction.ideal += banks.most() > 0 ? 1 : 0;
  }
}

// A few distinct numbers. Lanes tend to come in ascending order, which needs no search.
class Distinct {
 public:
  void add(uint64_t value) {
    const bool is_new = count_ == 0 || value > largest_ ||
                        std::find(values_, values_ + count_, value) == values_ + count_;
    if (!is_new) return;
    values_[count_++] = value;
    largest_ = std::max(largest_, value);
  }
  int count() const { return count_; }

 private:
  uint64_t values_[2 * kWarpSize];
  uint64_t largest_ = 0;
  int count_ = 0;
};

void count_global(Instruction& instruction, const WarpInstruction& warp) {
  Distinct sectors, addresses;  // an aligned access lies in one sector
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((warp.lanes >> lane & 1u) == 0) continue;
    const uint64_t address = warp.addresses[lane];
    addresses.add(address);
    sectors.add(address / kSectorBytes);
  }
  ++instruction.executed;
  instruction.cost += sectors.count();
  instruction.ideal += (addresses.count() * instruction.bytes + kSectorBytes - 1) / kSectorBytes;
}

bool is_global(Traffic kind) {
  return kind == Traffic::global_load || kind == Traffic::global_store;
}

const char* traffic_name(Traffic kind) {
  constexpr const char* names[] = {"shared_load", "shared_store", "cp_async",
                                   "ldmatrix",    "global_load",  "global_store"};
  return names[static_cast<int>(kind)];
}

int width_index(size_t bytes) {
  switch (bytes) {
    case 1:
      return 0;
    case 2:
      return 1;
    case 4:
      return 2;
    case 8:
      return 3;
    case 16:
      return 4;
    default:
      return 5;
  }
}

template <class Value>
void append_numbers(std::string& json, const Value* values, int count) {
  json += "[";
  for (int i = 0; i < count; ++i) json += (i == 0 ? "" : ",") + std::to_string(values[i]);
  json += "]";
}

}  // namespace

void begin_launch_traffic() {
  instructions.clear();
  instruction_of.clear();
  for (WarpTraffic& warp : warp_traffic) {
    warp.groups.clear();
    warp.pending.clear();
  }
}

void count_lane(Traffic kind, const char* address, size_t bytes, uintptr_t pc) {
  if (bytes > 16 || (bytes & (bytes - 1)) != 0) return;  // a block copy, not an instruction
  const int index = find_instruction(kind, pc, bytes);
  WarpTraffic& warp = warp_traffic[current->number / kWarpSize];
  if (warp.groups.size() <= static_cast<size_t>(index)) warp.groups.resize(index + 1);
  Group& group = warp.groups[index];
  const int execution_index = group.next[current->lane]++;
  if (execution_index >= group.count) {
    if (group.count == 0) warp.pending.push_back(index);
    group.count = execution_index + 1;
    if (group.executions.size() < static_cast<size_t>(group.count)) group.executions.emplace_back();
    group.executions[execution_index].lanes = 0;
  }
  WarpInstruction& instruction = group.executions[execution_index];
  instruction.lanes |= 1u << current->lane;
  instruction.addresses[current->lane] =
      is_global(kind) ? reinterpret_cast<uint64_t>(address)
                      : static_cast<uint64_t>(address - shared_memory.statics);
}

void flush_traffic(const Warp& warp) {
  WarpTraffic& traffic = warp_traffic[warp.lanes[0]->number / kWarpSize];
  for (const int index : traffic.pending) {
    Group& group = traffic.groups[index];
    Instruction& instruction = instructions[index];
    for (int i = 0; i < group.count; ++i) {
      if (is_global(instruction.kind)) {
        count_global(instruction, group.executions[i]);
      } else {
        count_shared(instruction, group.executions[i]);
      }
    }
    group.count = 0;
    std::fill_n(group.next, kWarpSize, 0);
  }
  traffic.pending.clear();
}

// Each matrix is one wavefront of eight 16-byte rows, unless two rows share banks.
void count_ldmatrix(const char* const (&rows)[kWarpSize], int matrices, uintptr_t pc) {
  uint64_t cost = 0;
  for (int m = 0; m < matrices; ++m) {
    const char* seen[8];
    int conflicts[8] = {}, most = 0;
    for (int r = 0; r < 8; ++r) {
      seen[r] = rows[8 * m + r];
      bool repeated = false;
      for (int earlier = 0; earlier < r; ++earlier) repeated |= seen[earlier] == seen[r];
      if (repeated) continue;
      const auto group = (seen[r] - shared_memory.statics) / 16 % 8;
      most = std::max(most, ++conflicts[group]);
    }
    cost += most;
  }
  ++counters.ldmatrix;
  counters.ldmatrix_matrices += matrices;
  counters.ldmatrix_wavefronts += cost;
  if (!execution.checked) return;
  Instruction& instruction = instructions[find_instruction(Traffic::ldmatrix, pc, 16)];
  ++instruction.executed;
  instruction.cost += cost;
  instruction.ideal += matrices;
}

void count_bytes(Buffer& buffer, const char* address, size_t bytes, bool write) {
  if (buffer.traffic_launch != execution.launch) {
    buffer.traffic_launch = execution.launch;
    buffer.touched.assign(buffer.end - buffer.begin, 0);
    memset(buffer.bytes, 0, sizeof buffer.bytes);
    memset(buffer.accesses, 0, sizeof buffer.accesses);
  }
  buffer.bytes[write] += bytes;
  ++buffer.accesses[write][width_index(bytes)];
  uint8_t* touched = buffer.touched.data() + (address - buffer.begin);
  const uint8_t bit = write ? 2 : 1;
  for (size_t i = 0; i < bytes; ++i) touched[i] |= bit;
}

void append_traffic(std::string& json) {
  json += "\"buffers\":[";
  bool first = true;
  for (const Buffer* buffer : all_buffers()) {
    if (buffer->traffic_launch != execution.launch) continue;
    uint64_t unique[2] = {};
    for (const uint8_t touched : buffer->touched) {
      unique[0] += touched & 1;
      unique[1] += touched >> 1;
    }
    json += first ? "{" : ",{";
    first = false;
    json += "\"name\":";
    append_quoted(json, buffer->name);
    json += ",\"bytes\":";
    append_numbers(json, buffer->bytes, 2);
    json += ",\"unique_bytes\":";
    append_numbers(json, unique, 2);
    json += ",\"reads_by_width\":";
    append_numbers(json, buffer->accesses[0], 6);
    json += ",\"writes_by_width\":";
    append_numbers(json, buffer->accesses[1], 6);
    json += "}";
  }
  json += "],\"instructions\":[";
  first = true;
  for (const Instruction& instruction : instructions) {
    json += first ? "{" : ",{";
    first = false;
    json += "\"kind\":\"" + std::string(traffic_name(instruction.kind)) + "\"";
    json += ",\"pc\":" + std::to_string(instruction.pc - execution.image_begin);
    json += ",\"width\":" + std::to_string(instruction.bytes);
    json += ",\"executed\":" + std::to_string(instruction.executed);
    json += ",\"cost\":" + std::to_string(instruction.cost);
    json += ",\"ideal\":" + std::to_string(instruction.ideal) + "}";
  }
  json += "]";
}

}  // namespace emulator
