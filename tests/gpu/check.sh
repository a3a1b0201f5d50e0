#!/usr/bin/env bash
# All that needs a GPU, in under eight minutes (--quick: in two and a half): the CUDA tests and the GPU benchmarks, from a build
# folder or from a pack (pack.sh). Writes check.json and check.txt; check.py says how it ends.
#
#   tests/gpu/check.sh [--build DIR | --pack FILE.tar.gz] [--out DIR] [--list] [--quick]
#                      [--sanitizer memcheck|racecheck|initcheck|synccheck] [--only TEXT]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# A Python that has torch: its libraries are what everything is linked to.
for python in "${LSHMOE_VENV:-$here/../../.venv}/bin/python" python3; do
  "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' \
    2>/dev/null && exec "$python" "$here/check.py" "$@"
done
echo "check.sh: no Python with torch was found (in LSHMOE_VENV, or python3): install torch 2.11.0" >&2
exit 2
