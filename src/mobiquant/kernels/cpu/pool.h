// Threads that share out the chunks of one job after another.
//
// A job is a function and a number of chunks. Whoever is awake claims the next chunk from one 64-bit ticket that holds the
// job and the next chunk, so a thread that the system has put aside never holds the others up: the caller does
// what is left by itself. Which thread does a chunk is chance; what a chunk writes must not depend on it.
#pragma once

namespace mobiquant {

using Work = void (*)(void* argument, int chunk);

// Threads that jobs may use, the caller among them.
void set_threads(int count);
int threads();

// Run `work(argument, c)` for every c below `chunks` (at most a million); returns when all are done.
void run(int chunks, Work work, void* argument);

// The same for a lambda.
template <class F>
static inline void parallel(int chunks, F&& f) {
    run(chunks, [](void* argument, int chunk) { (*static_cast<F*>(argument))(chunk); }, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace mobiquant
