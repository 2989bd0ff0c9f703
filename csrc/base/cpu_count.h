// How many threads are worth starting.
#pragma once

#include <string>
#include <vector>

namespace pe {

// What the process may run on. Where the system does not say (not Linux), std::thread::hardware_concurrency() counts as
// cores that are all alike.
struct Cpus {
  int threads = 1;      // hardware threads in the affinity mask
  int cores = 1;        // distinct physical cores among them
  int performance = 1;  // cores of the fastest kind among them; all, where they are alike
  double quota = 0;     // CPUs' worth of time the control groups grant; 0: no limit

  // A count bounded by the quota (rounded up), at least 1.
  int granted(int n) const;
};

// root: "" for the running system; a folder with proc/ and sys/ in tests. allowed: hardware threads by number, the affinity
// mask's where empty.
Cpus find_cpus(const std::string& root, std::vector<int> allowed = {});

// Physical cores of the fastest kind this process may run on, within its quota: how many threads to start by default. Slower
// cores would be waited for at every barrier.
int usable_cores();

// Hardware threads within the quota, which is how many threads can truly run at once.
int usable_cpus();

// CPUs' worth of time the process's control groups grant (v2 cpu.max, v1 cfs quota; the tightest ancestor counts), or 0
// when unlimited or unknown.
double cgroup_cpu_quota(const std::string& root);

}  // namespace pe
