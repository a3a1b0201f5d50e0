"""Runs the CUDA tests and the GPU benchmarks and writes one JSON and one text report.

What tells most runs first, and the reports are written after each item: a run that is cut off
leaves what it had. SIGTERM, SIGINT and SIGHUP end what runs, and the check, with such a report.

Exit status: 0 all passed; 1 something failed, ran too long, found no time, or was stopped; 2 it could not be
started (there is a GPU that programs cannot use, or the pack does not fit); 77 there is no GPU, and
nothing failed: what was skipped is reported as skipped.
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
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
NO_GPU = 77
BUDGET_SECONDS = 470
QUICK_SECONDS = 150
TAIL = 6000

# Run first, in this order; then the other benchmarks, then the other tests. --quick ends after
# QUICK_ITEMS.
FIRST = ["gpu/probe", "kernels/cuda_device_1", "compress/cuda_codec_1", "bench/codec", "moe/cuda_1",
         "bench/layer", "bench/layer_learned", "comm/nccl_1"]
QUICK_ITEMS = 4
# Most seconds of a test: of the probe, of the others of FIRST, of the rest.
PROBE_SECONDS, FIRST_SECONDS, TEST_SECONDS = 20, 80, 150

# What lshmoe-bench measures: name, arguments, most seconds. {json} is a file for its lines.
CODEC = "codec --device cuda --dtype bf16 --repeat 15 --json {json} "
ROWS = "--synthetic-rows 12288 --hidden-size 4096 --fit-rows 4096 "
LAYER = ("layer --device cuda --hidden-size 4096 --ffn-hidden-size 14336 --num-experts 8 --top-k 2 "
         "--tokens 4096 --dtype bf16 --compress lsh --codec-on-self --json {json}")
BENCHMARKS = [
    ("bench/codec", CODEC + ROWS + "--kind bf16 fp8 int8 int4 lsh --state batch learned "
     "--error-reference row group --rounding nearest dithered --phases", 80),
    ("bench/layer", LAYER, 90),
    ("bench/layer_learned", LAYER + " --codec-state learned", 90),
    ("bench/codec_clusters", CODEC + ROWS + "--synthetic-clusters 64 --kind lsh "
     "--state batch learned --phases", 40),
    ("bench/codec_7168", CODEC + "--synthetic-rows 8192 --hidden-size 7168 --fit-rows 2048 "
     "--kind fp8 lsh --state batch learned --rounding nearest dithered --phases", 60),
    ("bench/codec_bounds", CODEC + ROWS + "--kind lsh --state learned --max-error 0.05 0.2 "
     "--phases", 40),
    ("bench/codec_basis", CODEC + "--synthetic-rows 16384 --hidden-size 1024 --fit-rows 8192 "
     "--kind lsh --state learned --transform channels basis --phases", 80),
] + [
    (f"bench/codec_{sms}_sms", CODEC + ROWS +
     f"--kind fp8 lsh --state learned --num-sms {sms}", 40)
    for sms in (8, 16, 32)
]

DEVICE_NODES = "/dev/nvidia[0-9]*"
# Where containers find the driver's libcuda.so.1, beside where the loader looks.
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/x86_64-linux-gnu",
                  "/usr/lib64")
# A newer libcuda for an older driver.
COMPAT_FOLDER = "/usr/local/cuda/compat"

# Why tests may skip beside a GPU: there are too few of them, or of ranks.
TOO_FEW = re.compile(r"\d+ GPUs? for its \d+ ranks|needs peers|needs \d+ ranks|\bone rank\b")
NO_DEVICE = re.compile(r"^no (GPU|CUDA device)")


# Names of the signals that asked this process to end.
stopped_by = []


def stop_on_signals():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda number, _: stopped_by.append(signal.Signals(number).name))


def fail(text):
    print("check: " + text, file=sys.stderr)
    sys.exit(2)


def driver_folders():
    """Those of DRIVER_FOLDERS that have the driver."""
    return [folder for folder in DRIVER_FOLDERS
            if os.path.exists(os.path.join(folder, "libcuda.so.1"))]


def with_driver(environment):
    """The same variables, with the driver's folders behind those that the machine names."""
    folders = [environment.get("LD_LIBRARY_PATH", ""), *driver_folders()]
    return {**environment, "LD_LIBRARY_PATH": ":".join(folder for folder in folders if folder)}


def load_driver():
    """libcuda from where the programs will find it (this process's loader has read its variable
    already); None without one."""
    for folder in [*with_driver(os.environ)["LD_LIBRARY_PATH"].split(":"), None, COMPAT_FOLDER]:
        try:
            if folder != "":
                return ctypes.CDLL(os.path.join(folder or "", "libcuda.so.1"))
        except OSError:
            pass
    return None


def find_gpu():
    """(name of the GPUs or None, why none), in PROBE_SECONDS at most: a driver may hang."""
    found = []
    thread = threading.Thread(target=lambda: found.append(ask_driver()), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return found[0] if found else (None, f"libcuda has not answered for {PROBE_SECONDS} s")


def ask_driver():
    """What find_gpu returns. CUDA itself is asked, not torch: that takes seconds."""
    cuda = load_driver()
    if cuda is None:
        return None, "no libcuda.so.1 was found"
    count, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    for call, arguments in (("cuInit", [0]), ("cuDeviceGetCount", [ctypes.byref(count)]),
                            ("cuDeviceGetName", [name, 256, 0])):
        code = getattr(cuda, call)(*arguments)
        if code != 0:
            return None, f"{call} of libcuda says error {code}"
        if call == "cuDeviceGetCount" and count.value == 0:
            return None, "libcuda counts 0 GPUs"
    return f"{count.value} x {name.value.decode()}", None


def gpu_name():
    return find_gpu()[0]


def test_items(build):
    """The ctest entries of label cuda; their programs by absolute path."""
    listing = subprocess.run(["ctest", "--test-dir", build, "-L", "^cuda$", "--show-only=json-v1"],
                             check=True, capture_output=True, text=True)
    items = []
    for test in json.loads(listing.stdout)["tests"]:
        properties = {p["name"]: p["value"] for p in test.get("properties", [])}
        if "command" not in test:
            fail(f"test {test['name']} has no program (it is not built): build all first")
        kind = "probe" if test["name"] == "gpu/probe" else \
            "script" if any(part.endswith(".py") for part in test["command"]) else "test"
        items.append({"name": test["name"], "kind": kind,
                      "command": test["command"] + (["-v"] if kind == "script" else []),
                      "seconds": PROBE_SECONDS if kind == "probe" else
                      FIRST_SECONDS if test["name"] in FIRST else
                      min(float(properties.get("TIMEOUT", 120)), TEST_SECONDS),
                      "environment": properties.get("ENVIRONMENT", [])})
    if not items:
        fail(f"{build} has no tests of label cuda (not a build with tests?)")
    return items


def bench_items(bench):
    return [{"name": name, "kind": "benchmark", "command": [bench, *arguments.split()],
             "seconds": seconds, "environment": ["OMP_NUM_THREADS=8"]}
            for name, arguments, seconds in BENCHMARKS]


def all_items(build):
    """What is run, in its order."""
    items = bench_items(os.path.join(build, "launch", "lshmoe-bench")) + test_items(build)
    return sorted(items, key=lambda item: FIRST.index(item["name"]) if item["name"] in FIRST
                  else len(FIRST))


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
    """Variables with which the programs of an unpacked pack find their libraries; the driver where
    the machine's own say."""
    environment = with_driver(os.environ)
    openmpi = os.path.join(pack, "openmpi")
    own = [os.path.join(pack, "lib"), *torch_folders()]
    machine = environment["LD_LIBRARY_PATH"]
    environment["LD_LIBRARY_PATH"] = ":".join([*own, machine] if machine else own)
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


def judge_tests(report, output, code, gpu):
    """Outcome of a test program or script from its output."""
    results = unittest_results if report["kind"] == "script" else gtest_results
    passed, failed, skipped = results(output)
    report["tests"] = {"passed": passed, "failed": failed, "skipped": skipped}
    reasons = [case["reason"] for case in skipped]
    good = (code == 0 or (code == NO_GPU and not passed)) and not failed and bool(passed or skipped)
    if good and gpu and any(NO_DEVICE.search(reason) for reason in reasons):
        report["reason"] = "it sees no GPU, but there is one"
        good = False
    elif good and not passed:
        report["reason"] = next(filter(TOO_FEW.search, reasons), reasons[0])
        if gpu and not TOO_FEW.search(report["reason"]):
            report["reason"] = "all was skipped beside a GPU: " + report["reason"]
            good = False
    if not good:
        return "failed"
    return "passed" if passed else "skipped"


def wait(process, seconds):
    """Its exit status, and whether it was ended: after these seconds, or by a signal to this one."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if stopped_by or time.monotonic() >= end:
            os.killpg(process.pid, signal.SIGTERM)  # mpirun ends its ranks, which lead groups
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            return process.wait(), True
        time.sleep(0.02)
    return process.returncode, False


def run_item(item, environment, seconds, prefix, gpu=None):
    """Its entry of the report; gpu: the GPU's name, which it must use."""
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
        code, ended = wait(process, seconds)
        log.seek(0)
        output = log.read()
    report["seconds"] = round(time.monotonic() - start, 2)
    report["exit_status"] = code
    if item["kind"] == "benchmark":
        try:
            with open(lines.name) as results:
                report["results"] = [json.loads(line) for line in results]
        except ValueError:  # cut off
            report["results"] = []
        report["status"] = "passed" if code == 0 and report["results"] else "failed"
        report["output"] = output[-TAIL:]
    elif item["kind"] == "probe":
        report["status"] = "passed" if code == 0 else \
            "skipped" if code == NO_GPU and not gpu else "failed"
        report["reason"] = " ".join(output.split())
    else:
        report["status"] = judge_tests(report, output, code, gpu)
    if ended:
        report["status"] = "stopped" if stopped_by else "timed out"
    if report["status"] in ("failed", "timed out", "stopped"):
        report["output"] = output[-TAIL:]
    return report


def text_of(report):
    lines = [f"lshmoe GPU check: {report['verdict']}", *report["notes"],
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


def write_reports(folder, report):
    """check.json and check.txt, whole at any time."""
    os.makedirs(folder, exist_ok=True)
    for name, text in (("check.json", json.dumps(report, indent=1)), ("check.txt", text_of(report))):
        with open(os.path.join(folder, name + ".new"), "w") as file:
            file.write(text)
        os.replace(file.name, os.path.join(folder, name))


def run_probe(item, environment, gpu):
    """The probe's entry; where it fails, once more with the compatibility libcuda, if there is one.
    That stays in `environment` when it helps."""
    one = run_item(item, environment, item["seconds"], [], gpu)
    if gpu and one["status"] != "passed" and os.path.isdir(COMPAT_FOLDER):
        newer = {**environment,
                 "LD_LIBRARY_PATH": COMPAT_FOLDER + ":" + environment["LD_LIBRARY_PATH"]}
        second = run_item(item, newer, item["seconds"], [], gpu)
        if second["status"] == "passed":
            environment.update(newer)
            return second
    return one


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
    parser.add_argument("--quick", action="store_true",
                        help=f"the first {QUICK_ITEMS} items, in {QUICK_SECONDS} s at most")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds of all")
    o = parser.parse_args()
    if o.quick:
        o.budget = min(o.budget, QUICK_SECONDS)
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
        environment = with_driver(os.environ)
        items = all_items(build)
    prefix = []
    if o.sanitizer:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not os.path.exists(tool):
            fail("compute-sanitizer was not found (it comes with the CUDA Toolkit): install it")
        prefix = [tool, "--tool", o.sanitizer, "--error-exitcode", "86"]
        # Programs, not scripts; the probe runs without the tool.
        items = [item for item in items if item["kind"] in ("test", "probe")]
        for item in items:  # slower by far
            item["seconds"] = o.budget
    if o.quick:
        items = items[:QUICK_ITEMS]
    items = [item for item in items if o.only in item["name"] or item["kind"] == "probe"]
    if o.list:
        for item in items:
            print(json.dumps(item))
        return 0

    gpu, why = find_gpu()
    report = {"verdict": "still running, or cut off", "gpu": gpu, "torch": torch_version(),
              "from": o.pack or build, "seconds": 0.0, "items": [], "notes": []}
    if gpu is None:
        report["notes"].append("no GPU: " + why)
    elif gpu.startswith("1 x "):
        report["notes"].append("one GPU: what goes between GPUs (NCCL with more ranks) is not shown")

    def end(verdict, status):
        report["verdict"] = verdict
        write_reports(o.out, report)
        print(f"check: {verdict}; {os.path.join(o.out, 'check.txt')}")
        return status

    stop_on_signals()
    nodes = glob.glob(DEVICE_NODES)
    if gpu is None and nodes:
        return end(f"not started: there is {nodes[0]}, but {why} (the driver's libraries are not "
                   "here, or do not fit it): mount them, or name their folder in LD_LIBRARY_PATH",
                   2)
    for item in items:
        left = o.budget - (time.monotonic() - start)
        if gpu is None and item["kind"] == "benchmark":
            one = {"name": item["name"], "kind": "benchmark", "status": "skipped",
                   "reason": "no CUDA device"}
        elif left < 1:
            one = {"name": item["name"], "kind": item["kind"], "status": "not run",
                   "reason": f"the {o.budget:.0f} s of the whole check were over"}
        elif item["kind"] == "probe":
            one = run_probe(item, environment, gpu)
        else:
            one = run_item(item, environment, min(item["seconds"], left),
                           prefix if gpu is not None else [], gpu)
        print(f"{one['status']:10} {one['name']}", flush=True)
        report["items"].append(one)
        report["seconds"] = round(time.monotonic() - start, 1)
        write_reports(o.out, report)
        if stopped_by:
            return end("stopped by " + stopped_by[0], 1)
        if gpu and item["kind"] == "probe" and one["status"] != "passed":
            return end(f"not started: the driver names {gpu}, but a small CUDA program {one['status']}"
                       f" ({one['reason'] or 'no output'})", 2)
    bad = [one for one in report["items"] if one["status"] not in ("passed", "skipped")]
    if bad or not report["items"]:
        return end("failed", 1)
    return end("passed", 0) if gpu else end("no GPU: skipped", NO_GPU)


def torch_version():
    torch = os.path.dirname(importlib.util.find_spec("torch").origin)
    with open(os.path.join(torch, "version.py")) as file:
        match = re.search(r"__version__ = '([^']+)'", file.read())
    return match[1] if match else "unknown"


if __name__ == "__main__":
    sys.exit(main())
