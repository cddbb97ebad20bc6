// One parallel region: the threads of a team, all at once.
#pragma once

#include <functional>

#include "cpu/team.h"

namespace fused_resnet::cpu {

// Calls body(team) on `threads` threads that run at the same time, of which the caller is one, and
// returns when all have. Where OpenMP grants fewer (inside of another region), or the extension is
// built without it, the team is smaller. The body must not throw: its team would wait forever.
//
// The threads are those of torch, since the process holds one OpenMP. In a forked child they are
// new: those of the parent exist no more, and OpenMP would wait for them.
void run_team(int threads, const std::function<void(const Team&)>& body);

}  // namespace fused_resnet::cpu
