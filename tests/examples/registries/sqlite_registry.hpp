// sqlite_registry.hpp - a process_registry on SQLite, to be copied and changed: several processes on one machine may share the
// file. Each operation is one transaction (BEGIN IMMEDIATE) that reads the row, decides, and writes it; time is read when the
// write lock is held, so that nobody decides by a time from before it waited. Times are milliseconds of the wall clock: a
// clock that is set forward lets leases end early (then work is done twice, and fences keep it apart), backward: late.
// Not kept: boot and pid of owners, so a silent holder is waited for until its lease ends. Calls run on run_blocking threads.
// SPDX-License-Identifier: MIT
#ifndef RTB_EXAMPLE_SQLITE_REGISTRY_HPP
#define RTB_EXAMPLE_SQLITE_REGISTRY_HPP
#include "concurrency.hpp"

#include <sqlite3.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

class sqlite_registry final : public rtb::process_registry {
    using errc = rtb::process_errc;
    using record = rtb::process_record;
    using lease = rtb::process_lease;
    template <class T> using result = rtb::expected<T, rtb::process_error>;
    template <class T> using answer = rtb::task<result<T>>;
    static rtb::unexpected<rtb::process_error> fail(errc e) { return rtb::unexpected(rtb::process_error(e)); }
    static constexpr std::int64_t k_end = 0x3fffffffffffffff;

    struct row {
        record r;
        std::uint64_t started_fence = 0;
        rtb::process_owner owner;
        std::string token, ended_token;
        std::int64_t expires = 0, ready = 0, ended = 0;
    };
    // One connection; everything in it is called under its mutex.
    struct store {
        sqlite3* db = nullptr;
        sqlite3_stmt* read = nullptr;
        sqlite3_stmt* write = nullptr;
        rtb::manual_clock* time = nullptr;
        std::mutex m;
        std::int64_t now = 0;      // of the transaction
        rtb::time_point now_here;  // the same, by our clock
        bool broken = false;       // a statement failed: the transaction is rolled back

        ~store() {
            sqlite3_finalize(read);
            sqlite3_finalize(write);
            sqlite3_close(db);
        }
        bool run(const char* sql) { return sqlite3_exec(db, sql, nullptr, nullptr, nullptr) == SQLITE_OK; }
        sqlite3_stmt* prepare(const char* sql) {
            sqlite3_stmt* s = nullptr;
            if (sqlite3_prepare_v2(db, sql, -1, &s, nullptr) != SQLITE_OK) broken = true;
            return s;
        }
        static std::string text(sqlite3_stmt* s, int i) {
            const void* const p = sqlite3_column_blob(s, i);
            return p == nullptr ? std::string() : std::string(static_cast<const char*>(p), static_cast<std::size_t>(sqlite3_column_bytes(s, i)));
        }
        static void bind(sqlite3_stmt* s, int i, const std::string& v) {
            sqlite3_bind_blob(s, i, v.empty() ? "" : v.data(), static_cast<int>(v.size()), SQLITE_TRANSIENT);
        }
        row current(sqlite3_stmt* s) const {
            row w;
            record& r = w.r;
            int i = 0;
            const auto number = [&] { return sqlite3_column_int64(s, i++); };
            const auto string = [&] { return text(s, i++); };
            r.id = string(), r.kind = string(), r.input = string();
            r.disposition = static_cast<rtb::process_disposition>(number());
            r.max_attempts = static_cast<std::uint32_t>(number());
            r.status = static_cast<rtb::process_status>(number());
            r.output = string();
            r.abandoned_by = static_cast<rtb::process_abandoner>(number());
            r.attempts = static_cast<std::uint32_t>(number());
            r.fence = static_cast<std::uint64_t>(number());
            w.started_fence = static_cast<std::uint64_t>(number());
            r.holder_dead = number() != 0;
            const auto owner = [&] {
                rtb::process_owner o;
                o.id = string(), o.incarnation = string();
                return o;
            };
            w.owner = owner();
            w.token = string(), w.ended_token = string();
            w.expires = number(), w.ready = number(), w.ended = number();
            r.created_ms = number(), r.updated_ms = number();
            const rtb::process_owner starter = owner();
            if (const std::int64_t at = number(); at >= 0) r.first_started.emplace(starter, at);
            for (auto* request : {&r.abandon_request, &r.cancel_request}) {
                std::string by = string(), why = string();
                if (const std::int64_t at = number(); at >= 0) request->emplace(std::move(by), std::move(why), at);
            }
            r.leased = !w.token.empty() && now < w.expires;
            r.ready_in = r.terminal() ? rtb::duration::zero() : std::chrono::milliseconds((std::max)(w.ready - now, std::int64_t{0}));
            return w;
        }
        std::optional<row> find(const std::string& id) {
            bind(read, 1, id);
            const int got = sqlite3_step(read);
            std::optional<row> w;
            if (got == SQLITE_ROW) w = current(read);
            if (got != SQLITE_ROW && got != SQLITE_DONE) broken = true;
            sqlite3_reset(read);
            return w;
        }
        record put(row w) {
            record& r = w.r;
            r.updated_ms = now;
            int i = 1;
            const auto number = [&](auto v) { sqlite3_bind_int64(write, i++, static_cast<std::int64_t>(v)); };
            const auto string = [&](const std::string& v) { bind(write, i++, v); };
            string(r.id), string(r.kind), string(r.input);
            number(r.disposition), number(r.max_attempts), number(r.status), string(r.output), number(r.abandoned_by), number(r.attempts);
            number(r.fence), number(w.started_fence), number(r.holder_dead);
            string(w.owner.id), string(w.owner.incarnation), string(w.token), string(w.ended_token);
            number(w.expires), number(w.ready), number(w.ended), number(r.created_ms), number(r.updated_ms);
            const rtb::process_owner nobody;
            string(r.first_started ? r.first_started->owner.id : nobody.id);
            string(r.first_started ? r.first_started->owner.incarnation : nobody.id);
            number(r.first_started ? r.first_started->at_ms : -1);
            for (const auto* request : {&r.abandon_request, &r.cancel_request}) {
                string(*request ? (*request)->by : nobody.id);
                string(*request ? (*request)->reason : nobody.id);
                number(*request ? (*request)->at_ms : -1);
            }
            if (sqlite3_step(write) != SQLITE_DONE) broken = true;
            sqlite3_reset(write);
            r.leased = !w.token.empty() && now < w.expires;
            r.ready_in = r.terminal() ? rtb::duration::zero() : std::chrono::milliseconds((std::max)(w.ready - now, std::int64_t{0}));
            return r;
        }
        std::int64_t scalar(const char* sql) {
            sqlite3_stmt* const s = prepare(sql);
            const std::int64_t v = s != nullptr && sqlite3_step(s) == SQLITE_ROW ? sqlite3_column_int64(s, 0) : 0;
            sqlite3_finalize(s);
            return v;
        }
        lease lease_of(const row& w) const {
            lease l;
            l.process_id = w.r.id, l.owner = w.owner, l.token = w.token, l.fence = w.r.fence;
            const std::int64_t left = (std::min)(w.expires - now, std::int64_t{1} << 40);
            l.expires = now_here + std::chrono::milliseconds(left);
            l.cancel_requested = w.r.cancel_request.has_value();
            return l;
        }
        std::int64_t after(rtb::duration d) const {
            const std::int64_t ms = std::chrono::duration_cast<std::chrono::milliseconds>(d).count();
            return ms > k_end - now ? k_end : now + ms;
        }
        // What keeps a lease from being used; errc{}: nothing.
        errc check(const std::optional<row>& w, const lease& l) const {
            if (!w) return errc::not_found;
            if (w->r.terminal()) return errc::terminal;
            return held_by(*w, l) && w->r.leased ? errc{} : errc::superseded;
        }
        static bool held_by(const row& w, const lease& l) {
            return !w.token.empty() && w.token == l.token && w.r.fence == l.fence && w.owner == l.owner;
        }
        static void clear(row& w) {
            w.token.clear(), w.owner = rtb::process_owner(), w.expires = 0;
        }
        record end(row w, const rtb::process_outcome& o, bool by_lease) {
            w.r.status = o.status(), w.r.abandoned_by = o.abandoned_by(), w.r.output = o.text();
            w.ended = now;
            w.ended_token = by_lease ? w.token : std::string();
            clear(w);
            return put(std::move(w));
        }
        static bool ended_as(const row& w, const rtb::process_outcome& o) {
            return w.r.status == o.status() && w.r.abandoned_by == o.abandoned_by() && w.r.output == o.text();
        }
        result<rtb::claim_result> claim(const std::string& id, const rtb::process_owner& who, rtb::duration ttl, const lease* observed) {
            using kind = rtb::claim_result::kind;
            if (ttl <= rtb::duration::zero() || who.id.empty()) return fail(errc::invalid);
            std::optional<row> w = find(id);
            if (!w) return fail(errc::not_found);
            if (w->r.terminal()) return rtb::claim_result(kind::terminal, w->r);
            const bool takes = observed != nullptr && held_by(*w, *observed);
            if (w->r.leased && !takes) {
                if (!(w->owner == who)) return rtb::claim_result(kind::busy, w->r, lease_of(*w));
                w->expires = after(ttl);
            } else {
                if (w->r.disposition == rtb::process_disposition::externally_owned && !w->r.abandon_request) return fail(errc::conflict);
                if (!takes && now < w->ready) return rtb::claim_result(kind::deferred, w->r);
                if (w->r.fence >= 0x7fffffffffffffff) return fail(errc::exhausted);
                if (takes && w->r.first_started && w->started_fence == w->r.fence) w->r.holder_dead = true;
                ++w->r.fence;
                w->owner = who;
                static std::atomic<std::uint64_t> count{0};
                w->token = std::to_string(std::random_device()()) + "-" + std::to_string(std::random_device()()) + "-" + std::to_string(++count);
                w->expires = after(ttl);
                w->ready = 0;
            }
            record r = put(*w);
            return rtb::claim_result(kind::acquired, std::move(r), lease_of(*w));
        }
        // f in a transaction: made as a whole, or not at all.
        template <class F> auto transaction(F& f) -> decltype(f(*this)) {
            const std::lock_guard<std::mutex> l(m);
            broken = false;
            if (!run("BEGIN IMMEDIATE")) return fail(errc::io);
            now_here = time != nullptr ? time->now() : rtb::clock::now();
            now = time != nullptr ? std::chrono::duration_cast<std::chrono::milliseconds>(now_here.time_since_epoch()).count()
                                  : std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
            auto r = f(*this);
            if (!broken && r && run("COMMIT")) return r;
            run("ROLLBACK");
            if (r) return fail(errc::io);
            return r;
        }
    };
    std::shared_ptr<store> store_;

    template <class T, class F> static answer<T> submit(std::shared_ptr<store> s, F f) {
        auto work = [s, f = std::move(f)]() mutable { return s->transaction(f); };
        co_return co_await rtb::run_blocking(std::move(work));
    }
    explicit sqlite_registry(std::shared_ptr<store> s) : store_(std::move(s)) {}
    static bool outcome_ok(const rtb::process_outcome& o) {
        return o.status() != rtb::process_status::running &&
               (o.status() == rtb::process_status::abandoned) == (o.abandoned_by() != rtb::process_abandoner::nobody);
    }
    answer<record> request(std::string id, std::optional<rtb::process_request> record::*mark, std::string by, std::string why) {
        return submit<record>(store_, [id = std::move(id), mark, by = std::move(by), why = std::move(why)](store& s) -> result<record> {
            std::optional<row> w = s.find(id);
            if (!w) return fail(errc::not_found);
            if (w->r.terminal()) return fail(errc::terminal);
            if (w->r.*mark) return w->r;
            (w->r.*mark).emplace(by, why, s.now);
            return s.put(std::move(*w));
        });
    }

public:
    static result<std::shared_ptr<sqlite_registry>> open(const std::string& path, rtb::manual_clock* time = nullptr) {
        const auto s = std::make_shared<store>();
        s->time = time;
        if (sqlite3_open(path.c_str(), &s->db) != SQLITE_OK) return fail(errc::io);
        sqlite3_busy_timeout(s->db, 10000);
        const bool ready = s->run("PRAGMA journal_mode=WAL") && s->run("PRAGMA synchronous=FULL") &&
                           s->run("CREATE TABLE IF NOT EXISTS floor(fence INT);"
                                  "CREATE TABLE IF NOT EXISTS proc(id BLOB PRIMARY KEY, kind, input, disposition INT, max_attempts INT, status INT, output, "
                                  "abandoned_by INT, attempts INT, fence INT, started_fence INT, holder_dead INT, owner, incarnation, token, ended_token, "
                                  "expires INT, ready INT, ended INT, created INT, updated INT, starter, starter_life, started INT, "
                                  "a_by, a_why, a_at INT, c_by, c_why, c_at INT) WITHOUT ROWID;"
                                  "CREATE INDEX IF NOT EXISTS open_rows ON proc(id) WHERE status=0");
        if (!ready) return fail(errc::io);
        s->read = s->prepare("SELECT * FROM proc WHERE id=?1");
        s->write = s->prepare("REPLACE INTO proc VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)");
        if (s->broken) return fail(errc::io);
        return std::shared_ptr<sqlite_registry>(new sqlite_registry(s));
    }
    answer<record> register_process(rtb::process_registration p) override {
        return submit<record>(store_, [p = std::move(p)](store& s) -> result<record> {
            if (p.id.empty() || p.id.size() > 1024 || p.disposition == rtb::process_disposition{} || p.max_attempts == 0) return fail(errc::invalid);
            if (const std::optional<row> w = s.find(p.id)) {
                const bool same = w->r.kind == p.kind && w->r.input == p.input && w->r.disposition == p.disposition && w->r.max_attempts == p.max_attempts;
                return same ? result<record>(w->r) : fail(errc::conflict);
            }
            row w;
            w.r.id = p.id, w.r.kind = p.kind, w.r.input = p.input, w.r.disposition = p.disposition, w.r.max_attempts = p.max_attempts;
            w.r.created_ms = s.now;
            w.r.fence = static_cast<std::uint64_t>(s.scalar("SELECT max(fence) FROM floor"));
            return s.put(std::move(w));
        });
    }
    answer<std::optional<record>> try_get(std::string id) override {
        return submit<std::optional<record>>(store_, [id = std::move(id)](store& s) -> result<std::optional<record>> {
            const std::optional<row> w = s.find(id);
            return w ? std::optional<record>(w->r) : std::nullopt;
        });
    }
    answer<std::vector<record>> list_non_terminal(rtb::process_page page) override {
        return submit<std::vector<record>>(store_, [page = std::move(page)](store& s) -> result<std::vector<record>> {
            if (page.limit == 0) return fail(errc::invalid);
            std::vector<record> all;
            sqlite3_stmt* const q = s.prepare("SELECT * FROM proc WHERE status=0 AND id>?1 ORDER BY id LIMIT ?2");
            if (q == nullptr) return fail(errc::io);
            store::bind(q, 1, page.after);
            sqlite3_bind_int64(q, 2, static_cast<std::int64_t>((std::min)(page.limit, std::size_t{1} << 30)));
            int got = SQLITE_ROW;
            while ((got = sqlite3_step(q)) == SQLITE_ROW) all.push_back(s.current(q).r);
            if (got != SQLITE_DONE) s.broken = true;
            sqlite3_finalize(q);
            return all;
        });
    }
    answer<rtb::claim_result> claim(std::string id, rtb::process_owner who, rtb::duration ttl) override {
        return submit<rtb::claim_result>(store_, [id = std::move(id), who = std::move(who), ttl](store& s) { return s.claim(id, who, ttl, nullptr); });
    }
    answer<rtb::claim_result> reclaim(std::string id, rtb::process_owner who, lease observed, rtb::duration ttl) override {
        return submit<rtb::claim_result>(store_, [id = std::move(id), who = std::move(who), observed = std::move(observed), ttl](store& s) {
            return s.claim(id, who, ttl, &observed);
        });
    }
    answer<lease> renew(lease l, rtb::duration ttl) override {
        return submit<lease>(store_, [l = std::move(l), ttl](store& s) -> result<lease> {
            if (ttl <= rtb::duration::zero()) return fail(errc::invalid);
            std::optional<row> w = s.find(l.process_id);
            if (const errc e = s.check(w, l); e != errc{}) return fail(e);
            w->expires = s.after(ttl);
            s.put(*w);
            return s.lease_of(*w);
        });
    }
    answer<std::optional<lease>> get_lease(std::string id) override {
        return submit<std::optional<lease>>(store_, [id = std::move(id)](store& s) -> result<std::optional<lease>> {
            const std::optional<row> w = s.find(id);
            if (!w) return fail(errc::not_found);
            return w->token.empty() ? std::nullopt : std::optional<lease>(s.lease_of(*w));
        });
    }
    answer<void> release(lease l, bool refund = false, rtb::duration delay = {}) override {
        return submit<void>(store_, [l = std::move(l), refund, delay](store& s) -> result<void> {
            std::optional<row> w = s.find(l.process_id);
            if (!w || w->r.terminal() || !store::held_by(*w, l)) return {};
            store::clear(*w);
            if (refund && w->started_fence == w->r.fence && w->r.attempts > 0) {
                w->started_fence = 0;
                if (--w->r.attempts == 0 && w->r.disposition == rtb::process_disposition::rerunnable) w->r.first_started.reset();
            }
            if (delay > rtb::duration::zero()) w->ready = s.after(delay);
            s.put(std::move(*w));
            return {};
        });
    }
    answer<record> record_first_started(lease l) override {
        return submit<record>(store_, [l = std::move(l)](store& s) -> result<record> {
            std::optional<row> w = s.find(l.process_id);
            if (const errc e = s.check(w, l); e != errc{}) return fail(e);
            if (w->started_fence == w->r.fence) return w->r;
            const rtb::process_disposition d = w->r.disposition;
            if (d == rtb::process_disposition::externally_owned || (d == rtb::process_disposition::owner_bound && w->r.first_started))
                return fail(errc::conflict);
            if (w->r.attempts >= w->r.max_attempts) return fail(errc::exhausted);
            ++w->r.attempts;
            w->started_fence = w->r.fence;
            w->r.holder_dead = false;
            if (!w->r.first_started) w->r.first_started.emplace(w->owner, s.now);
            return s.put(std::move(*w));
        });
    }
    answer<record> complete_with_lease(lease l, rtb::process_outcome o) override {
        return submit<record>(store_, [l = std::move(l), o = std::move(o)](store& s) -> result<record> {
            if (!outcome_ok(o)) return fail(errc::invalid);
            std::optional<row> w = s.find(l.process_id);
            if (w && w->r.terminal() && !l.token.empty() && w->ended_token == l.token && w->r.fence == l.fence && store::ended_as(*w, o)) return w->r;
            if (const errc e = s.check(w, l); e != errc{}) return fail(e);
            if (w->r.disposition == rtb::process_disposition::externally_owned && o.status() != rtb::process_status::abandoned) return fail(errc::conflict);
            return s.end(std::move(*w), o, true);
        });
    }
    answer<record> complete(std::string id, rtb::process_outcome o, rtb::process_authority by) override {
        return submit<record>(store_, [id = std::move(id), o = std::move(o), by](store& s) -> result<record> {
            const bool reconciled = by == rtb::process_authority::reconciled_abandon;
            if (!outcome_ok(o) || (reconciled ? o.status() != rtb::process_status::abandoned : by != rtb::process_authority::external_owner))
                return fail(errc::invalid);
            std::optional<row> w = s.find(id);
            if (!w) return fail(errc::not_found);
            if (w->r.terminal()) return w->ended_token.empty() && store::ended_as(*w, o) ? result<record>(w->r) : fail(errc::terminal);
            if (reconciled ? !w->r.abandon_request || w->r.leased : w->r.disposition != rtb::process_disposition::externally_owned)
                return fail(errc::conflict);
            return s.end(std::move(*w), o, false);
        });
    }
    answer<record> request_abandon(std::string id, std::string by, std::string reason) override {
        return request(std::move(id), &record::abandon_request, std::move(by), std::move(reason));
    }
    answer<record> request_cancel(std::string id, std::string reason) override {
        return request(std::move(id), &record::cancel_request, std::string(), std::move(reason));
    }
    answer<std::size_t> prune(rtb::duration older_than = {}, std::size_t limit = (std::numeric_limits<std::size_t>::max)()) override {
        return submit<std::size_t>(store_, [older_than, limit](store& s) -> result<std::size_t> {
            const std::int64_t before = s.now - std::chrono::duration_cast<std::chrono::milliseconds>(older_than).count();
            const std::string which = "(SELECT id FROM proc WHERE status<>0 AND ended<=" + std::to_string(before) + " ORDER BY id LIMIT " +
                                      std::to_string((std::min)(limit, std::size_t{1} << 30)) + ")";
            // The floor first: a row that gets the id of a removed one begins above all its fences.
            s.broken = s.broken || !s.run(("INSERT INTO floor SELECT max(fence) FROM proc WHERE id IN " + which).c_str()) ||
                       !s.run("DELETE FROM floor WHERE fence IS NULL OR fence<(SELECT max(fence) FROM floor)") ||
                       !s.run(("DELETE FROM proc WHERE id IN " + which).c_str());
            return static_cast<std::size_t>(sqlite3_changes(s.db));
        });
    }
    rtb::process_durability durability() const noexcept override { return rtb::process_durability::power_loss; }
};
#endif
