// Checks that sessions take over each other's beginnings without a trace: logits equal a cold session's bit for bit.
//
//   prefix_check MODEL...    for each cache type, and with a hash that is the same for every block
// Prints a summary; exit status 1 on failure. Meant to run under -fsanitize=thread as well.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "model/model.h"
#include "model/session.h"
#include "runtime/prefix_cache.h"

namespace {

using namespace pe;
using Tokens = std::vector<int32_t>;
using Logits = std::vector<float>;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

constexpr size_t kContext = 320;
long checks = 0, failures = 0;

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

uint64_t always_the_same(uint64_t, const int32_t*) { return 7; }

SessionOptions options(Kv kv, size_t threads = 1) {
  SessionOptions o;
  o.n_ctx = kContext;
  o.n_threads = threads;
  o.kv = kv;
  return o;
}

Logits after(Session& session, const Tokens& text, size_t held) {
  Logits logits(session.model().config().n_vocab);
  session.eval(text.data() + held, text.size() - held, Want::kLast, logits.data());
  return logits;
}

bool same(const Logits& a, const Logits& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

size_t common(const Tokens& a, const Tokens& b) {
  const size_t n = std::min(a.size(), b.size());
  return static_cast<size_t>(std::mismatch(a.begin(), a.begin() + static_cast<ptrdiff_t>(n), b.begin()).first -
                             a.begin());
}

// Texts that begin as earlier ones do, for a while; sessions come, go on to other texts, and go.
void check_random_texts(const std::shared_ptr<const Model>& model, Kv kv, PrefixCache::Hash hash, size_t blocks) {
  std::mt19937 random(static_cast<unsigned>(blocks) + static_cast<unsigned>(kv));
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const size_t block_bytes = KvCache::bytes({model->config().n_layers, model->config().n_kv_heads, PrefixCache::kBlock,
                                             model->config().head_dim_k, model->config().head_dim_v, kv});
  const auto prefixes = std::make_shared<PrefixCache>(blocks * block_bytes, hash);
  std::vector<Tokens> texts;
  std::list<Session> living;
  size_t taken_over = 0;
  for (int step = 0; step < 25; ++step) {
    Tokens text;
    if (!texts.empty() && below(5)) {
      const Tokens& old = texts[below(texts.size())];
      text.assign(old.begin(), old.begin() + static_cast<ptrdiff_t>(1 + below(old.size())));
    }
    while (text.size() < kContext && (text.empty() || below(250))) text.push_back(static_cast<int32_t>(3 + below(200)));
    texts.push_back(text);

    if (living.size() < 3 && below(2)) living.emplace_back(model, options(kv, 1 + below(2)), prefixes);
    if (living.empty()) continue;
    auto which = std::next(living.begin(), static_cast<ptrdiff_t>(below(living.size())));
    size_t at_least = 0;  // what living sessions hold is known to the token
    for (const Session& other : living) at_least = std::max(at_least, common(other.tokens(), text));
    const size_t own = std::min(common(which->tokens(), text), text.size() - 1);
    const size_t held = which->reuse(text.data(), text.size());
    check(held >= std::min(at_least, text.size() - 1) && held < text.size(),
          "what a living session holds is taken over");
    check(std::equal(which->tokens().begin(), which->tokens().end(), text.begin()) && which->tokens().size() == held,
          "the session holds a beginning of the text");
    taken_over += held - own;
    Session cold(model, options(kv));
    check(same(after(*which, text, held), after(cold, text, 0)),
          "logits equal a cold session's, step " + std::to_string(step));
    check(prefixes->bytes() <= blocks * block_bytes, "the memory is bounded");
    if (!below(4)) living.erase(which);
  }
  check(taken_over > 100, "something was taken over at all: " + std::to_string(taken_over));
}

// What a closed session held serves a later one in whole blocks, unless other uses of the memory were later.
void check_closed_sessions(const std::shared_ptr<const Model>& model, Kv kv, PrefixCache::Hash hash) {
  const auto text_of = [](int32_t first) {
    Tokens text(4 * PrefixCache::kBlock + 9);
    for (size_t i = 0; i < text.size(); ++i) text[i] = 3 + static_cast<int32_t>((i * i + 7 * i + 1) % 190);
    text[0] = first;
    return text;
  };
  const Tokens a = text_of(5), b = text_of(6);
  const auto run = [&](const std::shared_ptr<PrefixCache>& prefixes, const Tokens& text) {
    Session session(model, options(kv), prefixes);
    const size_t held = session.reuse(text.data(), text.size());
    after(session, text, held);
    return held;
  };
  size_t bytes;
  {
    const auto large = std::make_shared<PrefixCache>(size_t{1} << 30, hash);
    check(run(large, a) == 0, "nothing is known at first");
    bytes = large->bytes();
    check(run(large, a) == 4 * PrefixCache::kBlock, "whole blocks are known of a closed session");
    check(large->bytes() == bytes, "what is kept already is not kept twice");
    check(run(large, b) == 0, "the same tokens after another first one are another text");
    check(run(large, a) == 4 * PrefixCache::kBlock && run(large, b) == 4 * PrefixCache::kBlock, "both texts are known");
    check(large->bytes() == 2 * bytes, "and kept side by side");
    const auto other_type = static_cast<Kv>((static_cast<int>(kv) + 1) % 2);
    Session session(model, options(other_type), large);
    check(session.reuse(a.data(), a.size()) == 0, "another cache type takes nothing over");
  }
  const auto small = std::make_shared<PrefixCache>(bytes, hash);
  run(small, a);
  run(small, b);
  check(run(small, b) == 4 * PrefixCache::kBlock, "the text used last is kept");
  check(small->bytes() <= bytes, "within the memory allowed");
  const auto tiny = std::make_shared<PrefixCache>(bytes / 2, hash);
  run(tiny, a);
  check(run(tiny, a) == 2 * PrefixCache::kBlock, "as much of the beginning as there is room for");
}

// One session writes, rolls back and goes on to other texts while another takes over its beginnings.
void check_threads(const std::shared_ptr<const Model>& model, Kv kv) {
  const auto prefixes = std::make_shared<PrefixCache>(size_t{1} << 22);
  std::vector<Tokens> texts;
  std::vector<Logits> expected;
  for (int32_t t = 0; t < 3; ++t) {
    texts.emplace_back();
    for (int32_t i = 0; i < 100; ++i) texts.back().push_back(i < 40 ? 3 + i : 3 + (i * (t + 1)) % 190);
    Session cold(model, options(kv));
    expected.push_back(after(cold, texts.back(), 0));
  }
  std::atomic<long> wrong{0}, taken_over{0};
  const auto work = [&](size_t offset) {
    Session session(model, options(kv), prefixes);
    for (size_t round = 0; round < 40; ++round) {
      const size_t t = (round + offset) % texts.size();
      const size_t held = session.reuse(texts[t].data(), texts[t].size());
      taken_over += static_cast<long>(held);
      wrong += !same(after(session, texts[t], held), expected[t]);
      session.truncate(session.tokens().size() / 2);
    }
  };
  std::thread one(work, 0), two(work, 1);
  one.join(), two.join();
  check(wrong.load() == 0, "logits stay right while other threads use the sessions copied from");
  check(taken_over.load() > 1000, "threads took something over");
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const auto model = Model::open(argv[i], {});
    for (int type = 0; type < kKvs; ++type) {
      const auto kv = static_cast<Kv>(type);
      for (const auto hash : {&PrefixCache::hash_of, &always_the_same}) {
        for (const size_t blocks : {6, 1000})
          if (!kThreadSanitizer) check_random_texts(model, kv, hash, blocks);  // one thread: minutes for nothing
        check_closed_sessions(model, kv, hash);
      }
      check_threads(model, kv);
    }
  }
  std::printf("prefix_check: %ld checks, %ld failures\n", checks, failures);
  return failures != 0;
}
