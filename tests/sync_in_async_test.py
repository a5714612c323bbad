#!/usr/bin/env python3
"""Plant blocking calls, and innocent code that looks like them, and see what sync_in_async says.

    tests/sync_in_async_test.py PROGRAM             test this binary
    tests/sync_in_async_test.py [--cxx COMPILER]    build tests/sync_in_async.cpp first

A comment '//! rule what' in a planted text is a finding expected on its line; nothing else may be found. Every name that
'PROGRAM --rules' lists must be planted, and leaving out a rule must lose exactly the findings of that rule.
"""
# SPDX-License-Identifier: MIT
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ADVICE = {
    "sleep": "co_await sleep_for",
    "stream": "use run_blocking",
    "file": "use run_blocking",
    "input": "use run_blocking",
    "system": "await readiness, or use run_blocking",
    "future": "use run_blocking",
    "condition": "use notify",
    "join": "use run_blocking",
    "blocking": "co_await the operation of the same name without it",
    "nested": "co_await the task",
    "wait": "co_await it",
}

# Statements of a coroutine with '//!' marks.
GUILTY = [
    "std::this_thread::sleep_for(1s); //! sleep std::this_thread::sleep_for",
    "std::this_thread::sleep_until(then); //! sleep std::this_thread::sleep_until",
    "this_thread::sleep_for(1s); //! sleep this_thread::sleep_for",
    "::std::this_thread::sleep_for(1s); //! sleep ::std::this_thread::sleep_for",
    "std :: this_thread :: sleep_for ( 1s ) ; //! sleep std::this_thread::sleep_for",
    "std::this_thread::\n/* when */ sleep_for(1s); //! sleep std::this_thread::sleep_for",
    "sleep(1); //! sleep sleep",
    "::sleep(1); //! sleep ::sleep",
    "if (a) { for (;;) { usleep(1); } } //! sleep usleep",
    "if (a) usleep(1); else sleep(1); //! sleep usleep //! sleep sleep",
    "::nanosleep(&ts, nullptr); //! sleep ::nanosleep",
    "clock_nanosleep(CLOCK_REALTIME, 0, &ts, nullptr); //! sleep clock_nanosleep",
    "int n = 1'000'000; sleep(n); //! sleep sleep",
    "char c = '\\''; sleep(1); char d = '\"'; //! sleep sleep",
    "auto s = R\"x(\" ) //)x\"; sleep(1); //! sleep sleep",
    "auto s = u8R\"(\\)\"; sleep(1); //! sleep sleep",
    "switch (a) { case 1: sleep(1); break; default: { usleep(2); } } //! sleep sleep //! sleep usleep",
    "try { sleep(1); } catch (const E& e) { usleep(2); } //! sleep sleep //! sleep usleep",
    "do { sleep(1); } while (a); //! sleep sleep",
    "v.push_back(x{ {1}, 2 }); sleep(1); //! sleep sleep",
    "struct point { int x, y; }; point q{1, 2}; sleep(1); //! sleep sleep",
    "struct inner { void m() { usleep(1); } }; sleep(1); //! sleep sleep",
    "auto l = [] { usleep(1); }; sleep(1); //! sleep sleep",
    "if constexpr (requires { x.wait(); }) sleep(1); //! sleep sleep",
    "MACRO(x) { sleep(1); } //! sleep sleep",
    "std::ifstream in(path); //! stream std::ifstream",
    "std::ifstream in{path}; //! stream std::ifstream",
    "std::ofstream out; //! stream std::ofstream",
    "fstream both(path); //! stream fstream",
    "auto s = std::ifstream(path); //! stream std::ifstream",
    "use(std::ofstream{path}); //! stream std::ofstream",
    "FILE* f = fopen(path, \"r\"); //! file fopen",
    "FILE* f = std::fopen(path, \"r\"); //! file std::fopen",
    "auto n = std::fread(b, 1, 9, f); //! file std::fread",
    "fwrite(b, 1, 9, f); //! file fwrite",
    "while (std::fgets(b, 9, f)) g(); //! file std::fgets",
    "fputs(b, f); //! file fputs",
    "fgetc(f); //! file fgetc",
    "fscanf(f, \"%d\", &n); //! file fscanf",
    "::fflush(f); //! file ::fflush",
    "std::fclose(f); //! file std::fclose",
    "if (fsync(fd) != 0) g(); //! file fsync",
    "fdatasync(fd); //! file fdatasync",
    "pclose(popen(\"ls\", \"r\")); //! file pclose //! file popen",
    "std::getline(std::cin, line); //! input std::getline",
    "while (getline(cin, line)) g(); //! input getline",
    "std::cin >> n; //! input std::cin >>",
    "std::getchar(); //! input std::getchar",
    "auto n = ::read(fd, b, 9); //! system ::read",
    "auto n = read(fd, b, 9); //! system read",
    "if (x > read(fd, b, 9)) g(); //! system read",
    "if (a < b) g(); n = c > read(fd, b, 9); //! system read",
    "co_return write(fd, b, 9); //! system write",
    "co_await f(1 + ::write(fd, b, 9)); //! system ::write",
    "co_await f(::write(fd, b, 9)); //! system ::write",
    "pread(fd, b, 9, 0); pwrite(fd, b, 9, 0); //! system pread //! system pwrite",
    "readv(fd, v, 2); writev(fd, v, 2); //! system readv //! system writev",
    "::recv(fd, b, 9, 0); ::recvfrom(fd, b, 9, 0, a, l); ::recvmsg(fd, m, 0); //! system ::recv //! system ::recvfrom //! system ::recvmsg",
    "::send(fd, b, 9, 0); sendto(fd, b, 9, 0, a, l); sendmsg(fd, m, 0); //! system ::send //! system sendto //! system sendmsg",
    "const bool ok = up && connect(fd, a, l) == 0; //! system connect",
    "int peer = accept(fd, nullptr, nullptr); //! system accept",
    "::poll(&p, 1, -1); ppoll(&p, 1, t, s); //! system ::poll //! system ppoll",
    "select(1, r, w, e, t); pselect(1, r, w, e, t, s); //! system select //! system pselect",
    "epoll_wait(fd, e, 1, -1); //! system epoll_wait",
    "waitpid(pid, &status, 0); //! system waitpid",
    "getaddrinfo(host, port, &hints, &found); //! system getaddrinfo",
    "std::system(\"ls\"); //! system std::system",
    "std::future<int> f = g(); f.get(); //! future .get",
    "std::future<std::vector<int>> f{g()}; int n = f.get(); //! future .get",
    "std::shared_future<int> f(g()); use(f.get()); //! future .get",
    "auto f = std::async(g); f.wait(); //! future .wait",
    "auto f = p.get_future(); f.wait_for(1s); //! future .wait_for",
    "std::async(g).get(); //! future .get",
    "std::vector<std::future<int>> fs; for (auto& f : fs) f.get(); //! future .get",
    "std::vector<std::future<int>> fs; fs[0].get(); fs.back().get(); //! future .get //! future .get",
    "const std::future<int>& f = g(); f.wait_until(then); //! future .wait_until",
    "std::condition_variable cv; cv.wait(l); //! condition .wait",
    "std::condition_variable_any cv; cv.wait_for(l, 1s); cv.wait_until(l, then); //! condition .wait_for //! condition .wait_until",
    "std::thread t(g); t.join(); //! join .join",
    "std::jthread t{g}; t.join(); //! join .join",
    "auto t = std::thread([] { g(); }); t.join(); //! join .join",
    "std::vector<std::thread> ts; for (std::thread& t : ts) t.join(); //! join .join",
    "std::vector<std::thread> ts; for (auto& t : ts) t.join(); ts[0].join(); //! join .join //! join .join",
    "auto r = out.send_blocking(1); //! blocking .send_blocking",
    "auto r = in->recv_blocking(); //! blocking .recv_blocking",
    "use(pair.second.recv_blocking<int>(1s)); //! blocking .recv_blocking",
    "bridge.block_on(g()); //! nested .block_on",
    "auto r = bridge->block_on_for(1s, g()); //! nested .block_on_for",
    "this->bridge().block_on_until(then, g()); //! nested .block_on_until",
    "clock.run_until_idle(); //! nested .run_until_idle",
    "rtb::block_on(g()); //! nested rtb::block_on",
    "auto r = h.wait(); //! wait .wait",
    "co_return h.wait().value(); //! wait .wait",
    "co_await f(h.wait().value()); //! wait .wait",
    "if (h.wait_for(1s)) g(); //! wait .wait_for",
    "sched.spawn(g()).wait(); //! wait .wait",
    "h->wait_until(then); //! wait .wait_until",
    "auto r = h.wait(); use(r); co_await r2; //! wait .wait",
    "std::move(h).wait(); //! wait .wait",
    "flag.wait(false); //! wait .wait",
    "std::lock_guard l(m);\nco_await x; //! lock l 1 co_await",
    "std::lock_guard<std::mutex> l{m};\nif (a) {\n co_await x; //! lock l 1 co_await\n}",
    "const std::scoped_lock l(m, n);\nauto v = co_await x; co_await y; //! lock l 1 co_await //! lock l 1 co_await",
    "std::shared_lock<std::shared_mutex> l(m);\nco_yield 1; //! lock l 1 co_yield",
    "auto l = std::unique_lock(m);\nco_await x; //! lock l 1 co_await",
    "auto l = std::unique_lock<std::mutex>{m};\nco_return co_await x; //! lock l 1 co_await",
    "std::unique_lock l(m);\nif (a) l.unlock();\nco_await x; //! lock l 1 co_await",
    "std::unique_lock l(m);\nif (a) { l.unlock(); co_await x; }\nco_await y; //! lock l 1 co_await",
    "std::unique_lock l(m);\nl.unlock();\nl.lock();\nco_await x; //! lock l 1 co_await",
    "std::unique_lock l(m, std::defer_lock);\nl.lock();\nco_await x; //! lock l 1 co_await",
    "std::unique_lock l(m);\nother.unlock(); w.l.unlock();\nco_await x; //! lock l 1 co_await",
    "if (std::lock_guard l(m); a) {\n co_await x; //! lock l 1 co_await\n} else\n co_await y; //! lock l 1 co_await\nco_await z;",
    "std::lock_guard a(m);\n{ std::lock_guard b(n);\n co_await x; } //! lock a 1 co_await //! lock b 2 co_await\nco_await y; //! lock a 1 co_await",
    "// allow-sync-in-async: a comment exempts one line\nsleep(1);\nsleep(2); //! sleep sleep",
    "sleep(1); // allow-sync-in-async: this line\nsleep(2); //! sleep sleep",
    "// Write '// allow-sync-in-async: reason' to exempt a line.\nsleep(1); //! sleep sleep",
    "auto s = \"// allow-sync-in-async: no\"; sleep(1); //! sleep sleep",
]
INNOCENT = [
    "co_await rtb::sleep_for(1s);",
    "co_await sleep_for(1s);",
    "co_await this_task::sleep_for(1s);",
    "x.sleep(1); x->usleep(1);",
    "rtb::sleep(1); other::usleep(1);",
    "// sleep(1);\n/* sleep(1); */ /* std::ifstream in(path); */",
    "auto s = \"sleep(1)\"; auto r = R\"--(sleep(1); )\" )--\"; auto t = LR\"(\nsleep(1);\n)\";",
    "// a continued comment \\\nsleep(1);",
    "#define NAP sleep(1)\n#define REST \\\n  sleep(2)",
    "#if 0\nsleep(1);\n#endif",
    "int sleep = 1; use(sleep);",
    "a = read < 3; b = 4 > (x);",
    "auto f = &::sleep; use(::read, fd);",
    "auto l = [] { sleep(1); }; l();",
    "co_await run_blocking([fd] { return ::read(fd, nullptr, 0); });",
    "auto work = [path]() mutable noexcept -> std::pair<int, int> { std::ifstream in(path); return {}; };",
    "auto l = []<class T>(T t) requires (sizeof(T) > 1) { t.wait(); };",
    "auto l = [](auto x) requires requires { x.y; } { sleep(1); };",
    "use([=, this, p = std::move(q)] { sleep(1); }, [&](int a[]) { usleep(a[0]); });",
    "struct inner { int m() const { return ::read(0, b, 1); } int n = 0; };",
    "struct inner : base<int> { inner() : base{1}, n{2} { sleep(1); } ~inner() { sleep(1); } int n; };",
    "struct inner { template <class T> auto operator()(T t) -> decltype(t.wait()) { sleep(1); return t.wait(); } };",
    "std::ifstream& in = g(); in.get(); use(in);",
    "std::vector<std::ifstream> v; std::ifstream* p = nullptr; my::ifstream q(path);",
    "using stream = std::ofstream;",
    "file.fopen(path); my::fopen(path); obj->fread(b);",
    "std::getline(text, line); getline(stream, line);",
    "use(std::cin); std::cout << 1;",
    "ch.send(v); obj.read(); p->recv(); s.connect(a); listener->accept(); (*x).poll(); y[0].select();",
    "co_await read(fd, b); co_await connect(a); auto n = co_await poll(fd);",
    "co_await net::connect(a); net::send(b); sock::recv(c);",
    "auto r = co_await rtb::when_any(read(a), accept(b));",
    "auto t = connect(a); co_await std::move(t);",
    "auto read = [](int) { return 1; }; read(2);",
    "std::vector<char> read(9); int poll(3);",
    "using net::connect; auto t = connect(a);",
    "std::unique_ptr<int> f; f.get(); g().get(); x->get(); map.get(1);",
    "auto next = co_await rtb::when_any(a, b); std::move(next).get<1>(); next.get<0>();",
    "rtb::future<int> f; f.get(); std::optional<int> o; o.wait;",
    "auto f = co_await std::async(g); f.get();",
    "auto f = h([] { return std::async(g); }); f.get();",
    "{ std::future<int> f; } { std::unique_ptr<int> f; f.get(); }",
    "path.join(x); str.join(); strings::join(a, b); co_await h.join();",
    "std::thread t(g); co_await t.join(); t.detach(); t.joinable();",
    "co_await n.wait();",
    "co_await (n.wait()); co_await this->n.wait(); co_await w.lever.wait();",
    "co_await std::move(h).wait(); co_await g(1)[2].wait();",
    "co_await rtb::when_any(n.wait(), rtb::with_timeout(1s, m->wait()));",
    "auto w = n.wait(); co_await w;",
    "auto w = n.wait(); auto both = rtb::when_all(std::move(w), g()); co_await std::move(both);",
    "group.spawn(n.wait()); sched.spawn(rtb::with_timeout(1s, n.wait()));",
    "rtb::notify n; auto w = n.wait(); use(w);",
    "auto r = co_await in.wait_for(1s); co_await h.wait_until(then);",
    "wait(); x.wait; obj.waiter();",
    "co_await rtb::run_blocking(work); pool.run_blocking(work); socket.non_blocking(true); s.is_blocking(); s.set_blocking(false);",
    "auto v = co_await x.recv_blocking();",
    "co_await b.block_on(g()); int block_on = 1; use(&b::block_on);",
    "{ std::lock_guard l(m); g(); }\nco_await x;",
    "std::unique_lock l(m); l.unlock();\nco_await x;",
    "std::unique_lock l(m); { l.unlock(); co_await x; l.lock(); }",
    "std::unique_lock l(m, std::defer_lock); co_await x;",
    "std::unique_lock<std::mutex> l; co_await x;",
    "auto l = [&] { std::lock_guard g(m); return 1; }; co_await x;",
    "auto t = [&]() -> task<> { co_await x; }; std::lock_guard l(m); use(t);",
    "co_await x; std::lock_guard l(m); g();",
    "auto l = co_await m.lock(); co_await x;",
    "coro::scoped_lock l(m); co_await x;",
    "std::scoped_lock l{co_await m.scoped_lock_async()}; co_await x;",
    "std::lock_guard<std::mutex>* p = nullptr; std::unique_lock<std::mutex>& r = g(); co_await x;",
    "if (std::lock_guard l(m); a) { g(); } else { h(); } co_await x;",
    "for (;;) { std::lock_guard l(m); if (a) break; } co_await x;",
    "std::unique_lock l(m); g(std::move(l)); int n = 0; l.release(); co_await x;",
    "sleep(1); // allow-sync-in-async: shows what not to do",
    "// allow-sync-in-async: shows what not to do\nsleep(1);",
    "// allow-sync-in-async: shows what not to do,\n// in two lines\nsleep(1);",
    "/* allow-sync-in-async: a block comment */ sleep(1);",
    "std::lock_guard l(m);\nco_await x; // allow-sync-in-async: only this thread takes m",
    "decltype(sleep(1)) n = 0; constexpr auto size = sizeof(read(1, b, 2));",
    "if constexpr (requires { x.wait(); sleep(1); }) g();",
]

# Whole files.
FILES = [
    "void plain() { sleep(1); std::ifstream in(path); bridge.block_on(x); }\n",
    "void plain() {\n auto c = []() -> task<> { co_await x; sleep(1); }; //! sleep sleep\n sleep(1);\n}\n",
    "task<> a() { co_await x; }\nvoid b() { sleep(1); }\ntask<> c() { sleep(1); co_await x; } //! sleep sleep\n",
    "namespace n { inline namespace v1 { struct s { task<> m() const noexcept { sleep(1); co_return; } }; } } //! sleep sleep\n",
    "struct s {\n s() : a{1}, b(2), c{f(3)} { sleep(1); }\n task<> m() { co_await x; sleep(1); } //! sleep sleep\n int a{3}; std::function<void()> b;\n};\n",
    "template <class T> requires (C<T> && sizeof(T) > 1)\ntask<T> f(T a = {}) requires requires(T t) { t.x; } {\n co_await a; sleep(1); //! sleep sleep\n}\n",
    "template <class T, int N = (3 > 2)> auto f(T&& t) -> task<std::pair<T, std::array<int, N>>> {\n sleep(1); co_return t; //! sleep sleep\n}\n",
    "auto f() -> decltype(g(T{})) { co_await x; sleep(1); } //! sleep sleep\n",
    "task<> f() try { co_await x; } catch (...) { sleep(1); } //! sleep sleep\n",
    "struct s { s() try : a{1} { } catch (...) { sleep(1); } task<> m() { sleep(1); co_return; } }; //! sleep sleep\n",
    "struct awaitable { auto operator co_await() const noexcept { sleep(1); return 1; } };\n",
    "void f() { struct a { int operator co_await(); }; sleep(1); }\n",
    "struct s { bool operator<(s o) { return 1; } task<> operator()(int n) { sleep(n); co_return; } }; //! sleep sleep\n",
    "struct s { task<> operator=(int) { co_await x; sleep(1); } task<> operator[](int) { sleep(1); co_return; } }; //! sleep sleep //! sleep sleep\n",
    "struct s { task<> read(int); task<> m() { co_await x; auto t = read(1); keep(t); } };\n",
    "struct s { task<> read(int); task<> m() { co_await x; ::read(1, b, 2); } }; //! system ::read\n",
    "struct s { std::thread worker_; task<> m(); };\ntask<> s::m() { co_await x; worker_.join(); this->worker_.join(); } //! join .join //! join .join\n",
    "struct s { task<> m() { co_await x; worker_.join(); cv_.wait(l); } //! join .join //! condition .wait\n"
    " std::thread worker_; std::condition_variable cv_; };\n",
    "task<> f(std::future<int> f, std::thread& t) { co_return f.get(), t.join(); } //! future .get //! join .join\n"
    "task<> g(std::unique_ptr<int> f) { co_return f.get(); }\n",
    "#define BODY { sleep(1); co_return; }\ntask<> f() BODY\n",
    "#if A\ntask<> f(int) {\n#else\ntask<> f() {\n#endif\n sleep(1); co_return; //! sleep sleep\n}\nvoid g() { sleep(1); }\n",
    "#if A\nvoid f() { sleep(1); }\n#elif B\ntask<> f() { co_await x; sleep(1); } //! sleep sleep\n"
    "#else\ntask<> g() { co_return sleep(1); } //! sleep sleep\n#endif\n",
    "#ifdef A // it's\n#error don't \"/*\n#endif\ntask<> f() { co_await x; sleep(1); } //! sleep sleep\n",
    "TEST_CASE(\"it's a { test\") {\n auto t = [&]() -> task<int> { co_await x; sleep(1); co_return 1; }; //! sleep sleep\n}\n",
    "EXPORT(api) class DLL(api) c final : public b<(1 > 2)> { task<> m() override { co_await x; sleep(1); } }; //! sleep sleep\n",
    "extern \"C\" { int read(int); }\nextern \"C\" int main() { sleep(1); }\n"
    "enum class e : int { a = 1, b };\nstruct stat* f() { sleep(1); return nullptr; }\n",
    "struct x y() { co_await z; sleep(1); } //! sleep sleep\n",
    "std::vector<int> v{f(1), 2}; int w = g([] { return 1; }); task<> h() { sleep(1); co_return; } //! sleep sleep\n",
    "auto table = std::map<int, task<>(*)()>{{1, [] () -> task<> { sleep(1); co_return; }}}; //! sleep sleep\n",
    "task<> f(std::function<void()> g = [] { sleep(1); }) { co_await x; }\n",
    "concept c = requires(T t) { { t.wait() } -> std::same_as<int>; };\ntask<> f() { co_await x; sleep(1); } //! sleep sleep\n",
    "int a = x < y; bool b = x > y;\ntask<> f() { if (a < b && c > d) sleep(1); co_return; } //! sleep sleep\n",
    "task<> f() {\r\n  // text \\\r\n  sleep(1);\r\n  co_await x; sleep(2); //! sleep sleep\r\n}\r\n",
    "\ufefftask<> f() { co_await x; sleep(2); } //! sleep sleep\n",
    "\ufeff#if 0\ntask<> f() { co_await x; sleep(2); }\n#endif\n",
    "task<> f() {\n std::this_thread::sle\\\nep_for(1s); co_return;\n} // the finding is on line 2: {2: sleep std::this_thread::sleep_for}\n",
    "int x; // allow-sync-in-async\n// {1: exemption}\n",
    "// allow-sync-in-async:   \nint x; // {1: exemption}\n",
    "task<> f() { co_await x;\n // allow-sync-in-async\n sleep(1); //! sleep sleep\n} // {2: exemption}\n",
    "task<> f() { auto [a, b] = co_await x; auto& [c, d] = a; e[0] = g[f(1)] ; sleep(1); } //! sleep sleep\n",
    "template <> struct hash<key> { int operator()(const key& k) const { sleep(1); return 0; } };\n",
    "[[nodiscard]] inline task<> f [[gnu::noinline]] (int n [[maybe_unused]]) { sleep(1); co_return; } //! sleep sleep\n",
    "namespace n { task<> f() { co_await x; } void g() { sleep(1); } }\n",
    "struct s { int operator[](int) { return 1; } struct t { task<> m() { co_await x; } void n() { sleep(1); } }; };\n",
    "T v{co_await x};\nsleep(1); //! sleep sleep\n",
    "s::s() : a{1} { sleep(1); }\nint n = co_await x;\n",
    "",
    "co_await } ) ; task<> f() { co_await x; sleep(1); } //! sleep sleep\n",
]

README = """# sleep(1); co_await
text
```cpp
task<> f() { co_await x; sleep(1); } //! sleep sleep
```
~~~ not a fence of ours
```sh
task<> f() { co_await x; sleep(1); }
```
<!-- fragment -->
```cpp
auto v = co_await rx.recv();
if (v) { sleep(1); } //! sleep sleep
for (int i = 0; i < 3; ++i) { usleep(2); } //! sleep usleep
auto work = [x] { sleep(1); };
std::lock_guard l(m);
co_await y; //! lock l 16 co_await
```
- list
  ```c++
  task<> f() { sleep(1); co_return; } //! sleep sleep
  ```
```cpp
task<> open_at_the_end() { sleep(1); co_return; } //! sleep sleep
"""


def expected(name, text):
    """The lines that the program has to print for a text."""
    found = []
    for n, line in enumerate(text.split("\n"), 1):
        found += [(n, mark) for mark in re.findall(r"//! (.*?)\s*(?=//!|$)", line)]
        found += [(int(at), mark) for at, mark in re.findall(r"\{(\d+): ([^}]*)\}", line)]
    lines = []
    for n, mark in sorted(found, key=lambda pair: pair[0]):
        rule, _, what = mark.partition(" ")
        if rule == "lock":
            lock, since, keyword = what.split()
            reason = f"'{lock}', a lock since line {since}, is held across {keyword}; unlock it first"
        elif rule == "exemption":
            reason = "an exemption needs a reason: '// allow-sync-in-async: reason'"
        else:
            reason = f"'{what}' blocks the thread of the scheduler; {ADVICE[rule]}"
        lines.append(f"{name}:{n}: {rule}: {reason}")
    return lines


def in_a_coroutine(code):
    """A file with the code in a coroutine, from its second line on."""
    code = re.sub(r"(//! lock \w+ )(\d+)", lambda mark: f"{mark.group(1)}{int(mark.group(2)) + 1}", code)
    return "task<> coroutine() {\n" + code + "\nco_return;\n}\n"


class Checks:
    """Runs the program and counts what is wrong."""

    def __init__(self, program, directory):
        self.program, self.directory, self.wrong = program, directory, 0

    def run(self, *arguments):
        """Return (exit code, lines of standard output, standard error)."""
        done = subprocess.run([self.program, *arguments], cwd=self.directory, capture_output=True, text=True, encoding="utf-8", check=False)
        return done.returncode, done.stdout.splitlines(), done.stderr

    def equal(self, what, found, wanted):
        """Complain about a difference."""
        if found != wanted:
            self.wrong += 1
            if isinstance(found, list) and isinstance(wanted, list):
                wanted, found = [x for x in wanted if x not in found] or wanted, [x for x in found if x not in wanted] or found
            print(f"sync_in_async_test: {what}:\n  expected {wanted}\n  found    {found}")


def check(program, directory):
    """All checks; returns (number wrong, guilty, innocent)."""
    checks = Checks(program, directory)
    texts = {}
    for kind, codes in (("guilty", map(in_a_coroutine, GUILTY)), ("innocent", map(in_a_coroutine, INNOCENT)), ("whole", FILES)):
        for n, text in enumerate(codes):
            texts[f"{kind}/{n:03}.cpp"] = text
    texts["document.md"] = README
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode("utf-8"))

    # What is found, file by file.
    wanted = {name: expected(name, text) for name, text in texts.items()}
    code, lines, _ = checks.run("guilty", "innocent", "whole", "document.md")
    for name, text in texts.items():
        checks.equal(f"{name}\n{text}", [line for line in lines if line.startswith(name + ":")], wanted[name])
        if name.startswith("guilty") and not wanted[name]:
            checks.equal(f"{name} plants nothing", text, "")
    everything = [line for name in texts for line in wanted[name]]
    checks.equal("exit code of findings", code, 1)
    checks.equal("last line", lines[-1:], [f"sync_in_async: {len(texts)} files, {len(everything)} findings"])
    checks.equal("innocent code", checks.run("innocent")[:2], (0, [f"sync_in_async: {len(INNOCENT)} files, 0 findings"]))

    # Every rule and every name in it matters.
    code, listed, _ = checks.run("--rules")
    checks.equal("exit code of --rules", code, 0)
    rules = {line.split(":")[0]: line.split(":")[1].split() for line in listed}
    checks.equal("rules that are tested", sorted(rules), sorted([*ADVICE, "lock", "exemption"]))
    rule_of = re.compile(r"^[^:]*:\d+: (\w+): ")
    for rule, words in rules.items():
        without = [line for line in everything if rule_of.match(line).group(1) != rule]
        checks.equal(f"rule {rule} is planted", len(without) < len(everything), True)
        found = checks.run("--without", rule, "guilty", "innocent", "whole", "document.md")[1][:-1]
        checks.equal(f"without rule {rule}", sorted(found), sorted(without))
        planted = "\n".join(texts[name] for name in texts if any(f": {rule}: " in line for line in wanted[name]))
        for word in words:
            mark = rf"//! {rule} \S*?" if rule in ADVICE else r""
            pattern = mark + (r"_blocking\b" if word == "*_blocking" else rf"\b{word}\b")
            checks.equal(f"'{word}' of rule {rule} is planted", bool(re.search(pattern, planted)), True)

    # Paths.
    (directory / "tree" / ".hidden").mkdir(parents=True)
    (directory / "tree" / "deep").mkdir()
    (directory / "empty").mkdir()
    bad, line = "task<> f() { sleep(1); co_return; } //! sleep sleep\n", []
    for name in ("a.hpp", "b.h", "c.cpp", "deep/d.cc", "deep/e.cxx", "f.ipp"):
        (directory / "tree" / name).write_text(bad, encoding="utf-8")
        line += expected("tree/" + name, bad)
    for name in ("g.txt", ".hidden/h.cpp", "i.py"):
        (directory / "tree" / name).write_text(bad, encoding="utf-8")
    (directory / "tree" / "j.md").write_text(bad, encoding="utf-8")
    checks.equal("a directory", checks.run("tree")[:2], (1, line + ["sync_in_async: 7 files, 6 findings"]))
    checks.equal("a named file", checks.run("tree/g.txt")[:2], (1, expected("tree/g.txt", bad) + ["sync_in_async: 1 files, 1 findings"]))
    code, lines, error = checks.run("missing.cpp", "tree/c.cpp")
    checks.equal("a missing file", (code, lines[:-1], "missing.cpp" in error), (2, expected("tree/c.cpp", bad), True))
    checks.equal("an empty directory", checks.run("empty")[0], 2)
    for name, text in (("opened.cpp", "\nvoid f() { if (a) {\n}\n"), ("closed.cpp", "\n}\n")):
        (directory / name).write_text(text, encoding="utf-8")
        note = f"sync_in_async: {name}:2: brackets don't match here; findings may be missing\n"
        checks.equal("unmatched brackets", checks.run(name), (0, ["sync_in_async: 1 files, 0 findings"], note))
    checks.equal("matched brackets", checks.run("innocent")[2], "")
    for usage in ([], ["--nonsense"], ["--without", "nonsense", "tree"], ["--without"], ["--rules", "tree"], ["--without", "sleep"]):
        code, lines, error = checks.run(*usage)
        checks.equal(f"usage {usage}", (code, lines, error.startswith("usage:")), (2, [], True))
    return checks.wrong, len(everything), len(INNOCENT)


def main(arguments):
    """Run the command line."""
    compiler = "c++"
    if arguments[:1] == ["--cxx"] and len(arguments) == 2:
        compiler, arguments = arguments[1], []
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        if arguments:
            program = pathlib.Path(arguments[0]).resolve()
        else:
            program = directory / "sync_in_async"
            subprocess.run([compiler, "-std=c++20", "-o", str(program), str(HERE / "sync_in_async.cpp")], check=True)
        (directory / "planted").mkdir()
        wrong, guilty, innocent = check(str(program), directory / "planted")
    print("sync_in_async_test: " + (f"failed, {wrong} wrong" if wrong else f"ok, {guilty} violations, {innocent} innocent look-alikes"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
