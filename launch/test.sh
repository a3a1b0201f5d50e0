#!/usr/bin/env bash
# Installs what is missing, builds everything, runs all tests.
#
#   launch/test.sh [ctest options]    e.g. -R moe/, -LE slow
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$LSHMOE_ROOT/launch/setup.sh"
build all
ctest --test-dir "$LSHMOE_BUILD" --output-on-failure --no-tests=error -j "$(nproc)" "$@"
