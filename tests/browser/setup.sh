#!/usr/bin/env bash
# Debian's Chromium, with which the tests of this folder open reports.
#
#   tests/browser/setup.sh install      Debian's packages, once, as root
set -euo pipefail

# Without fonts every letter is a box; DejaVu has the right-to-left ones.
PACKAGES=(chromium fonts-liberation fonts-dejavu-core)

die() {
    echo "$0: $*" >&2
    exit 1
}

install_packages() {
    if command -v chromium >/dev/null; then
        return
    fi
    command -v apt-get >/dev/null || die "this needs Debian; install ${PACKAGES[*]}"
    [ "$(id -u)" = 0 ] || die "run as root: apt-get install ${PACKAGES[*]}"
    {
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
                "${PACKAGES[@]}"
    } >&2 || die "apt-get could not install ${PACKAGES[*]}; see above"
}

case "${1:-}" in
install) install_packages ;;
*) die "install" ;;
esac
