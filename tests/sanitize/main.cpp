// Runs every native kernel of the CPU over random problems, without torch, for AddressSanitizer and
// UndefinedBehaviorSanitizer: `make sanitize`. Each tensor is an allocation of its own, so that a
// read or write beside it is reported. Results are compared with sums in double.
//
//   kernels [problems per kernel] [seed]

#include <cstdio>
#include <cstdlib>

#include "arrays.h"
#include "suites.h"

int main(int argc, char** argv) {
  using namespace fused_resnet;
  const int problems = argc > 1 ? std::atoi(argv[1]) : 40;
  sanitize::random_bits.seed(argc > 2 ? std::atoi(argv[2]) : 0);
  int wrong = 0;
  for (cpu::Isa isa : cpu::available_isas()) {
    for (auto* run : {sanitize::run_convs, sanitize::run_stems, sanitize::run_pools,
                      sanitize::run_elementwise, sanitize::run_programs}) {
      wrong += run(isa, problems);
    }
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
