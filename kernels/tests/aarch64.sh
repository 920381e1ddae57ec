#!/usr/bin/env bash
# The tests of the kernels on 64-bit ARM, emulated.
#
#   kernels/tests/aarch64.sh [ARGUMENTS OF cargo test]
#
# Needs a cross compiler to link with and QEMU's user mode (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user), and Rust's standard
# library for the target: `rustup target add aarch64-unknown-linux-gnu`. Where that cannot be had, RUST_SRC names the folder `library` of the sources
# of exactly this rustc (Debian: rust-src, which has it as /usr/src/rustc-VERSION/library), and the library is built from them, once.
#
# Not a part of the gate: what the tests depend on takes minutes to compile for a second architecture.
set -euo pipefail
cd "$(dirname "$0")/../.."

target=aarch64-unknown-linux-gnu
for tool in aarch64-linux-gnu-gcc qemu-aarch64; do
    command -v "$tool" > /dev/null || { echo "$tool is not there: see the head of $0" >&2; exit 2; }
done

# A folder like the toolchain's, with the target's library beside the host's; `$1/rustc` looks there.
build_library() {
    local own=$1 toolchain entry
    toolchain=$(rustc --print sysroot)
    mkdir -p "$own/lib/rustlib/src/rust" "$own/library/src"
    for entry in "$toolchain"/lib/* "$toolchain"/lib/rustlib/*; do
        case ${entry#"$toolchain"/lib/} in
            rustlib | rustlib/src) ;;
            *) ln -sfn "$entry" "$own/${entry#"$toolchain"/}" ;;
        esac
    done
    ln -sfn "$(realpath "$RUST_SRC")" "$own/lib/rustlib/src/rust/library"
    printf '#!/bin/sh\nexec "%s/bin/rustc" --sysroot "%s" "$@"\n' "$toolchain" "$own" > "$own/rustc"
    chmod +x "$own/rustc"

    # Cargo builds the library for whoever needs it: a crate of nothing but a test.
    printf '[workspace]\n[package]\nname = "nothing"\nedition = "2024"\n' > "$own/library/Cargo.toml"
    echo > "$own/library/src/lib.rs"
    (
        cd "$own/library"
        RUSTC="$own/rustc" RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=target \
            cargo test --no-run --release -Zbuild-std --target "$target"
    )
    mkdir -p "$own/lib/rustlib/$target/lib"
    cp "$own/library/target/$target"/release/deps/lib*.rlib "$own/lib/rustlib/$target/lib/"
    rm "$own/lib/rustlib/$target/lib"/libnothing-*.rlib
    touch "$own/complete"
}

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
if [ ! -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
    own=$PWD/target/$target-sysroot
    if [ ! -e "$own/complete" ]; then
        [ -e "${RUST_SRC:-}/Cargo.lock" ] || { echo "no standard library for $target: see the head of $0" >&2; exit 2; }
        build_library "$own"
    fi
    export RUSTC=$own/rustc
fi

# A processor with everything, on which every instruction set is tried, and one without dot products of bytes.
for processor in max cortex-a72; do
    echo "=== $processor"
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu $processor -L /usr/aarch64-linux-gnu" \
        cargo test -p quire-kernels --tests --target "$target" "$@"
done
