#include "base/cpu_count.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace pe {
namespace {

int hardware_threads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

#ifdef __linux__

// Numbers of the hardware threads in the affinity mask; empty when the system does not say.
std::vector<int> allowed_cpus() {
  for (size_t limit = 1024; limit <= (size_t{1} << 20); limit *= 4) {  // grows until the kernel's mask fits
    std::vector<cpu_set_t> mask(limit / (8 * sizeof(cpu_set_t)));
    const size_t bytes = mask.size() * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, mask.data()) != 0) continue;
    std::vector<int> cpus;
    for (size_t i = 0; i < limit; ++i) {
      if (CPU_ISSET_S(i, bytes, mask.data())) cpus.push_back(static_cast<int>(i));
    }
    return cpus;
  }
  return {};
}

int allowed_cores(const std::vector<int>& cpus) {
  std::set<std::string> cores;  // named by the list of hardware threads that share one
  for (const int cpu : cpus) {
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    std::string siblings;
    for (const char* name : {"core_cpus_list", "thread_siblings_list"}) {
      std::ifstream file(topology + name);
      if (std::getline(file, siblings) && !siblings.empty()) break;
    }
    cores.insert(siblings.empty() ? "cpu" + std::to_string(cpu) : siblings);
  }
  return static_cast<int>(cores.size());
}

#endif

int within_quota(int n) {
  const double quota = cgroup_cpu_quota("");
  if (quota > 0 && quota < n) n = static_cast<int>(std::ceil(quota));
  return std::max(n, 1);
}

// CPUs granted by one group's folder, 0 when it sets no limit.
double quota_v2(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");  // "max 100000" or "150000 100000", microseconds
  double quota = 0, period = 0;
  return file >> quota >> period && quota > 0 && period > 0 ? quota / period : 0;
}

double quota_v1(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  double quota = 0, period = 0;  // quota -1: no limit
  return quota_file >> quota && period_file >> period && quota > 0 && period > 0 ? quota / period : 0;
}

bool names_cpu(const std::string& controllers) {
  std::istringstream list(controllers);
  for (std::string name; std::getline(list, name, ',');) {
    if (name == "cpu") return true;
  }
  return false;
}

}  // namespace

double cgroup_cpu_quota(const std::string& root) {
  double tightest = 0;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1)
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !names_cpu(controllers)) continue;
    const std::string mount = root + "/sys/fs/cgroup" + (controllers.empty() ? "" : "/cpu");
    // The group and its ancestors. Inside a container the path may not exist below the mount; its root then does.
    for (std::string path = line.substr(second + 1);; path.erase(path.rfind('/'))) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      const double quota = controllers.empty() ? quota_v2(mount + path) : quota_v1(mount + path);
      if (quota > 0 && (tightest == 0 || quota < tightest)) tightest = quota;
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  return tightest;
}

int usable_cpus() {
#ifdef __linux__
  const std::vector<int> cpus = allowed_cpus();
  if (!cpus.empty()) return within_quota(static_cast<int>(cpus.size()));
#endif
  return within_quota(hardware_threads());
}

int usable_cores() {
#ifdef __linux__
  const std::vector<int> cpus = allowed_cpus();
  if (!cpus.empty()) return within_quota(allowed_cores(cpus));
#endif
  return within_quota(hardware_threads());
}

}  // namespace pe
