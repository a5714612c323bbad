#!/usr/bin/env bash
# The headers as other projects use them, tried in a temporary directory: CMake subdirectory, installed CMake package,
# pkg-config, Meson subproject, one copied file. Prints 'PASSED name', 'FAILED name' or 'SKIPPED name' for each.
# Environment: CXX, CXXFLAGS.
# SPDX-License-Identifier: MIT
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CXX=${CXX:-g++} CXXFLAGS=${CXXFLAGS:-}
if command -v ninja >/dev/null 2>&1; then export CMAKE_GENERATOR=${CMAKE_GENERATOR:-Ninja}; fi
failures=0

number=$(sed -n 's/^#define RTB_RUNTIME_BRIDGE_VERSION \([0-9][0-9]*\).*/\1/p' "$root/runtime_bridge.hpp")
major=$((number / 10000)) minor=$((number / 100 % 100)) patch=$((number % 100))
version=$major.$minor.$patch

# step NAME COMMAND...: the command must succeed; refused NAME COMMAND...: it must fail, with the pattern in $because.
step() {
    local name=$1
    shift
    if "$@" >"$work/log" 2>&1; then
        echo "PASSED $name"
    else
        tail -n 30 "$work/log"
        echo "FAILED $name"
        failures=$((failures + 1))
    fi
}
refused() {
    local name=$1
    shift
    if ! "$@" >"$work/log" 2>&1 && grep -qE "$because" "$work/log"; then
        echo "PASSED $name"
    else
        tail -n 30 "$work/log"
        echo "FAILED $name"
        failures=$((failures + 1))
    fi
}

cmake_consumer() { # kind, then options
    local kind=$1
    shift
    rm -rf "$work/build-$kind"
    cmake -S "$here/$kind" -B "$work/build-$kind" "$@" && cmake --build "$work/build-$kind" && "$work/build-$kind/consumer"
}
install_cmake() {
    cmake -S "$root" -B "$work/build" -DRTB_BUILD_TESTS=OFF -DRTB_INSTALL=ON -DCMAKE_INSTALL_PREFIX="$work/prefix" &&
        cmake --install "$work/build" &&
        test -e "$work/prefix/include/runtime_bridge.hpp" && test -e "$work/prefix/include/concurrency.hpp"
}

step cmake_subdirectory cmake_consumer cmake_subdirectory -DRUNTIME_BRIDGE_SOURCE="$root"
step cmake_install install_cmake
step cmake_find_package cmake_consumer cmake_find_package -DCMAKE_PREFIX_PATH="$work/prefix" -DWANTED_VERSION="$version"
step cmake_find_package_any cmake_consumer cmake_find_package -DCMAKE_PREFIX_PATH="$work/prefix" -DWANTED_VERSION=
because="compatible with requested version"
refused cmake_wrong_minor cmake_consumer cmake_find_package -DCMAKE_PREFIX_PATH="$work/prefix" -DWANTED_VERSION="$major.$((minor + 1))"
refused cmake_wrong_major cmake_consumer cmake_find_package -DCMAKE_PREFIX_PATH="$work/prefix" -DWANTED_VERSION="$((major + 1)).0"

if command -v meson >/dev/null 2>&1; then
    subproject() {
        local project=$work/subproject
        rm -rf "$project"
        mkdir -p "$project/subprojects/runtime_bridge" &&
            cp "$here/meson_subproject/meson.build" "$here/main.cpp" "$project" &&
            cp -R "$root/runtime_bridge.hpp" "$root/concurrency.hpp" "$root/meson.build" "$project/subprojects/runtime_bridge" &&
            sed "s/@WANTED@/$1/" -i "$project/meson.build" &&
            meson setup "$project/build" "$project" && ninja -C "$project/build" && "$project/build/consumer"
    }
    step meson_subproject subproject ">=$version"
    because="runtime_bridge"
    refused meson_wrong_version subproject ">=$((major + 1)).0.0"

    install_meson() {
        rm -rf "$work/meson-source" && mkdir -p "$work/meson-source" &&
            cp -R "$root/runtime_bridge.hpp" "$root/concurrency.hpp" "$root/meson.build" "$work/meson-source" &&
            mkdir "$work/meson-source/tests" && : >"$work/meson-source/tests/meson.build" &&
            meson setup "$work/meson-build" "$work/meson-source" --prefix "$work/meson-prefix" &&
            meson install -C "$work/meson-build"
    }
    pkg_config_consumer() {
        local arguments
        export PKG_CONFIG_PATH=$work/meson-prefix/share/pkgconfig
        pkg-config --exact-version="$version" runtime_bridge &&
            arguments=$(pkg-config --cflags --libs runtime_bridge) &&
            "$CXX" $CXXFLAGS -std=c++20 "$here/main.cpp" $arguments -o "$work/pkg" && "$work/pkg"
    }
    step meson_install install_meson
    if command -v pkg-config >/dev/null 2>&1; then
        step pkg_config pkg_config_consumer
    else
        echo "SKIPPED pkg_config"
    fi
else
    echo "SKIPPED meson_subproject"
    echo "SKIPPED meson_wrong_version"
    echo "SKIPPED meson_install"
    echo "SKIPPED pkg_config"
fi

copied() { # one header, alone in a directory
    mkdir -p "$work/copy-$1" && cp "$root/$1" "$work/copy-$1" &&
        printf '#include "%s"\nint main() {}\n' "$1" >"$work/copy-$1/main.cpp" &&
        "$CXX" $CXXFLAGS -std=c++20 "$work/copy-$1/main.cpp" -pthread -o "$work/copy-$1/program" && "$work/copy-$1/program"
}
step copied_runtime_bridge copied runtime_bridge.hpp
step copied_concurrency copied concurrency.hpp

[ $failures = 0 ]
