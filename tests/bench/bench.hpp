// bench.hpp - a small harness for benchmarks that compare systems in one process.
//
// What it is for: a row is measured for several systems (ours, a hand-written floor, a peer), run by run in turn
// (A B C A B C ...), so that a machine that slows down for a while slows down all of them. The median of the runs is
// printed, with the ratios. Absolute figures drift between machines and days; the ratios are what counts.
//
//     bench::group row;
//     row.metrics = {{"channel, one producer", "ns", bench::at_most(60)}};
//     row.ours  = bench::per_op([](std::uint64_t n) { return elapsed_ns_of(n); });
//     row.floor = ...;
//     return bench::run_all({row});
//
// On a machine that is busy with other things, many short windows and the best of them say more than the median:
// --best --runs 100 --window 2.
//
// Nothing here asserts a time: a bench that misses a figure says so in its last column and still exits with 0.
#ifndef RTB_TESTS_BENCH_BENCH_HPP
#define RTB_TESTS_BENCH_BENCH_HPP

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#    include <malloc.h>        // mallinfo2, malloc_trim
#    include <pthread.h>       // pthread_setaffinity_np
#    include <sched.h>         // cpu_set_t
#    include <sys/resource.h>  // getrusage
#    include <unistd.h>        // sysconf
#endif

namespace bench {

using clock = std::chrono::steady_clock;

/// Nanoseconds since `t0`.
inline double since(clock::time_point t0) {
    return std::chrono::duration<double, std::nano>(clock::now() - t0).count();
}

/// Makes the compiler believe that `value` is used and that memory may have changed.
template <class T>
inline void keep(const T& value) {
#if defined(__GNUC__)
    asm volatile("" : : "g"(&value) : "memory");
#else
    static volatile const void* hole;
    hole = &value;
#endif
}

// options ///////////////////////////////////////////////////////////////////////////////////////////////////////////

struct options {
    std::string filter{};  // rows whose name contains it
    std::string only{};    // ours, floor or the peer's name: measures nothing else, for a profiler
    bool quick = false;    // small counts and few runs: shows that everything works
    bool list = false;     // names only
    bool best = false;     // the smallest cost of the runs instead of the median
    bool spread = false;   // also prints lowest..highest of each cell
    int runs = 0;          // 0: 7, or 3 with --quick
    double window = 0;     // milliseconds of one measurement; 0: 120, or 15 with --quick
};

inline options& opt() {
    static options o;
    return o;
}

/// The name of the third column.
inline std::string& peer_name() {
    static std::string name = "asio";
    return name;
}

inline void parse(int argc, char** argv) {
    options& o = opt();
    for (int i = 1; i < argc; ++i) {
        const std::string a = argv[i];
        if (a == "--quick") {
            o.quick = true;
        } else if (a == "--list") {
            o.list = true;
        } else if (a == "--best") {
            o.best = true;
        } else if (a == "--spread") {
            o.spread = true;
        } else if (a == "--filter" && i + 1 < argc) {
            o.filter = argv[++i];
        } else if (a == "--only" && i + 1 < argc) {
            o.only = argv[++i];
        } else if (a == "--window" && i + 1 < argc) {
            o.window = std::atof(argv[++i]);
        } else if (a == "--runs" && i + 1 < argc) {
            o.runs = std::atoi(argv[++i]);
        } else {
            std::printf("usage: %s [--filter TEXT] [--quick] [--runs N] [--window MS] [--best] [--spread] "
                        "[--list] [--only ours|floor|%s]\n",
                        argv[0], peer_name().c_str());
            std::exit(a == "--help" ? 0 : 2);
        }
    }
    if (o.runs <= 0) {
        o.runs = o.quick ? 3 : 7;
    }
    if (!(o.window > 0)) {
        o.window = o.quick ? 15 : 120;
    }
}

/// `full`, or a smaller count with --quick.
inline std::uint64_t count(std::uint64_t full, std::uint64_t divisor = 10) {
    return opt().quick ? (std::max)(std::uint64_t{1}, full / divisor) : full;
}

// statistics ////////////////////////////////////////////////////////////////////////////////////////////////////////

/// `p` in [0, 1], nearest rank; NaN for nothing.
inline double percentile(std::vector<double> v, double p) {
    if (v.empty()) {
        return std::numeric_limits<double>::quiet_NaN();
    }
    const auto rank = static_cast<std::size_t>(std::ceil(p * static_cast<double>(v.size())));
    const std::size_t at = (std::min)(v.size() - 1, rank == 0 ? 0 : rank - 1);
    std::nth_element(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(at), v.end());
    return v[at];
}

inline double median(const std::vector<double>& v) {
    return percentile(v, 0.5);
}

// placement /////////////////////////////////////////////////////////////////////////////////////////////////////////

// same      caller and worker on one CPU: a blocking round trip is two context switches
// split     caller and worker on two CPUs: it is two wake-ups of a halted CPU, unless somebody spins
// anywhere  the operating system decides
enum class place { anywhere, same, split };

#if defined(__linux__)
/// The CPUs this process may use, as they were at the first call.
inline const std::vector<int>& cpus() {
    static const std::vector<int> list = [] {
        std::vector<int> out;
        cpu_set_t set;
        CPU_ZERO(&set);
        if (sched_getaffinity(0, sizeof set, &set) == 0) {
            for (int c = 0; c < CPU_SETSIZE; ++c) {
                if (CPU_ISSET(c, &set)) {
                    out.push_back(c);
                }
            }
        }
        return out;
    }();
    return list;
}

inline void pin(const std::vector<int>& to) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int c : to) {
        CPU_SET(c, &set);
    }
    if (!to.empty()) {
        pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    }
}
#else
inline const std::vector<int>& cpus() {
    static const std::vector<int> none;
    return none;
}
inline void pin(const std::vector<int>&) {}
#endif

inline bool can_split() {
    return cpus().size() >= 2;
}

/// Places the calling thread and the threads that it starts (they inherit the place of their creator).
///
///     placed here(place::split);   // threads started from now on are workers
///     system under_test;
///     here.caller();               // from now on this thread, and what it starts, is a caller
class placed {
public:
    explicit placed(place p) : place_(p) {
        if (place_ == place::same) {
            pin({cpus().front()});
        } else if (place_ == place::split) {
            pin({cpus()[1]});
        }
    }
    ~placed() { pin(cpus()); }
    placed(const placed&) = delete;
    placed& operator=(const placed&) = delete;

    void caller() const {
        if (place_ == place::split) {
            pin({cpus().front()});
        }
    }

private:
    place place_;
};

// what the process uses /////////////////////////////////////////////////////////////////////////////////////////////

/// CPU time of the whole process, in nanoseconds.
inline double cpu_ns() {
#if defined(__linux__)
    rusage u{};
    getrusage(RUSAGE_SELF, &u);
    const auto ns = [](const timeval& t) {
        return static_cast<double>(t.tv_sec) * 1e9 + static_cast<double>(t.tv_usec) * 1e3;
    };
    return ns(u.ru_utime) + ns(u.ru_stime);
#else
    return std::numeric_limits<double>::quiet_NaN();
#endif
}

/// Bytes that malloc has handed out, its own headers included.
inline double heap_bytes() {
#if defined(__linux__) && defined(__GLIBC__)
    const auto m = mallinfo2();
    return static_cast<double>(m.uordblks) + static_cast<double>(m.hblkhd);
#else
    return std::numeric_limits<double>::quiet_NaN();
#endif
}

/// Resident bytes of the process. Call `give_back()` before the first of two readings.
inline double resident_bytes() {
#if defined(__linux__)
    long pages = 0;
    if (std::FILE* f = std::fopen("/proc/self/statm", "r")) {
        long size = 0;
        if (std::fscanf(f, "%ld %ld", &size, &pages) != 2) {
            pages = 0;
        }
        std::fclose(f);
    }
    return static_cast<double>(pages) * static_cast<double>(sysconf(_SC_PAGESIZE));
#else
    return std::numeric_limits<double>::quiet_NaN();
#endif
}

inline void give_back() {
#if defined(__linux__) && defined(__GLIBC__)
    malloc_trim(0);
#endif
}

// rows //////////////////////////////////////////////////////////////////////////////////////////////////////////////

using sample = std::vector<double>;  // one run of one system: one value per metric
using system_fn = std::function<sample()>;

// The figure a row is to beat: what it says, and (where it can be computed) whether it was met.
struct figure {
    std::string text{"-"};
    std::function<bool(double ours, double floor, double peer)> met{};
};

inline std::string number(double v) {
    char buf[64];
    if (!std::isfinite(v)) {
        return "-";
    }
    const double a = std::fabs(v);
    std::snprintf(buf, sizeof buf, a >= 100 || a == std::floor(a) ? "%.0f" : a >= 10 ? "%.1f" : "%.2f", v);
    return buf;
}

inline figure at_most(double limit, const std::string& note = {}) {
    return {"<= " + number(limit) + note, [limit](double ours, double, double) { return ours <= limit; }};
}

inline figure says(std::string text) {
    return {std::move(text), nullptr};
}

struct metric {
    std::string name;
    std::string unit;
    figure beat{};
    bool more_is_better = false;
};

/// A further peer, with a line of its own below the row.
struct other {
    std::string name;
    system_fn run{};
};

/// One experiment: measured by up to three systems and the other peers, yielding one or more rows.
struct group {
    std::vector<metric> metrics{};
    system_fn ours{}, floor{}, peer{};
    std::vector<other> others{};
    bool two_cpus = false;  // left out on a machine with one CPU
    int max_runs = 1000;    // for the slow ones
};

/// Cost of one operation in ns. `f(n)` performs n of them and returns the nanoseconds they took; n is found once and
/// then kept, so that every run does the same work.
template <class F>
system_fn per_op(F f, std::uint64_t first = 1000, std::uint64_t most = 200'000'000) {
    return [f = std::move(f), n = std::uint64_t{0}, first, most]() mutable -> sample {
        if (n == 0) {
            const double budget = opt().window * 1e6;
            n = first;
            for (;;) {
                const double took = (std::max)(f(n), 1.0);
                if (took >= budget / 2 || n >= most) {
                    break;
                }
                const double grow = (std::min)(10.0, budget / took);
                n = (std::min)(most, static_cast<std::uint64_t>(static_cast<double>(n) * grow) + 1);
            }
        }
        return {f(n) / static_cast<double>(n)};
    };
}

/// The same for work of a fixed size.
template <class F>
system_fn per_op_of(std::uint64_t n, F f) {
    return [f = std::move(f), n]() -> sample { return {f(n) / static_cast<double>(n)}; };
}

namespace detail {

inline std::string ratio(double a, double b) {
    return std::isfinite(a) && std::isfinite(b) && b > 0 ? number(a / b) : "-";
}

inline void line(const std::string& row, const std::string& unit, const std::string& ours, const std::string& floor,
                 const std::string& peer, const std::string& to_floor, const std::string& to_peer,
                 const std::string& beat, const std::string& met) {
    std::printf("| %-50s | %-5s | %9s | %9s | %9s | %7s | %7s | %-28s | %-3s |\n", row.c_str(), unit.c_str(),
                ours.c_str(), floor.c_str(), peer.c_str(), to_floor.c_str(), to_peer.c_str(), beat.c_str(),
                met.c_str());
    std::fflush(stdout);
}

inline double pick(const std::vector<sample>& runs, std::size_t m, bool more_is_better) {
    std::vector<double> v;
    for (const sample& s : runs) {
        if (m < s.size()) {
            v.push_back(s[m]);
        }
    }
    if (v.empty() || !opt().best) {
        return median(v);
    }
    return more_is_better ? *std::max_element(v.begin(), v.end()) : *std::min_element(v.begin(), v.end());
}

inline std::string range(const std::vector<sample>& runs, std::size_t m) {
    std::vector<double> v;
    for (const sample& s : runs) {
        if (m < s.size()) {
            v.push_back(s[m]);
        }
    }
    return v.empty() ? "-" : number(percentile(v, 0)) + ".." + number(percentile(v, 1));
}

inline bool wanted(const group& g) {
    for (const metric& m : g.metrics) {
        if (m.name.find(opt().filter) != std::string::npos) {
            return true;
        }
    }
    return false;
}

}  // namespace detail

inline void run_group(const group& g) {
    if (!detail::wanted(g)) {
        return;
    }
    if (opt().list) {
        for (const metric& m : g.metrics) {
            std::printf("%s [%s]\n", m.name.c_str(), m.unit.c_str());
        }
        return;
    }
    if (g.two_cpus && !can_split()) {
        for (const metric& m : g.metrics) {
            detail::line(m.name, m.unit, "-", "-", "-", "-", "-", "needs two CPUs", "-");
        }
        return;
    }
    const system_fn* systems[3] = {&g.ours, &g.floor, &g.peer};
    const std::string names[3] = {"ours", "floor", peer_name()};
    std::vector<sample> runs[3];
    std::vector<std::vector<sample>> other_runs(g.others.size());
    for (int r = 0; r < (std::min)(opt().runs, g.max_runs); ++r) {
        for (std::size_t s = 0; s < 3; ++s) {
            if (*systems[s] && (opt().only.empty() || opt().only == names[s])) {
                runs[s].push_back((*systems[s])());
            }
        }
        for (std::size_t k = 0; k < g.others.size(); ++k) {
            if (g.others[k].run && (opt().only.empty() || opt().only == g.others[k].name)) {
                other_runs[k].push_back(g.others[k].run());
            }
        }
    }
    for (std::size_t m = 0; m < g.metrics.size(); ++m) {
        const metric& it = g.metrics[m];
        const double ours = detail::pick(runs[0], m, it.more_is_better);
        const double floor = detail::pick(runs[1], m, it.more_is_better);
        const double peer = detail::pick(runs[2], m, it.more_is_better);
        const bool judged = it.beat.met && std::isfinite(ours);
        detail::line(it.name, it.unit, number(ours), number(floor), number(peer), detail::ratio(ours, floor),
                     detail::ratio(ours, peer), it.beat.text,
                     judged ? (it.beat.met(ours, floor, peer) ? "yes" : "no") : "-");
        if (opt().spread) {
            detail::line("    lowest..highest", it.unit, detail::range(runs[0], m), detail::range(runs[1], m),
                         detail::range(runs[2], m), "", "", "", "");
        }
        for (std::size_t k = 0; k < g.others.size(); ++k) {
            if (!other_runs[k].empty()) {
                const double value = detail::pick(other_runs[k], m, it.more_is_better);
                detail::line("    " + g.others[k].name, it.unit, "", "", number(value), "", detail::ratio(ours, value), "", "");
            }
        }
    }
}

inline void print_machine() {
    std::printf("compiler: "
#if defined(__clang__)
                "clang " __clang_version__
#elif defined(__GNUC__)
                "gcc " __VERSION__
#else
                "unknown"
#endif
#if defined(__OPTIMIZE__)
                ", optimised"
#else
                ", NOT OPTIMISED: the figures mean nothing"
#endif
                "\n");
    double load[1] = {std::numeric_limits<double>::quiet_NaN()};
#if defined(__linux__)
    if (getloadavg(load, 1) != 1) {
        load[0] = std::numeric_limits<double>::quiet_NaN();
    }
#endif
    std::printf("CPUs: %u, load before the first row: %s, %s of %d runs%s\n", std::thread::hardware_concurrency(),
                number(load[0]).c_str(), opt().best ? "best" : "median", opt().runs, opt().quick ? ", --quick" : "");
    std::printf("units k/s, M/s: thousands, millions of calls per second, more is better; every other unit: less is better\n\n");
}

inline void print_head() {
    detail::line("row", "unit", "ours", "floor", peer_name(), "/floor", "/peer", "to beat", "met");
    detail::line("---", "---", "---", "---", "---", "---", "---", "---", "---");
}

inline int run_all(const std::vector<group>& groups) {
    cpus();  // before anybody pins anything
    if (!opt().list) {
        print_machine();
        print_head();
    }
    for (const group& g : groups) {
        run_group(g);
    }
    return 0;
}

}  // namespace bench

#endif  // RTB_TESTS_BENCH_BENCH_HPP
