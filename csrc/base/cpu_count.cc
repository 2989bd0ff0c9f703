#include "base/cpu_count.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

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

#endif

std::string first_line(const std::string& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return line;
}

// Adds the numbers of a list such as "0-3,8,10-11"; what is no such list adds nothing.
void add_listed(const std::string& list, std::set<int>* out) {
  constexpr int kMost = 1 << 20;
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');) {
    int first = 0, last = 0;
    const int read = std::sscanf(part.c_str(), "%d-%d", &first, &last);
    if (read < 1) continue;
    if (read == 1) last = first;
    for (int i = std::max(first, 0); i <= std::min(last, kMost); ++i) out->insert(i);
  }
}

// A number that says how fast a CPU is beside the others: what the system knows best about kinds of cores comes first. 0 where
// it says nothing.
class Speeds {
 public:
  explicit Speeds(const std::string& root) : root_(root) {
    add_listed(first_line(root + "/sys/devices/cpu_core/cpus"), &fast_);  // x86 with two kinds of cores
  }

  // In one of three units, the same for all; one per CPU.
  std::vector<double> of(const std::vector<int>& cpus) const {
    std::vector<double> speed;
    if (!fast_.empty()) {
      for (const int cpu : cpus) speed.push_back(fast_.count(cpu) ? 2 : 1);
      return speed;
    }
    for (const char* name : {"/cpu_capacity", "/cpufreq/cpuinfo_max_freq"}) {
      speed.clear();
      for (const int cpu : cpus) speed.push_back(std::strtod(first_line(folder(root_, cpu) + name).c_str(), nullptr));
      if (std::all_of(speed.begin(), speed.end(), [](double v) { return v > 0; })) return speed;
    }
    return std::vector<double>(cpus.size(), 0.0);
  }

  static std::string folder(const std::string& root, int cpu) {
    return root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
  }

 private:
  std::string root_;
  std::set<int> fast_;
};

// Cores of one kind differ by less (a few may clock higher than the rest), kinds by more.
constexpr double kSameKind = 0.75;

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

int Cpus::granted(int n) const {
  if (quota > 0 && quota < n) n = static_cast<int>(std::ceil(quota));
  return std::max(n, 1);
}

Cpus find_cpus(const std::string& root, std::vector<int> cpus) {
  Cpus out;
  out.quota = cgroup_cpu_quota(root);
#ifdef __linux__
  if (cpus.empty()) cpus = allowed_cpus();
#endif
  if (cpus.empty()) {
    out.threads = out.cores = out.performance = hardware_threads();
    return out;
  }
  const std::vector<double> speeds = Speeds(root).of(cpus);
  const double fastest = *std::max_element(speeds.begin(), speeds.end());
  std::set<std::string> cores, performance;  // named by the list of hardware threads that share one
  for (size_t i = 0; i < cpus.size(); ++i) {
    const std::string topology = Speeds::folder(root, cpus[i]) + "/topology/";
    std::string siblings = first_line(topology + "core_cpus_list");
    if (siblings.empty()) siblings = first_line(topology + "thread_siblings_list");
    if (siblings.empty()) siblings = std::to_string(cpus[i]);
    cores.insert(siblings);
    if (speeds[i] >= kSameKind * fastest) performance.insert(siblings);
  }
  out.threads = static_cast<int>(cpus.size());
  out.cores = static_cast<int>(cores.size());
  out.performance = static_cast<int>(performance.size());
  return out;
}

int usable_cpus() {
  const Cpus cpus = find_cpus("");
  return cpus.granted(cpus.threads);
}

int usable_cores() {
  const Cpus cpus = find_cpus("");
  return cpus.granted(cpus.performance);
}

}  // namespace pe
