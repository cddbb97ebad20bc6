// A chain of ops that runs as one call: one parallel region, one arena, no allocation after the
// first call.
//
// Schedule: the leading steps depth-first, each thread with whole images of its own on memory of
// its own, so that the large activations of early stages stay in its cache; the rest step by step
// on the whole batch, all threads together, with a barrier after each step. Images that are left
// over when the batch is dealt out are computed by all threads together.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/add_relu.h"
#include "cpu/conv_kernel.h"
#include "cpu/dtype.h"
#include "cpu/pool.h"
#include "cpu/stem.h"

namespace fused_resnet::cpu {

// Where a value lies. Every value has the batch as its outermost dimension.
struct Value {
  enum class Place {
    kInput,    // the caller's tensor number `where`
    kOutput,   // the result number `where`
    kShared,   // `where` bytes from the beginning of the arena, for the whole batch
    kPrivate,  // of a leading step: where * (images computed at once) bytes from the beginning of
               // the memory of these images
  };
  Place place;
  int64_t where;
  int64_t image_bytes;  // not of inputs, whose strides tell
};

// Tensors of one call. Strides are in elements; inputs that no stem and no conversion reads are
// dense in channels_last order.
struct Input {
  const void* data;
  DType dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

class Program;

// What a step is run with, for a part of the batch.
struct StepArguments {
  const Program& program;
  const Input* inputs;
  void* const* outputs;
  std::byte* shared;
  std::byte* images;  // private memory of the images that are computed
  int64_t first, count;
  std::byte* scratch;
};

class Step {
 public:
  virtual ~Step() = default;
  virtual size_t scratch_bytes(int images, int threads) const {
    static_cast<void>(images), static_cast<void>(threads);
    return 0;
  }
  virtual void run(const StepArguments&, const Team&) const = 0;
};

struct ConvStep {
  int x, y, residual;  // values; residual is -1 where there is none
  ConvProblem problem;
  Element element;
  const ConvKernel* kernel;
  const void* weight;
  const float* scale;
  const float* shift;
};

struct StemStep {
  int x, y;
  ConvProblem problem;
  PoolWindow pool;
  Element element;
  Isa isa;
  const void* weight;
  const float* scale;
  const float* shift;
};

struct PoolStep {
  int x, y;
  Image image;
  PoolWindow window;  // of max-pooling; kernel_h is 0 where the image's mean is taken
  Element element;
  Isa isa;
};

struct AddReluStep {
  int x, residual, y;
  int64_t image_elements;
  Element element;
  Isa isa;
};

// An input as [N, H, W, C] of another element.
struct ConvertStep {
  int x, y;
  Image image;
  Element element;
};

// Memory that one call uses, aligned to a huge page where it is that large.
class Arena {
 public:
  explicit Arena(size_t bytes);
  std::byte* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  size_t bytes_;
  std::unique_ptr<std::byte, Free> data_;
};

class Program {
 public:
  // The first `leading` of the steps run depth-first, on at most `images_at_once` images; their
  // private values need `private_bytes` an image, all others `shared_bytes` for the batch.
  Program(std::vector<Value> values, int batch, int leading, int images_at_once,
          size_t private_bytes, size_t shared_bytes);

  // The steps in order; what they point to must outlive the program.
  void add(const ConvStep&);
  void add(const StemStep&);
  void add(const PoolStep&);
  void add(const AddReluStep&);
  void add(const ConvertStep&);

  size_t arena_bytes(int threads) const { return layout(threads).bytes; }

  // Runs all steps on at most `threads` threads. Any number of callers may be in here at once.
  void run(const Input* inputs, void* const* outputs, int threads) const;

  const Value& value(int id) const { return values_[static_cast<size_t>(id)]; }
  int batch() const { return batch_; }

 private:
  // How the arena is divided for a number of threads, in bytes from its beginning.
  struct Layout {
    int images;  // that a thread computes at once in the leading steps
    size_t scratch, scratch_of_thread, bytes;
  };

  Layout layout(int threads) const;
  void run_steps(size_t begin, size_t end, const StepArguments& arguments, const Team& team) const;

  const std::vector<Value> values_;
  const int batch_, leading_, images_at_once_;
  const size_t private_bytes_, shared_bytes_;
  std::vector<std::unique_ptr<Step>> steps_;

  mutable std::mutex mutex_;
  mutable std::map<int, Layout> layouts_;  // by number of threads
  // Arenas that no call uses at the moment.
  mutable std::vector<std::unique_ptr<Arena>> idle_;
};

// Bytes of the second-level data cache of one core; 1 MiB where the system does not tell.
int64_t cache_bytes();

}  // namespace fused_resnet::cpu
