// frame_loop.cpp - a game: behaviours are coroutines, and the frame loop gives them two milliseconds per frame.
//
// No thread is started. Game time is a manual_clock, so pausing the game is not advancing it.
//
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>

using namespace std::chrono_literals;

struct world {
    int guard = 0;  // where he stands
    int rounds = 0;
    int gate = 0;  // 0: closed, 10: open
    rtb::notify lever;
};

static void draw(const world& w, int frame) {
    if (frame % 20 == 0) std::printf("frame %3d: guard at %d, gate %3d %%\n", frame, w.guard, w.gate * 10);
}

// [snippet frame_loop]
rtb::task<> patrol(world& w) {  // where a behaviour stands is where its code stands: no state machine
    for (;; ++w.rounds) {
        for (; w.guard < 5; ++w.guard) co_await rtb::sleep_for(100ms);
        w.lever.notify_one();
        for (; w.guard > 0; --w.guard) co_await rtb::sleep_for(100ms);
    }
}

rtb::task<> open_gate(world& w) {
    co_await w.lever.wait();
    for (; w.gate < 10; ++w.gate) co_await rtb::sleep_for(50ms);
}

int play(world& w) {
    rtb::manual_clock game_time;
    rtb::scheduler behaviours({.time = &game_time});
    auto guard = behaviours.spawn(patrol(w), {.name = "guard"});
    auto gate = behaviours.spawn(open_gate(w), {.name = "gate"});

    int frame = 0;
    for (; frame < 600 && !gate.done(); ++frame) {
        game_time.advance(16ms);
        behaviours.run_for(2ms);  // never sleeps; what is not done after 2 ms goes on in the next frame
        draw(w, frame);
    }
    return frame;
}  // the guard still patrols: he goes with the scheduler
// [/snippet]

// While time stands still nothing happens, however often the loop turns.
static bool stands_still_when_paused() {
    world w;
    rtb::manual_clock game_time;
    rtb::scheduler behaviours({.time = &game_time});
    auto guard = behaviours.spawn(patrol(w));
    game_time.advance(16ms);
    behaviours.poll();
    game_time.advance(250ms);
    behaviours.poll();
    const int before = w.guard;
    for (int frame = 0; frame < 100; ++frame) behaviours.run_for(2ms);
    return before > 0 && w.guard == before && !guard.done();
}

int main() {
    world w;
    const int frames = play(w);
    std::printf("the gate was open after %d frames, in round %d of the guard\n", frames, w.rounds + 1);
    return w.gate == 10 && frames >= 1000 / 16 && stands_still_when_paused() ? 0 : 1;
}
