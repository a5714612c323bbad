// inventory_actor.cpp - a game: the inventory is an actor, so whoever wants something of it asks, and nobody locks.
//
// It runs in the frame loop, on the scheduler of the behaviours, in game time. Crafting takes a while; commands wait in a small
// mailbox meanwhile, and when that is full, those who send them. When nothing happens the inventory saves itself.
//
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include <cstdio>
#include <deque>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <variant>

using namespace std::chrono_literals;

using items = std::map<std::string, int>;

struct add_items {
    std::string what;
    int count;
};
struct remove_items {
    std::string what;
    int count;
    rtb::oneshot_sender<bool> done;  // the answer: were there so many?
};
struct craft_item {
    std::string what;
    rtb::oneshot_sender<bool> done;
};

static bool write_save(const std::filesystem::path& file, const std::string& text) {  // on a thread of the pool
    std::filesystem::path fresh = file;
    fresh += ".new";
    std::ofstream out(fresh, std::ios::trunc);
    out << text;
    out.close();
    std::error_code error;
    if (out) std::filesystem::rename(fresh, file, error);
    return out && !error;
}
static std::string read_save(const std::filesystem::path& file) {
    std::ifstream in(file);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

class inventory {
    using result = rtb::expected<void, std::string>;
    std::filesystem::path save_;
    items items_{};
    bool changed_ = false;

public:
    using command = std::variant<add_items, remove_items, craft_item>;
    explicit inventory(std::filesystem::path save) : save_(std::move(save)) {}

    // [snippet inventory_actor]
    rtb::task<> handle(command c) {  // one command at a time, co_await or not: nobody else touches items_ meanwhile
        if (auto* add = std::get_if<add_items>(&c)) put(add->what, add->count);
        if (auto* remove = std::get_if<remove_items>(&c)) hand_out(*remove);
        if (auto* craft = std::get_if<craft_item>(&c)) {
            const bool possible = take({{"iron", 2}, {"wood", 1}});
            if (possible) co_await rtb::sleep_for(500ms);  // game time; commands wait in the mailbox
            if (possible) put(craft->what, 1);
            static_cast<void>(craft->done.send(possible));  // nobody waits any more: it is in the inventory anyway
        }
    }
    rtb::task<result> on_idle() { return save(); }
    rtb::task<result> on_shutdown() { return save(); }
    // [/snippet]

private:
    void hand_out(remove_items& remove) {
        const bool there = take({{remove.what, remove.count}});
        const auto told = remove.done.send(there);
        if (!told && there) put(remove.what, remove.count);  // whoever asked is gone: back with it
    }
    void put(const std::string& what, int count) {
        items_[what] += count;
        changed_ = true;
    }
    bool take(const items& wanted) {
        for (const auto& [what, count] : wanted)
            if (items_[what] < count) return false;
        for (const auto& [what, count] : wanted) items_[what] -= count;
        changed_ = true;
        return true;
    }
    rtb::task<result> save() {
        if (!changed_) co_return result();
        std::string text;
        for (const auto& [what, count] : items_) text += what + " " + std::to_string(count) + "\n";
        const bool saved = co_await rtb::run_blocking(write_save, save_, text);  // a file: not on this thread
        if (!saved) co_return rtb::unexpected("can't write " + save_.string());  // counted and logged; the next one tries again
        changed_ = false;
        co_return result();
    }
};
using bag = rtb::actor_handle<inventory::command>;

static rtb::task<int> make_swords(bag b, int wanted) {
    for (int made = 0; made < wanted;) {
        const auto sword = co_await b.ask<bool, craft_item>("sword");
        if (!sword) co_return made;  // the inventory is gone
        if (*sword) ++made;
        if (!*sword) co_await rtb::sleep_for(100ms);  // until there is more iron
    }
    co_return wanted;
}
static rtb::task<int> sell_wood(bag b, int wanted) {
    for (int sold = 0; sold < wanted;) {
        const auto wood = co_await b.ask<bool, remove_items>("wood", 1);
        if (!wood) co_return sold;
        if (*wood) ++sold;
        if (!*wood) co_await rtb::sleep_for(100ms);
    }
    co_return wanted;
}

static int failures = 0;
static void check(bool good, const char* what) {
    std::printf("%-6s %s\n", good ? "ok" : "FAILED", what);
    failures += good ? 0 : 1;
}

static void play(const std::filesystem::path& save) {
    rtb::manual_clock game_time;
    rtb::scheduler behaviours({.time = &game_time});
    auto [inventory_of_all, ending] = bag::spawn_on(behaviours, inventory(save), {.queue_capacity = 2, .idle_interval = 30s, .name = "inventory"});
    bag b = std::move(inventory_of_all);
    const auto frames = [&](rtb::duration time) {
        for (rtb::duration t{}; t < time; t += 16ms) {
            game_time.advance(16ms);
            behaviours.run_for(2ms);
        }
    };

    std::deque<add_items> loot;  // what the player walked over and the inventory has not taken yet
    for (int i = 0; i < 8; ++i) loot.insert(loot.end(), {{"iron", 1}, {"wood", 1}});
    auto smithing = behaviours.spawn(make_swords(b, 4), {.name = "smith"});
    auto selling = behaviours.spawn(sell_wood(b, 3), {.name = "merchant"});
    int full = 0;
    for (int frame = 0; frame < 10'000 && !(smithing.done() && selling.done() && loot.empty()); ++frame) {
        game_time.advance(16ms);
        if (!loot.empty()) {
            const auto sent = b.try_send(loot.front());  // a frame never waits
            if (sent) loot.pop_front();
            if (!sent) ++full;  // try again in the next frame
        }
        behaviours.run_for(2ms);
    }
    check(smithing.done() && selling.done() && loot.empty(), "everybody came to an end");
    check(full > 0, "while the smith worked the mailbox was full, and the frames went on");
    const int swords = smithing.wait().value(), sold = selling.wait().value();
    std::printf("       %d swords, %d pieces of wood sold, loot waited in %d frames\n", swords, sold, full);

    frames(1s);
    check(!std::filesystem::exists(save), "nothing is saved while something happens");
    frames(31s);
    check(swords == 4 && sold == 3 && read_save(save) == "iron 0\nsword 4\nwood 1\n", "after 30 quiet seconds it is saved, and adds up");
    std::filesystem::remove(save);
    frames(61s);
    check(!std::filesystem::exists(save), "and not again while nothing changes");

    check(b.try_send(add_items{"gold", 1}).has_value(), "one more");
    const auto before = b.stats();
    { const bag last = std::move(b); }  // the last handle: what was accepted is handled, then it ends
    while (!ending.done()) frames(16ms);
    const auto report = ending.wait();
    check(report && report->handled == before.received && report->failures == 0 && report->rejected == 0, "everything was handled");
    check(read_save(save).rfind("gold 1\n", 0) == 0, "and the last change is saved at the end");
}

int main() {
    std::random_device entropy;
    const auto directory = std::filesystem::temp_directory_path() / ("inventory_actor_" + std::to_string(entropy()));
    std::filesystem::create_directory(directory);
    play(directory / "inventory.sav");
    std::filesystem::remove_all(directory);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
