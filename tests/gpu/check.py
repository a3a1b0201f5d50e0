"""Runs the CUDA tests and the GPU benchmarks and writes one JSON and one text report.

Exit status: 0 all passed; 1 something failed, ran too long, or found no time; 2 it could not be
started; 77 there is no GPU, and nothing failed: what was skipped is reported as skipped.
"""

import argparse
import ctypes
import glob
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
NO_GPU = 77
BUDGET_SECONDS = 520
TAIL = 6000

# What lshmoe-bench measures: name, arguments, most seconds. {json} is a file for its lines.
CODEC = "codec --device cuda --dtype bf16 --repeat 15 --json {json} "
BENCHMARKS = [
    ("bench/codec", CODEC + "--synthetic-rows 12288 --hidden-size 4096 --fit-rows 4096 "
     "--kind bf16 fp8 int8 int4 lsh --state batch learned --max-error 0.1 0.2 --phases", 100),
    ("bench/codec_basis", CODEC + "--synthetic-rows 16384 --hidden-size 1024 --fit-rows 8192 "
     "--kind lsh --state learned --transform channels basis --phases", 80),
] + [
    (f"bench/codec_{sms}_sms", CODEC + "--synthetic-rows 12288 --hidden-size 4096 "
     f"--fit-rows 4096 --kind fp8 lsh --state learned --num-sms {sms}", 40)
    for sms in (8, 16, 32)
] + [
    ("bench/layer", "layer --device cuda --hidden-size 4096 --ffn-hidden-size 14336 "
     "--num-experts 8 --top-k 2 --tokens 4096 --dtype bf16 --compress lsh --codec-on-self "
     "--json {json}", 150),
]


def fail(text):
    print("check: " + text, file=sys.stderr)
    sys.exit(2)


def gpu_name():
    """Of the first GPU; None without one. CUDA itself is asked, not torch: that takes seconds."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    if cuda.cuDeviceGetName(name, 256, 0) != 0:
        return None
    return f"{count.value} x {name.value.decode()}"


def test_items(build):
    """The ctest entries of label cuda; their programs by absolute path."""
    listing = subprocess.run(["ctest", "--test-dir", build, "-L", "^cuda$", "--show-only=json-v1"],
                             check=True, capture_output=True, text=True)
    items = []
    for test in json.loads(listing.stdout)["tests"]:
        properties = {p["name"]: p["value"] for p in test.get("properties", [])}
        if "command" not in test:
            fail(f"test {test['name']} has no program (it is not built): build all first")
        script = any(part.endswith(".py") for part in test["command"])
        items.append({"name": test["name"], "kind": "script" if script else "test",
                      "command": test["command"] + (["-v"] if script else []),
                      "seconds": min(float(properties.get("TIMEOUT", 120)), 240),
                      "environment": properties.get("ENVIRONMENT", [])})
    if not items:
        fail(f"{build} has no tests of label cuda (not a build with tests?)")
    return items


def bench_items(bench):
    return [{"name": name, "kind": "benchmark", "command": [bench, *arguments.split()],
             "seconds": seconds, "environment": ["OMP_NUM_THREADS=8"]}
            for name, arguments, seconds in BENCHMARKS]


def torch_folders():
    """Folders of the libraries that come with torch, CUDA's among them."""
    torch = os.path.dirname(importlib.util.find_spec("torch").origin)
    folders = [os.path.join(torch, "lib")]
    folders += sorted(glob.glob(os.path.join(os.path.dirname(torch), "nvidia", "*", "lib")))
    return folders + [f for f in ("/usr/local/cuda/lib64",) if os.path.isdir(f)]


def unresolved(program, environment):
    """What the loader does not find for a program."""
    ldd = subprocess.run(["ldd", program], capture_output=True, text=True, env=environment)
    return [line.strip() for line in (ldd.stdout + ldd.stderr).splitlines() if "not found" in line]


def pack_environment(pack):
    """Variables with which the programs of an unpacked pack find their libraries."""
    environment = dict(os.environ)
    openmpi = os.path.join(pack, "openmpi")
    folders = [os.path.join(pack, "lib"), *torch_folders()]
    environment["LD_LIBRARY_PATH"] = ":".join(folders)
    environment["OPAL_PREFIX"] = openmpi
    environment["PMIX_INSTALL_PREFIX"] = openmpi
    environment["PATH"] = os.path.join(openmpi, "bin") + ":" + environment["PATH"]
    program = os.path.join(pack, "bin", "lshmoe-bench")
    missing = unresolved(program, environment)
    if any("GLIBCXX" in line or "libstdc++" in line for line in missing):
        environment["LD_LIBRARY_PATH"] += ":" + os.path.join(pack, "libstdc++")
        environment["LD_PRELOAD"] = os.path.join(pack, "libstdc++", "libstdc++.so.6")
        missing = unresolved(program, environment)
    if missing:
        fail("the pack does not fit this machine (built for a newer system, or another torch):\n  " +
             "\n  ".join(missing))
    return environment


def gtest_results(output):
    """Test cases by outcome. A reason is the last line before the one that says SKIPPED."""
    passed = re.findall(r"^\[       OK \] (\S+)", output, re.M)
    failed = sorted(set(re.findall(r"^\[  FAILED  \] ([^\s,]+\.[^\s,]+)", output, re.M)))
    skipped, reason = [], ""
    for line in output.splitlines():
        match = re.match(r"\[  SKIPPED \] (\S+) \(", line)
        if match:
            skipped.append({"name": match[1], "reason": reason or "no reason given"})
        if line.startswith("["):
            reason = ""
        elif line.strip():
            reason = line.strip()
    return passed, failed, skipped


def unittest_results(output):
    """The same of Python's unittest -v; a test's first line of documentation may stand between."""
    passed, failed, skipped = [], [], []
    pattern = r"^\w+ \(([\w.]+)\)(?:\n.*)?? \.\.\. (?:.*\n)*?(ok|FAIL|ERROR|skipped .*)$"
    for name, outcome in re.findall(pattern, output, re.M):
        if outcome.startswith("skipped"):
            skipped.append({"name": name, "reason": outcome[len("skipped "):].strip("'\"")})
        else:
            (passed if outcome == "ok" else failed).append(name)
    return passed, failed, skipped


def run_item(item, environment, seconds, prefix):
    """Its entry of the report."""
    report = {"name": item["name"], "kind": item["kind"], "limit_seconds": seconds}
    own = {**environment, "GTEST_COLOR": "no"}  # mpirun's output is a terminal
    own.update(pair.split("=", 1) for pair in item["environment"])
    lines = tempfile.NamedTemporaryFile(suffix=".jsonl")
    command = [part.replace("{json}", lines.name) for part in item["command"]]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(prefix + command, stdout=log, stderr=subprocess.STDOUT,
                                       env=own, start_new_session=True)
        except OSError as error:
            return {**report, "status": "failed", "seconds": 0.0, "output": str(error)}
        late = False
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGTERM)  # mpirun ends its ranks, which lead groups
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        log.seek(0)
        output = log.read()
    report["seconds"] = round(time.monotonic() - start, 2)
    report["exit_status"] = code
    if item["kind"] == "benchmark":
        with open(lines.name) as results:
            report["results"] = [json.loads(line) for line in results]
        good, report["output"] = code == 0 and bool(report["results"]), output[-TAIL:]
    else:
        results = unittest_results if item["kind"] == "script" else gtest_results
        passed, failed, skipped = results(output)
        report["tests"] = {"passed": passed, "failed": failed, "skipped": skipped}
        right_code = code == 0 or (code == NO_GPU and not passed)
        good = right_code and not failed and bool(passed or skipped)
        if not good:
            report["output"] = output[-TAIL:]
        elif not passed:
            report["status"], report["reason"] = "skipped", skipped[0]["reason"]
    if late:
        report["status"] = "timed out"
    elif not good:
        report["status"] = "failed"
    report.setdefault("status", "passed")
    return report


def text_of(report):
    lines = [f"lshmoe GPU check: {report['verdict']}",
             f"GPU: {report['gpu'] or 'none'}; torch {report['torch']}; from {report['from']}; "
             f"{report['seconds']:.0f} s", ""]
    for item in report["items"]:
        tests = item.get("tests")
        counts = "" if tests is None else "  (" + ", ".join(
            f"{len(tests[key])} {key}" for key in ("passed", "failed", "skipped")) + ")"
        lines.append(f"{item['status']:10} {item['name']:28} {item.get('seconds', 0):8.1f} s"
                     f"{counts}")
        if "reason" in item:
            lines.append(f"{'':11}{item['reason']}")
        for skipped in (tests or {}).get("skipped", []) if item["status"] != "skipped" else []:
            lines.append(f"{'':11}skipped {skipped['name']}: {skipped['reason']}")
        for name in (tests or {}).get("failed", []):
            lines.append(f"{'':11}FAILED {name}")
    for item in report["items"]:
        if item.get("output"):
            lines += ["", f"--- {item['name']} ({item['status']})", item["output"].rstrip()]
    return "\n".join(lines) + "\n"


def unpacked(pack, folder):
    with tarfile.open(pack) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") \
            else archive.extractall(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(prog="check.sh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--build", help="build folder (default: build/release of the checkout)")
    source.add_argument("--pack", help="what pack.sh wrote, or the folder it was unpacked to")
    parser.add_argument("--out", default="gpu-check", help="folder of the two reports")
    parser.add_argument("--list", action="store_true", help="what would be run, one JSON a line")
    parser.add_argument("--sanitizer", choices=["memcheck", "racecheck", "initcheck", "synccheck"],
                        help="the tests alone, under that tool of compute-sanitizer")
    parser.add_argument("--only", default="", help="items whose names hold this")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds of all")
    o = parser.parse_args()
    start = time.monotonic()
    # Run from inside a pack, it is the pack's.
    if not o.build and not o.pack and os.path.exists(os.path.join(HERE, "items.json")):
        o.pack = HERE

    scratch = tempfile.TemporaryDirectory()
    if o.pack:
        pack = o.pack if os.path.isdir(o.pack) else unpacked(o.pack, scratch.name)
        environment = pack_environment(os.path.abspath(pack))
        with open(os.path.join(pack, "items.json")) as listing:
            items = json.load(listing)
        for item in items:
            item["command"] = [part.replace("{pack}", os.path.abspath(pack))
                               .replace("{python}", sys.executable) for part in item["command"]]
    else:
        build = os.path.abspath(o.build or os.path.join(HERE, "..", "..", "build", "release"))
        environment = dict(os.environ)
        items = test_items(build) + bench_items(os.path.join(build, "launch", "lshmoe-bench"))
    prefix = []
    if o.sanitizer:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not os.path.exists(tool):
            fail("compute-sanitizer was not found (it comes with the CUDA Toolkit): install it")
        prefix = [tool, "--tool", o.sanitizer, "--error-exitcode", "86"]
        items = [item for item in items if item["kind"] == "test"]  # programs, not scripts
        for item in items:  # slower by far
            item["seconds"] = o.budget
    items = [item for item in items if o.only in item["name"]]
    if o.list:
        for item in items:
            print(json.dumps(item))
        return 0

    gpu = gpu_name()
    reports = []
    for item in items:
        left = o.budget - (time.monotonic() - start)
        if gpu is None and item["kind"] == "benchmark":
            one = {"name": item["name"], "kind": "benchmark", "status": "skipped",
                   "reason": "no CUDA device"}
        elif left < 1:
            one = {"name": item["name"], "kind": item["kind"], "status": "not run",
                   "reason": f"the {o.budget:.0f} s of the whole check were over"}
        else:
            one = run_item(item, environment, min(item["seconds"], left),
                           prefix if gpu is not None else [])
        print(f"{one['status']:10} {one['name']}", flush=True)
        reports.append(one)
    bad = [one for one in reports if one["status"] not in ("passed", "skipped")]
    verdict = "failed" if bad or not reports else "passed" if gpu else "no GPU: skipped"
    report = {"verdict": verdict, "gpu": gpu, "torch": torch_version(), "from": o.pack or build,
              "seconds": round(time.monotonic() - start, 1), "items": reports}
    os.makedirs(o.out, exist_ok=True)
    with open(os.path.join(o.out, "check.json"), "w") as file:
        json.dump(report, file, indent=1)
    with open(os.path.join(o.out, "check.txt"), "w") as file:
        file.write(text_of(report))
    print(f"check: {verdict}; {os.path.join(o.out, 'check.txt')}")
    return 1 if verdict == "failed" else 0 if gpu else NO_GPU


def torch_version():
    torch = os.path.dirname(importlib.util.find_spec("torch").origin)
    with open(os.path.join(torch, "version.py")) as file:
        match = re.search(r"__version__ = '([^']+)'", file.read())
    return match[1] if match else "unknown"


if __name__ == "__main__":
    sys.exit(main())
