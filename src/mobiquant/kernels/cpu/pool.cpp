#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mobiquant {
namespace {

// about 50 microseconds of waiting before a thread goes to sleep
constexpr int SPINS = 1500;

inline void rest() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A ticket holds the number of the job, its chunks, and the next of them: one word, so that none is seen without the others.
constexpr int FIELD = 20;
constexpr uint64_t MASK = (uint64_t{1} << FIELD) - 1;

struct Pool {
    std::atomic<uint64_t> ticket{0};
    std::atomic<uint32_t> wake{0};
    std::atomic<int> done{0}, allowed{1};
    std::atomic<Work> work{nullptr};
    std::atomic<void*> argument{nullptr};
    std::mutex busy;
    std::vector<std::thread> workers;
    pid_t owner = getpid();

    // Claim and do chunks of the job that is open; returns when there is none left.
    void help() {
        uint64_t now = ticket.load(std::memory_order_acquire);
        while (true) {
            const int chunk = static_cast<int>(now & MASK);
            const Work what = work.load(std::memory_order_relaxed);
            void* const with = argument.load(std::memory_order_relaxed);
            if (chunk >= static_cast<int>((now >> FIELD) & MASK)) return;
            // fails where another thread was first, or where the job read above is over
            if (!ticket.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            what(with, chunk);
            done.fetch_add(1, std::memory_order_release);
            now = ticket.load(std::memory_order_acquire);
        }
    }

    void serve(int number) {
        uint32_t seen = 0;
        while (true) {
            int spins = 0;
            while (wake.load(std::memory_order_acquire) == seen) {
                if (++spins < SPINS) {
                    rest();
                } else {
                    wake.wait(seen, std::memory_order_acquire);
                }
            }
            seen = wake.load(std::memory_order_acquire);
            if (number < allowed.load(std::memory_order_relaxed)) help();
        }
    }

    void start(int count, Work what, void* with) {
        while (static_cast<int>(workers.size()) + 1 < allowed.load(std::memory_order_relaxed)) {
            const int number = static_cast<int>(workers.size()) + 1;
            workers.emplace_back([this, number] { serve(number); });
        }
        done.store(0, std::memory_order_relaxed);
        work.store(what, std::memory_order_relaxed);
        argument.store(with, std::memory_order_relaxed);
        const uint64_t job = (ticket.load(std::memory_order_relaxed) >> (2 * FIELD)) + 1;
        ticket.store(job << (2 * FIELD) | static_cast<uint64_t>(count) << FIELD, std::memory_order_release);
        wake.fetch_add(1, std::memory_order_release);
        wake.notify_all();
    }

    void finish(int count) {
        help();
        for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
            if (spins < SPINS) {
                rest();
            } else {
                std::this_thread::yield();
            }
        }
    }
};

// never destroyed: threads may outlive the statics of a program that ends
std::atomic<Pool*> current{nullptr};
std::mutex making;

Pool& pool() {
    Pool* found = current.load(std::memory_order_acquire);
    // a forked child has the memory of the pool and none of its threads
    if (found != nullptr && found->owner == getpid()) return *found;
    const std::lock_guard<std::mutex> hold(making);
    found = current.load(std::memory_order_acquire);
    if (found == nullptr || found->owner != getpid()) {
        const int allowed = found == nullptr ? 1 : found->allowed.load();
        found = new Pool;
        found->allowed = allowed;
        current.store(found, std::memory_order_release);
    }
    return *found;
}

}  // namespace

void set_threads(int count) { pool().allowed.store(count < 1 ? 1 : count); }

int threads() { return pool().allowed.load(); }

void run(int chunks, Work work, void* argument) {
    Pool& all = pool();
    // one job at a time: a second caller, or a job inside a job, does its chunks alone
    std::unique_lock<std::mutex> hold(all.busy, std::try_to_lock);
    if (chunks < 2 || all.allowed.load(std::memory_order_relaxed) < 2 || !hold.owns_lock()) {
        for (int chunk = 0; chunk < chunks; ++chunk) work(argument, chunk);
        return;
    }
    all.start(chunks, work, argument);
    all.finish(chunks);
}

}  // namespace mobiquant
