// thumbnailer.cpp - a batch of real files, in the background, that survives being interrupted: every image is a row of a
// journal, and a body that makes its thumbnail. It is stopped half-way and goes on with a new runner.
//
// A thumbnail is written under a temporary name and then renamed: it is there as a whole or not at all, and making it twice
// does no harm. That is what makes a job safe to re-run.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

using namespace std::chrono_literals;
namespace fs = std::filesystem;
using text = rtb::expected<std::string, rtb::process_error>;

// ---- images: plain binary PGM (P5, grey) and PPM (P6, colour) -----------------------------------------------------------

struct image {
    std::size_t width = 0, height = 0, channels = 1;
    std::string pixels;
};
std::optional<image> load(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    std::string magic;
    std::size_t most = 0;
    image i;
    if (!(in >> magic >> i.width >> i.height >> most) || (magic != "P5" && magic != "P6") || most != 255) return std::nullopt;
    if (i.width == 0 || i.height == 0 || i.width > 10000 || i.height > 10000) return std::nullopt;
    i.channels = magic == "P6" ? 3 : 1;
    i.pixels.resize(i.width * i.height * i.channels);
    in.get();
    if (!in.read(i.pixels.data(), static_cast<std::streamsize>(i.pixels.size()))) return std::nullopt;
    return i;
}
bool save(const image& i, const fs::path& path) {
    const fs::path unfinished = path.string() + ".part";
    std::ofstream out(unfinished, std::ios::binary);
    out << (i.channels == 3 ? "P6 " : "P5 ") << i.width << ' ' << i.height << " 255\n" << i.pixels;
    out.close();
    std::error_code e;
    if (out) fs::rename(unfinished, path, e);
    return out && !e;
}
image halved_until(image i, std::size_t side) {  // averages 2 x 2 pixels
    while (i.width > side || i.height > side) {
        image half{(i.width + 1) / 2, (i.height + 1) / 2, i.channels, {}};
        for (std::size_t y = 0; y < half.height; ++y)
            for (std::size_t x = 0; x < half.width; ++x)
                for (std::size_t c = 0; c < i.channels; ++c) {
                    unsigned sum = 0, n = 0;
                    for (std::size_t v = 2 * y; v < 2 * y + 2 && v < i.height; ++v)
                        for (std::size_t u = 2 * x; u < 2 * x + 2 && u < i.width; ++u, ++n)
                            sum += static_cast<unsigned char>(i.pixels[(v * i.width + u) * i.channels + c]);
                    half.pixels.push_back(static_cast<char>(sum / n));
                }
        i = std::move(half);
    }
    return i;
}

// ---- the job ----------------------------------------------------------------------------------------------------------

text make_thumbnail(std::string from) {
    std::optional<image> original = load(from);
    if (!original) return rtb::unexpected(rtb::process_error(from + " is no image"));  // final: it will not become one
    const fs::path to = from + ".thumb";
    // A disk that is full now may have room later: retry is asked again, up to the row's max_attempts.
    if (!save(halved_until(std::move(*original), 32), to)) return rtb::unexpected(rtb::process_error(rtb::process_errc::retry, "can't write it"));
    return to.string();
}
struct interruption {  // here after some jobs; in a program of yours, by a signal handler's thread
    std::size_t jobs_left;  // 0: never
    rtb::cancellation_token token{};
};
rtb::task<text> thumbnail_job(rtb::process_context& job, interruption& interrupt) {
    if (job.token().is_cancelled()) co_return rtb::unexpected(rtb::process_error(rtb::process_errc::cancelled));
    text made = co_await rtb::run_blocking(make_thumbnail, job.input());  // files and arithmetic: not on this thread
    if (interrupt.jobs_left != 0 && --interrupt.jobs_left == 0) interrupt.token.cancel();
    co_return made;
}

template <class T> auto now(rtb::task<T> t) {  // blocks until it has answered
    rtb::scheduler s;
    return std::move(*s.block_on(std::move(t)));
}
// Until all is done or it is interrupted; what is left stays in the journal. How many have ended.
std::size_t work_on(const std::shared_ptr<rtb::journal_process_registry>& jobs, const std::vector<std::string>& images, std::size_t jobs_left) {
    interruption interrupt{jobs_left};
    rtb::durable_process_worker_config config;
    config.registry = jobs;
    config.handler = [&interrupt](rtb::process_context& job) { return thumbnail_job(job, interrupt); };
    config.owner = rtb::process_owner("thumbnailer");
    config.concurrency = 4;
    auto handle = std::make_shared<rtb::inline_process_run_handle>(std::move(config));
    auto [poke, runner] = rtb::process_work_runner::spawn(std::move(handle), interrupt.token);
    const rtb::process_work_driver driver(jobs, poke);
    for (std::size_t i = 0; jobs_left == 0 && i < images.size(); ++i) static_cast<void>(now(driver.await_terminal(images[i])));
    if (jobs_left == 0) runner.cancel();
    static_cast<void>(runner.wait());  // bodies that run when it is stopped come to their end, or give their attempt back
    std::size_t ended = 0;
    for (const std::string& id : images) {
        const auto row = now(jobs->try_get(id));
        ended += row && *row && (*row)->status == rtb::process_status::completed ? 1 : 0;
    }
    return ended;
}

int main() {
    const fs::path dir = fs::temp_directory_path() / ("thumbnails-" + std::to_string(std::chrono::system_clock::now().time_since_epoch().count()));
    fs::create_directories(dir);
    std::vector<std::string> images;
    for (std::size_t n = 0; n < 60; ++n) {
        image i{65 + n, 240 - n, n % 2 == 0 ? std::size_t{3} : std::size_t{1}, {}};
        i.pixels.assign(i.width * i.height * i.channels, static_cast<char>(n));  // one colour: so is the thumbnail
        images.push_back((dir / (std::to_string(n) + (i.channels == 3 ? ".ppm" : ".pgm"))).string());
        if (!save(i, images.back())) return 1;
    }
    bool good = true;
    std::size_t before = 0, after = 0;
    for (const std::size_t jobs_left : {images.size() / 2, std::size_t{0}}) {  // each could be another run of the program
        auto jobs = rtb::journal_process_registry::open((dir / "journal").string());
        if (!jobs) return 1;
        for (const std::string& path : images) {  // again and again the same: that changes nothing
            rtb::process_registration row;
            row.id = row.input = path;
            row.kind = "thumbnail";
            row.disposition = rtb::process_disposition::rerunnable;
            good = now((*jobs)->register_process(std::move(row))).has_value() && good;
        }
        before = after;
        after = work_on(*jobs, images, jobs_left);
        std::printf("%u of %u thumbnails\n", static_cast<unsigned>(after), static_cast<unsigned>(images.size()));
    }
    good = good && before >= images.size() / 2 && before < images.size() && after == images.size();
    for (std::size_t n = 0; n < images.size(); ++n) {
        const std::optional<image> t = load(images[n] + ".thumb");
        good = good && t && t->width <= 32 && t->height <= 32 && t->pixels == std::string(t->pixels.size(), static_cast<char>(n));
    }
    for (const fs::directory_entry& f : fs::directory_iterator(dir)) good = good && f.path().extension() != ".part";
    fs::remove_all(dir);
    std::printf("%s\n", good ? "all there" : "something is missing");
    return good ? 0 : 1;
}
