"""Work that the threads of a team share (csrc/cpu/team.h), by a small program of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from fused_resnet import _build
from fused_resnet.backends.cpu import native_conv
from tests.helpers import conv_problem, draw

ROOT = Path(__file__).parents[1]

DRIVER = r"""
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/team.h"

using fused_resnet::cpu::Meeting;
using fused_resnet::cpu::Team;

// threads slow units...: as many rounds as there are numbers of units; thread 0 takes `slow` ms for
// each of its units. Prints by round which thread did each unit, -1 for none, -2 for several.
int main(int argc, char** argv) {
  const int threads = std::atoi(argv[1]), slow = std::atoi(argv[2]), rounds = argc - 3;
  std::vector<std::vector<std::atomic<int>>> done;
  for (int round = 0; round < rounds; ++round) {
    done.emplace_back(std::atoi(argv[3 + round]));
    for (auto& unit : done.back()) unit = -1;
  }
  Meeting meeting(threads);
  std::vector<std::thread> pool;
  for (int rank = 0; rank < threads; ++rank) {
    pool.emplace_back([&, rank] {
      const Team team{rank, threads, threads > 1 ? &meeting : nullptr};
      for (auto& round : done) {
        team.for_each(static_cast<int64_t>(round.size()), [&](int64_t unit) {
          if (rank == 0 && slow) std::this_thread::sleep_for(std::chrono::milliseconds(slow));
          int nobody = -1;
          if (!round[unit].compare_exchange_strong(nobody, rank)) round[unit] = -2;
        });
        team.sync();
      }
    });
  }
  for (auto& thread : pool) thread.join();
  for (auto& round : done) {
    for (auto& unit : round) std::printf("%d ", unit.load());
    std::printf("\n");
  }
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("team")
    (folder / "driver.cpp").write_text(DRIVER)
    command = ["c++", "-std=c++20", "-O2", "-pthread", f"-I{ROOT / 'csrc'}"]
    sources = [str(folder / "driver.cpp"), str(ROOT / "csrc/cpu/team.cpp")]
    subprocess.run([*command, *sources, "-o", str(folder / "driver")], check=True)
    return folder / "driver"


def run(driver: Path, threads: int, slow: int, units: list[int]) -> list[list[int]]:
    command = [str(driver), str(threads), str(slow), *map(str, units)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [[int(rank) for rank in line.split()] for line in printed.splitlines()]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_unit_is_done_once(driver: Path, threads: int) -> None:
    units = [0, 1, 2, 3, 5, 64, 1000, 1, 0, 17] * 200
    for count, ranks in zip(units, run(driver, threads, 0, units), strict=True):
        assert len(ranks) == count
        assert all(0 <= rank < threads for rank in ranks), ranks


def test_a_slow_thread_holds_up_nobody(driver: Path) -> None:
    """The others take its share, from the end: what it does is the beginning of it."""
    for ranks in run(driver, 2, 20, [40, 40, 40]):
        own = [unit for unit, rank in enumerate(ranks) if rank == 0]
        assert own == list(range(len(own)))
        assert len(own) < 20
        assert set(ranks[len(own) :]) == {1}


@pytest.mark.skipif(_build.extension is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_computes_what_does_not_change_a_bit(dtype: torch.dtype) -> None:
    """More threads than cores: they take each other's units, other ones each time."""
    assert _build.extension is not None
    isa = _build.extension.isa()
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        for name in _build.extension.cpu_conv_kernels(isa):
            for size, channels in ((30, 32), (7, 192)):
                p = conv_problem(
                    1, channels, size, size, channels, padding=(1, 1), epilogue="add_relu",
                    dtype=dtype,
                )  # fmt: skip
                conv = native_conv(name, isa, p)
                if conv.why_not:
                    continue
                args = draw(p, 0)
                weight = conv.pack(args.weight)
                run = lambda: conv.run(args.x, weight, args.scale, args.shift, args.residual)  # noqa: B023, E731
                first = run()
                for _ in range(10):
                    assert torch.equal(run(), first), name
    finally:
        torch.set_num_threads(before)
