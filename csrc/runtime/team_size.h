// How many threads share steps that are alike (decoding): fewer than there are, where that is quicker. It is where a model is
// so small that threads wait for each other longer than they work, and where other programs take the cores: a step then waits
// for the thread that is not running just now. Found out by trying, in steps that had to be done anyway; no result depends on
// it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pe {

class TeamSize {
 public:
  explicit TeamSize(int most) : most_(most), size_(most) {}

  // Of the next step's team: 1 .. most.
  int next() const { return trial_ ? trial_ : size_; }

  // A step by next() threads that ended at `now` took `ns`, of which its threads together spent `waited` at barriers.
  void record(int64_t now, int64_t ns, int64_t waited) {
    if (steps_ == 0) ns_ = waited_ = 0;
    ++steps_;
    ns_ += ns;
    waited_ += waited;
    if (steps_ < kSteps || (ns_ < kWindow && steps_ < kMaxSteps)) return;
    const double each = static_cast<double>(ns_) / steps_;
    const double lost = static_cast<double>(waited_) / (static_cast<double>(ns_) * next());
    steps_ = 0;
    if (trial_) {
      judge(now, each);
    } else {
      each_ = each;
      consider(now, lost);
    }
  }

 private:
  // A window: so many steps, and so long unless they are very short.
  static constexpr int kSteps = 4, kMaxSteps = 16;
  static constexpr int64_t kWindow = 1'000'000;
  // Fewer threads are tried where those there are lose so much of their time: less cannot pay.
  static constexpr double kLost = 0.25;
  // What a trial must gain. More threads are the rule, so they need to gain less.
  static constexpr double kFewer = 0.92, kMore = 0.97;
  // How long after a trial that gained nothing the next one follows: each time twice as long, and at least sixteen times as
  // long as the trial took.
  static constexpr int64_t kPause = 20'000'000, kLongestPause = 4'000'000'000;

  void consider(int64_t now, double lost) {
    if (size_ < most_ && now >= more_.due) {
      trial_ = size_ + 1;
    } else if (size_ > 1 && lost > kLost && now >= fewer_.due) {
      trial_ = size_ - std::max(1, size_ / 4);
    }
  }

  void judge(int64_t now, double each) {
    const bool more = trial_ > size_;
    if (each < each_ * (more ? kMore : kFewer)) {
      size_ = trial_;
      each_ = each;
      fewer_ = {now, 0};
      more_ = {now, 0};
      // Not straight back, but soon: what made the difference may have been a moment's.
      (more ? fewer_ : more_).due = now + static_cast<int64_t>(each) * kSteps * 4;
    } else {
      (more ? more_ : fewer_).put_off(now, each);
    }
    trial_ = 0;
  }

  struct Turn {
    int64_t due = 0;
    int64_t pause = 0;

    void put_off(int64_t now, double each) {
      const auto least = std::max(kPause, static_cast<int64_t>(each) * kSteps * 16);
      pause = std::clamp(2 * pause, least, std::max(least, kLongestPause));
      due = now + pause;
    }
  };

  int most_, size_;
  int trial_ = 0;    // size being tried, 0: none
  double each_ = 0;  // ns of a step of the window before
  int steps_ = 0;    // of the window so far
  int64_t ns_ = 0, waited_ = 0;
  Turn fewer_, more_;
};

}  // namespace pe
