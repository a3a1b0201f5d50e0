#!/usr/bin/env bash
# Packs the CUDA tests, the programs and the shared libraries that a bare GPU machine lacks (Open
# MPI, Boost, spdlog, fmt, ...) into one file. What it needs there: a driver, CUDA 13, and a Python
# with torch 2.11.0, whose libraries are not packed.
#
#   tests/gpu/pack.sh [BUILD_DIR [FILE.tar.gz]]     default: build/release build/gpu-pack.tar.gz
#   ... on the GPU machine: tests/gpu/check.sh --pack FILE.tar.gz
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
build=$(cd "${1:-$root/build/release}" && pwd)
file=${2:-$root/build/gpu-pack.tar.gz}
python=${LSHMOE_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || {
  echo "pack.sh: no Python with torch was found (in LSHMOE_VENV): set it to the build's" >&2
  exit 1
}
MOST_MIB=56

pack=$(mktemp -d)
trap 'rm -rf "$pack"' EXIT
mkdir -p "$pack"/{bin,files,lib,libstdc++,openmpi/bin}

# Programs; their places go into the list that check.sh reads.
"$python" - "$here" "$build" "$root" "$pack" <<'PYTHON'
import json, os, shutil, sys
here, build, root, pack = sys.argv[1:]
sys.path.insert(0, here)
sys.dont_write_bytecode = True
import check
items = check.all_items(build)
for item in items:
    for i, part in enumerate(item["command"]):
        name = os.path.basename(part)
        if name in ("mpirun", "mpiexec"):
            item["command"][i] = "mpirun"
        elif name.startswith("python") and os.path.isabs(part):
            item["command"][i] = "{python}"
        elif part.startswith((build + "/", root + "/")):
            if not os.path.exists(part):
                sys.exit(f"pack.sh: {part} is not there: build all first")
            folder = "bin" if part.startswith(build + "/") else "files"
            shutil.copy(part, os.path.join(pack, folder, name))
            item["command"][i] = "{pack}/" + folder + "/" + name
with open(os.path.join(pack, "items.json"), "w") as file:
    json.dump(items, file, indent=1)
PYTHON
cp "$build/launch/lshmoe-train" "$pack/bin/"
cp "$here/check.sh" "$here/check.py" "$pack/"

# libraries NAME PATH of what a file needs, but for those of the system's C library.
libraries() {
  ldd "$@" 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' | sort -u |
    grep -Ev '^(ld-linux|libc|libm|libdl|librt|libpthread|libresolv|libutil|libnsl|libanl)[-.]' || true
}
torch=$("$python" -c 'import importlib.util as u, os; print(os.path.dirname(os.path.dirname(u.find_spec("torch").origin)))')
take() {
  local name path
  while read -r name path; do
    case $(readlink -f "$path") in
      "$torch"/* | */cuda*/*) continue ;;  # there already
    esac
    case $name in
      libcuda.* | libnvidia-* | libcudart.* | libcublas* | libnccl.*) ;;
      libstdc++.* | libgcc_s.*) cp -nL "$path" "$pack/libstdc++/$name" ;;
      *) cp -nL "$path" "$pack/lib/$name" ;;
    esac
  done
}
mpirun=$(readlink -f "$(command -v mpirun)")
orted=$(readlink -f "$(command -v orted)")
mpi_plugins=$(ompi_info --path pkglibdir | awk '{ print $2 }')
libraries "$pack"/bin/* "$mpirun" "$orted" "$mpi_plugins"/mca_{btl_vader,btl_tcp,pml_ob1,pmix_ext3x}.so | take

# Open MPI looks for its plugins below OPAL_PREFIX. Only those that need nothing more: no fabrics.
cp "$mpirun" "$pack/openmpi/bin/mpirun"
cp "$orted" "$pack/openmpi/bin/orted"
prefix=$(ompi_info --path prefix | awk '{ print $2 }')
relocated="$pack/openmpi/${mpi_plugins#"$prefix"/}"
mkdir -p "$relocated" "$pack/openmpi/share"
for plugin in "$mpi_plugins"/*.so; do
  missing=$(libraries "$plugin" | while read -r name _; do
    [[ -e $pack/lib/$name || -e $pack/libstdc++/$name ]] || echo "$name"
  done)
  [[ -n $missing ]] || cp -L "$plugin" "$relocated/"
done
cp -rL "$(ompi_info --path pkgdatadir | awk '{ print $2 }')" "$pack/openmpi/share/openmpi"

strip --strip-unneeded "$pack"/bin/* "$pack"/lib/* 2>/dev/null || true
tar -C "$pack" -czf "$file" .
bytes=$(stat -c %s "$file")
printf 'pack.sh: %s, %d MiB, %d files\n' "$file" $((bytes >> 20)) "$(find "$pack" -type f | wc -l)"
if ((bytes > MOST_MIB << 20)); then
  echo "pack.sh: more than $MOST_MIB MiB" >&2
  exit 1
fi
