// A registry in front of another one that fails as real ones do: before or after the effect of a call, by an error or an
// exception, slowly, or never answering. For the tests of the process runner.
// SPDX-License-Identifier: MIT
#pragma once

#include "concurrency.hpp"

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace sim {

using rtb::duration;
using rtb::expected;
using rtb::process_errc;
using rtb::process_error;
using rtb::task;

struct plan {
    enum what { fine, error, std_exception, other_exception, out_of_memory };
    what before = fine;  // the call has no effect
    what after = fine;   // the effect is there, the answer is lost
    process_errc code = process_errc::io;
    duration delay_before{}, delay_after{};
    bool hang = false;  // no answer, ever; no effect
};

class registry : public rtb::process_registry {
    std::shared_ptr<rtb::process_registry> inner_;

    static process_error fail(plan::what how, process_errc code) {
        if (how == plan::std_exception) throw std::runtime_error("the store threw");
        if (how == plan::other_exception) throw 42;
        if (how == plan::out_of_memory) throw std::bad_alloc();
        return process_error(code, "the store failed");
    }
    template <class T, class F> task<expected<T, process_error>> pass(std::string op, std::string id, F call) {
        const plan p = on_call ? on_call(op, id) : plan();
        ++calls;
        if (p.hang) co_await rtb::sleep_for((duration::max)());
        if (p.delay_before > duration::zero()) co_await rtb::sleep_for(p.delay_before);
        if (p.before != plan::fine) {
            ++failed;
            co_return rtb::unexpected(fail(p.before, p.code));
        }
        auto t = call();
        auto r = co_await t;
        if (on_effect) on_effect(op, id);
        if (p.delay_after > duration::zero()) co_await rtb::sleep_for(p.delay_after);
        if (p.after != plan::fine) {
            ++failed;
            co_return rtb::unexpected(fail(p.after, p.code));
        }
        if (!r && r.error() == process_errc::io) ++failed;  // of its own
        co_return std::move(r);
    }

public:
    std::function<plan(const std::string& op, const std::string& id)> on_call;
    std::function<void(const std::string& op, const std::string& id)> on_effect;
    std::atomic<std::size_t> calls{0}, failed{0};

    explicit registry(std::shared_ptr<rtb::process_registry> inner) : inner_(std::move(inner)) {}

    task<expected<rtb::process_record, process_error>> register_process(rtb::process_registration r) override {
        const std::string id = r.id;
        return pass<rtb::process_record>("register_process", id, [this, r] { return inner_->register_process(r); });
    }
    task<expected<std::optional<rtb::process_record>, process_error>> try_get(std::string id) override {
        return pass<std::optional<rtb::process_record>>("try_get", id, [this, id] { return inner_->try_get(id); });
    }
    task<expected<std::vector<rtb::process_record>, process_error>> list_non_terminal(rtb::process_page p) override {
        return pass<std::vector<rtb::process_record>>("list_non_terminal", p.after, [this, p] { return inner_->list_non_terminal(p); });
    }
    task<expected<rtb::claim_result, process_error>> claim(std::string id, rtb::process_owner o, duration ttl) override {
        return pass<rtb::claim_result>("claim", id, [this, id, o, ttl] { return inner_->claim(id, o, ttl); });
    }
    task<expected<rtb::claim_result, process_error>> reclaim(std::string id, rtb::process_owner o, rtb::process_lease l, duration ttl) override {
        return pass<rtb::claim_result>("reclaim", id, [this, id, o, l, ttl] { return inner_->reclaim(id, o, l, ttl); });
    }
    task<expected<rtb::process_lease, process_error>> renew(rtb::process_lease l, duration ttl) override {
        return pass<rtb::process_lease>("renew", l.process_id, [this, l, ttl] { return inner_->renew(l, ttl); });
    }
    task<expected<std::optional<rtb::process_lease>, process_error>> get_lease(std::string id) override {
        return pass<std::optional<rtb::process_lease>>("get_lease", id, [this, id] { return inner_->get_lease(id); });
    }
    task<expected<void, process_error>> release(rtb::process_lease l, bool refund = false, duration delay = {}) override {
        return pass<void>("release", l.process_id, [this, l, refund, delay] { return inner_->release(l, refund, delay); });
    }
    task<expected<rtb::process_record, process_error>> record_first_started(rtb::process_lease l) override {
        return pass<rtb::process_record>("record_first_started", l.process_id, [this, l] { return inner_->record_first_started(l); });
    }
    task<expected<rtb::process_record, process_error>> complete_with_lease(rtb::process_lease l, rtb::process_outcome o) override {
        return pass<rtb::process_record>("complete_with_lease", l.process_id, [this, l, o] { return inner_->complete_with_lease(l, o); });
    }
    task<expected<rtb::process_record, process_error>> complete(std::string id, rtb::process_outcome o, rtb::process_authority by) override {
        return pass<rtb::process_record>("complete", id, [this, id, o, by] { return inner_->complete(id, o, by); });
    }
    task<expected<rtb::process_record, process_error>> request_abandon(std::string id, std::string by, std::string reason) override {
        return pass<rtb::process_record>("request_abandon", id, [this, id, by, reason] { return inner_->request_abandon(id, by, reason); });
    }
    task<expected<rtb::process_record, process_error>> request_cancel(std::string id, std::string reason) override {
        return pass<rtb::process_record>("request_cancel", id, [this, id, reason] { return inner_->request_cancel(id, reason); });
    }
    task<expected<std::size_t, process_error>> prune(duration older = {}, std::size_t limit = (std::numeric_limits<std::size_t>::max)()) override {
        return pass<std::size_t>("prune", "", [this, older, limit] { return inner_->prune(older, limit); });
    }
    task<expected<void, process_error>> maintain() override {
        return pass<void>("maintain", "", [this] { return inner_->maintain(); });
    }
    rtb::process_durability durability() const noexcept override { return inner_->durability(); }
};

}  // namespace sim
