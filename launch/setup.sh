#!/usr/bin/env bash
# Installs what the build needs and this machine lacks: Debian packages, and torch in a local Python
# environment. Takes about a second when nothing is missing.
#
#   LSHMOE_VENV   where the Python environment is or shall be (default: .venv in the checkout)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TORCH_VERSION=2.11.0
PACKAGES=(
  g++ cmake ninja-build ccache git
  libopenmpi-dev openmpi-bin
  libboost-program-options-dev libspdlog-dev nlohmann-json3-dev libgtest-dev
  python3 python3-venv
)

install_packages() {
  if ! command -v dpkg-query >/dev/null; then
    say "not a Debian-like system: install the equivalents of: ${PACKAGES[*]}"
    return  # configure names whatever is still missing
  fi
  local missing=() package
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
      missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  local sudo=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null ||
      die "packages are missing and there is no sudo: as root, run: apt-get install ${missing[*]}"
    sudo=(sudo)
  fi
  say "installing ${missing[*]}"
  if ! "${sudo[@]}" apt-get update -qq ||
    ! "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
    die "apt-get failed (its reason is above; without a network?): install ${missing[*]} and start again"
  fi
}

torch_installed() {
  compgen -G "$LSHMOE_VENV/lib/python3*/site-packages/torch-$TORCH_VERSION*.dist-info/RECORD" >/dev/null
}

install_torch() {
  torch_installed && return
  # Debian's own Python first: another one on PATH may lack the venv module.
  local python=python3
  [[ -x /usr/bin/python3 ]] && python=/usr/bin/python3
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "torch $TORCH_VERSION needs Python 3.10 or newer, $python is $("$python" -V): install a newer one and set LSHMOE_VENV to an environment with torch==$TORCH_VERSION"
  say "installing torch $TORCH_VERSION into $LSHMOE_VENV (4.7 GB on disk, a minute or more)"
  "$LSHMOE_VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$LSHMOE_VENV" ||
    die "making a Python environment in $LSHMOE_VENV failed (its reason is above): set LSHMOE_VENV to a folder you can write"
  "$LSHMOE_VENV/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$TORCH_VERSION" ||
    die "pip failed (its reason is above; without a network?): set LSHMOE_VENV to an environment with torch==$TORCH_VERSION, or start again"
  torch_installed || die "pip finished, but torch $TORCH_VERSION is not in $LSHMOE_VENV"
}

# Two scripts started at once must not install into one environment.
mkdir -p "$LSHMOE_ROOT/build"
exec 9>"$LSHMOE_ROOT/build/.setup.lock"
flock 9
install_packages
install_torch
