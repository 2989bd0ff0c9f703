// How many threads are worth starting.
#pragma once

#include <string>

namespace pe {

// Physical cores this process may run on: distinct cores in its affinity mask, bounded by the control group's CPU quota
// (rounded up), at least 1. Where the system does not say (not Linux): std::thread::hardware_concurrency().
int usable_cores();

// The same counting hardware threads, which is how many threads can truly run at once.
int usable_cpus();

// CPUs' worth of time the process's control groups grant (v2 cpu.max, v1 cfs quota; the tightest ancestor counts), or 0
// when unlimited or unknown. root: "" for the running system; a folder with proc/ and sys/ in tests.
double cgroup_cpu_quota(const std::string& root);

}  // namespace pe
