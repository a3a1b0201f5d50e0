"""Packs a build, checks the pack as on another machine, and check.py's own judgment.

    python gpu_check_test.py BUILD_DIR
"""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path.insert(0, HERE)
import check  # noqa: E402

BUILD = sys.argv.pop(1)


# A driver of one GPU, as far as check.py asks it.
DRIVER = """
#include <string.h>
#include <unistd.h>
int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Fake", size); return device; }
"""
# Prints what a program started with its environment finds of that driver.
SEES = """
#include <dlfcn.h>
#include <stdio.h>
int main(void) {
  int (*count)(int*) = 0;
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  int gpus = 0;
  if (driver) count = (int (*)(int*))dlsym(driver, "cuDeviceGetCount");
  if (!count) return puts("no driver"), 77;
  count(&gpus);
  return printf("%d GPU\\n", gpus), 0;
}
"""


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def compiled(source, target, *flags):
    subprocess.run(["gcc", "-x", "c", "-", "-o", target, *flags], input=source, text=True, check=True)
    return target


def driver_in(folder, source=DRIVER):
    os.makedirs(folder, exist_ok=True)
    compiled(source, os.path.join(folder, "libcuda.so.1"), "-shared", "-fPIC")
    return folder


def lives(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def report_in(folder):
    with open(os.path.join(folder, "check.json")) as file:
        return json.load(file)


def without(paths, command):
    """The command in a mount namespace where these files and folders are empty."""
    hide = "while [ \"$1\" != -- ]; do mount --bind \"$1\" \"$2\" || exit; shift 2; done; " \
           "shift; exec \"$@\""
    with tempfile.NamedTemporaryFile() as file, tempfile.TemporaryDirectory() as folder:
        mounts = []
        for path in {os.path.realpath(path) for path in paths}:
            mounts += [folder if os.path.isdir(path) else file.name, path]
        return run("unshare", "-m", "sh", "-c", hide, "sh", *mounts, "--", *command)


def remote_shells():
    return list(filter(None, map(shutil.which, ("ssh", "rsh"))))


def of_this_machine(build):
    """What a bare GPU machine lacks of what a build needs here: Open MPI, and the libraries beside
    torch's. Not those that Python needs too."""
    needed = run("ldd", os.path.join(build, "tests", "comm", "test_comm_device")).stdout
    libraries = re.findall(r"=> (/\S*/lib(?:mpi|open-|pmix|hwloc|event|fmt|spdlog|boost|gtest)\S*)",
                           needed)
    plugins = run("ompi_info", "--path", "pkglibdir").stdout.split()[-1]
    return [shutil.which("mpirun"), shutil.which("orted"), plugins, *libraries]


class Pack(unittest.TestCase):
    def test_pack_and_check(self):
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "pack.tar.gz")
            packed = run(os.path.join(HERE, "pack.sh"), BUILD, file)
            self.assertEqual(packed.returncode, 0, packed.stdout + packed.stderr)
            self.assertLess(os.path.getsize(file), 56 << 20)

            listed = run(os.path.join(HERE, "check.sh"), "--pack", file, "--list")
            self.assertEqual(listed.returncode, 0, listed.stderr)
            items = [json.loads(line) for line in listed.stdout.splitlines()]
            names = {item["name"] for item in items}
            self.assertIn("compress/cuda_codec_1", names)
            self.assertLessEqual(set(check.FIRST), names)
            self.assertEqual([item["name"] for item in items[:len(check.FIRST)]], check.FIRST)
            self.assertEqual(items[0]["kind"], "probe")
            self.assertLessEqual(max(item["seconds"] for item in items[:4]), 90)
            for item in items:
                for part in item["command"]:
                    # All it names is in the pack, or on the other machine too.
                    self.assertFalse(part.startswith((BUILD, HERE)), item)
                    if os.path.isabs(part):
                        self.assertTrue("/bin/" in part or "/files/" in part, item)
            if check.gpu_name() is not None:
                self.skipTest("this machine has a GPU: check.sh itself is the test")

            out = os.path.join(folder, "out")
            checked = run(os.path.join(HERE, "check.sh"), "--pack", file, "--out", out)
            self.assertEqual(checked.returncode, check.NO_GPU, checked.stdout + checked.stderr)
            with open(os.path.join(out, "check.json")) as report:
                report = json.load(report)
            self.assertIsNone(report["gpu"])
            self.assertEqual({item["name"] for item in report["items"]}, names)
            probe = report["items"].pop(0)
            self.assertEqual(probe["status"], "skipped")
            self.assertIn("0 GPUs", probe["reason"])
            for item in report["items"]:
                if item["kind"] == "benchmark":
                    self.assertEqual(item["status"], "skipped", item)
                    self.assertEqual(item["reason"], "no CUDA device")
                    continue
                # What runs all the same says so itself; what needs a GPU is skipped.
                self.assertEqual(item["tests"]["failed"], [], item)
                self.assertTrue(item["tests"]["skipped"] or item["tests"]["passed"], item)
                if not item["tests"]["passed"]:
                    self.assertEqual(item["status"], "skipped", item)
                for case in item["tests"]["skipped"]:
                    self.assertNotEqual(case["reason"], "no reason given")
                self.assertNotIn("CudaCodec.FixedKinds", item["tests"]["passed"])
            with open(os.path.join(out, "check.txt")) as text:
                self.assertIn("no GPU: skipped", text.read())

            # A driver that names a GPU which no CUDA program can use.
            driver = driver_in(os.path.join(folder, "driver"))
            checked = run(os.path.join(HERE, "check.sh"), "--pack", file, "--out", out,
                          env={**os.environ, "LD_LIBRARY_PATH": driver})
            self.assertEqual(checked.returncode, 2, checked.stdout + checked.stderr)
            report = report_in(out)
            self.assertEqual([item["name"] for item in report["items"]], ["gpu/probe"])
            self.assertRegex(report["verdict"], "not started: the driver names 1 x Fake, but .*cuda")

            if os.geteuid() != 0:
                self.skipTest("not root: nothing can be hidden")
            bare = remote_shells() + of_this_machine(BUILD)
            here = without(bare, [os.path.join(BUILD, "tests", "comm", "test_comm_device")])
            self.assertIn("error while loading shared libraries", here.stderr)
            checked = without(bare, [os.path.join(HERE, "check.sh"), "--pack", file, "--out", out,
                                     "--only", "comm/device_"])
            self.assertEqual(checked.returncode, check.NO_GPU, checked.stdout + checked.stderr)
            self.assertEqual([len(item["tests"]["passed"]) > 0 for item in report_in(out)["items"]
                              if item["kind"] == "test"], [True] * 3)


class WithoutSsh(unittest.TestCase):
    def test_ranks_of_this_machine(self):
        if os.geteuid() != 0:
            self.skipTest("not root: ssh cannot be hidden")
        common = os.path.join(HERE, "..", "..", "launch", "common.sh")
        job = "unset OMPI_MCA_plm_rsh_agent; {} timeout 20 mpirun {} true"
        here = f". '{common}'; mpi_environment;"
        for prepare, args, want in (("", "-n 2", False), (here, "-n 2", True),
                                    (here, "--host localhost,elsewhere -n 2", False)):
            done = without(remote_shells(), ["bash", "-c", job.format(prepare, args)])
            self.assertEqual(done.returncode == 0, want, done.stderr)
            self.assertNotEqual(done.returncode, 124, "mpirun waits for a host that it cannot reach")
        # Where there is ssh, the variable stays as it is.
        if shutil.which("ssh"):
            done = run("bash", "-c", f"unset OMPI_MCA_plm_rsh_agent; {here} env")
            self.assertNotIn("plm_rsh_agent", done.stdout)


class Machine(unittest.TestCase):
    """check.py on a pack of small programs, beside a driver that names one GPU."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.pack = os.path.join(self.folder, "pack")
        self.out = os.path.join(self.folder, "out")
        os.makedirs(os.path.join(self.pack, "bin"))
        self.probe = compiled(SEES, os.path.join(self.pack, "bin", "lshmoe-bench"))
        self.driver = driver_in(os.path.join(self.folder, "driver"))
        self.items = [self.item("gpu/probe", "probe", [self.probe])]

    def item(self, name, kind, command):
        return {"name": name, "kind": kind, "command": command, "seconds": 20, "environment": []}

    def script(self, name, text, kind="test"):
        self.items.append(self.item(name, kind, ["sh", "-c", text, "{json}"]))

    def start_check(self, *args, environment=None, before="pass"):
        """check.py, with Python before its start."""
        with open(os.path.join(self.pack, "items.json"), "w") as file:
            json.dump(self.items, file)
        program = f"import sys; sys.path.insert(0, {HERE!r}); sys.dont_write_bytecode = True; " \
                  f"import check; {before}; sys.exit(check.main())"
        if environment is None:
            environment = {"LD_LIBRARY_PATH": self.driver}
        return subprocess.Popen([sys.executable, "-c", program, "--pack", self.pack, "--out",
                                 self.out, *args], env={**os.environ, **environment}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def check(self, *args, **more):
        """(exit status, report) of check.py."""
        job = self.start_check(*args, **more)
        output, _ = job.communicate()
        self.assertIn(job.returncode, (0, 1, 2, check.NO_GPU), output)
        self.assertTrue(os.path.exists(self.out), output)
        return job.returncode, report_in(self.out)

    def test_programs_find_the_driver_where_the_machine_says(self):
        self.script("t", "echo '[       OK ] A.b (1 ms)'; " + self.probe)
        code, report = self.check()
        self.assertEqual((code, report["gpu"]), (0, "1 x Fake"), report)
        self.assertEqual(report["items"][0]["reason"], "1 GPU")

    def test_programs_find_the_driver_in_the_usual_folders(self):
        hidden = {"LD_LIBRARY_PATH": "/nowhere"}
        code, report = self.check(environment=hidden, before=f"check.DRIVER_FOLDERS = ({self.driver!r},)")
        self.assertEqual((code, report["items"][0]["reason"]), (0, "1 GPU"), report)
        # That of the toolkit where nothing else has one.
        before = f"check.DRIVER_FOLDERS = (); check.COMPAT_FOLDER = {self.driver!r}"
        code, report = self.check(environment=hidden, before=before)
        self.assertEqual((code, report["items"][0]["reason"]), (0, "1 GPU"), report)

    def test_ends_where_programs_cannot_use_the_gpu(self):
        self.script("t", "echo '[       OK ] A.b (1 ms)'")
        for probe in ("echo too old; exit 1", "echo no GPU; exit 77", "sleep 60"):
            self.items[0] = {**self.item("gpu/probe", "probe", ["sh", "-c", probe]), "seconds": 1}
            code, report = self.check()
            self.assertEqual((code, len(report["items"])), (2, 1), report)
            self.assertIn("not started: the driver names 1 x Fake", report["verdict"])
        # The kernel has a GPU, and there is no driver.
        before = f"check.DRIVER_FOLDERS = (); check.DEVICE_NODES = {self.probe!r}"
        code, report = self.check(environment={"LD_LIBRARY_PATH": ""}, before=before)
        self.assertEqual((code, report["items"]), (2, []))
        self.assertIn("but no libcuda.so.1 was found", report["verdict"])
        # The driver hangs.
        driver_in(self.driver, DRIVER.replace("return (int)flags;", "for (;;) sleep(9);"))
        before = f"check.PROBE_SECONDS = 1; check.DEVICE_NODES = {self.probe!r}"
        code, report = self.check(before=before)
        self.assertEqual((code, report["items"]), (2, []))
        self.assertIn("but libcuda has not answered for 1 s", report["verdict"])

    def test_reports_after_each_item(self):
        look = f"echo '[       OK ] A.b (1 ms)'; cp {self.out}/check.json {self.folder}/seen; " \
               f"grep -q 'passed *gpu/probe' {self.out}/check.txt"
        self.script("t", look)
        code, report = self.check()
        self.assertEqual(code, 0, report)
        with open(os.path.join(self.folder, "seen")) as file:
            seen = json.load(file)
        self.assertEqual([item["name"] for item in seen["items"]], ["gpu/probe"])
        self.assertIn("cut off", seen["verdict"])
        self.assertEqual(report["verdict"], "passed")

    def test_signals_end_what_runs(self):
        self.script("first", "echo '[       OK ] A.b (1 ms)'")
        # A program and its child; then one that takes no SIGTERM.
        self.script("second", f"echo line; sleep 61 & echo $$ $! > {self.folder}/pids; wait")
        self.script("third", "echo '[       OK ] A.b (1 ms)'")
        for number, ignore in ((signal.SIGTERM, ""), (signal.SIGINT, ""), (signal.SIGHUP, "trap '' TERM; ")):
            self.items[2]["command"][2] = ignore + self.items[2]["command"][2].removeprefix(ignore)
            pids = os.path.join(self.folder, "pids")
            if os.path.exists(pids):
                os.remove(pids)
            job = self.start_check()
            deadline = time.monotonic() + 60
            while not (os.path.exists(pids) and os.path.getsize(pids)):
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.02)
            job.send_signal(number)
            output, _ = job.communicate(timeout=30)
            deadline = time.monotonic() + 5
            report = report_in(self.out)
            self.assertEqual(job.returncode, 1, output)
            self.assertEqual(report["verdict"], f"stopped by {number.name}")
            self.assertEqual([(item["name"], item["status"]) for item in report["items"]],
                             [("gpu/probe", "passed"), ("first", "passed"), ("second", "stopped")])
            self.assertIn("line", report["items"][2]["output"])
            with open(os.path.join(self.out, "check.txt")) as text:
                self.assertIn("stopped    second", text.read())
            with open(pids) as file:
                for pid in file.read().split():
                    while lives(pid):
                        self.assertLess(time.monotonic(), deadline, f"{pid} lives on after {number}")
                        time.sleep(0.02)

    def test_what_skips_beside_a_gpu_failed(self):
        skipped = "echo '{}'; echo '[  SKIPPED ] A.c (0 ms)'; "
        passed = "echo '[       OK ] A.b (1 ms)'; "
        few = "h has 1 GPU for its 2 ranks (each rank takes one of its own)"
        for text, want in ((skipped.format("no CUDA device") + "exit 77", "failed"),
                           (skipped.format("not today") + "exit 77", "failed"),
                           (passed + skipped.format("no GPU: none here"), "failed"),
                           (passed + skipped.format("not today"), "passed"),
                           (skipped.format("there is a GPU") + skipped.format(few) + "exit 77",
                            "skipped")):
            self.script("t", text)
            code, report = self.check()
            self.assertEqual(report["items"][1]["status"], want, text)
            self.assertEqual(code, 1 if want == "failed" else 0)
            code, report = self.check(environment={"LD_LIBRARY_PATH": ""},
                                      before="check.DRIVER_FOLDERS = ()")
            self.assertEqual((code, report["verdict"]), (check.NO_GPU, "no GPU: skipped"))
            self.items.pop()

    def test_quick(self):
        for name in "abcd":
            self.script(name, "echo '[       OK ] A.b (1 ms)'")
        code, report = self.check("--quick")
        self.assertEqual([item["name"] for item in report["items"]], ["gpu/probe", "a", "b", "c"])
        self.assertEqual(code, 0)
        self.assertEqual(check.FIRST[:check.QUICK_ITEMS],
                         ["gpu/probe", "kernels/cuda_device_1", "compress/cuda_codec_1",
                          "bench/codec"])
        self.assertLessEqual(check.QUICK_SECONDS, 150)
        self.assertLess(check.BUDGET_SECONDS, 8 * 60)


class Judgment(unittest.TestCase):
    """Programs that print what GoogleTest prints."""

    def judge(self, script, kind="test", seconds=60):
        with tempfile.TemporaryDirectory() as folder:
            program = os.path.join(folder, "program")
            with open(program, "w") as file:
                file.write("#!/bin/sh\n" + script)
            os.chmod(program, os.stat(program).st_mode | stat.S_IXUSR)
            item = {"name": "x", "kind": kind, "command": [program, "{json}"], "environment": []}
            return check.run_item(item, dict(os.environ), seconds, [])

    def test_outcomes(self):
        passed = "echo '[       OK ] A.b (1 ms)'\n"
        skipped = "echo 'file.cpp:3: Skipped'; echo 'no CUDA device'; echo\n" \
                  "echo '[  SKIPPED ] A.c (0 ms)'\n"
        failed = "echo '[  FAILED  ] A.d (0 ms)'\n"
        self.assertEqual(self.judge(passed)["status"], "passed")
        one = self.judge(passed + skipped)
        self.assertEqual(one["status"], "passed")
        self.assertEqual(one["tests"]["skipped"], [{"name": "A.c", "reason": "no CUDA device"}])
        one = self.judge(skipped)
        self.assertEqual((one["status"], one["reason"]), ("skipped", "no CUDA device"))
        # A program says by 77 that it skipped everything, and by that only.
        self.assertEqual(self.judge(skipped + "exit 77")["status"], "skipped")
        self.assertEqual(self.judge(passed + "exit 77")["status"], "failed")
        self.assertEqual(self.judge(passed + failed + "exit 1")["status"], "failed")
        self.assertEqual(self.judge(passed + "exit 3")["status"], "failed")
        self.assertEqual(self.judge(passed + "kill -SEGV $$")["status"], "failed")
        self.assertEqual(self.judge("true")["status"], "failed")  # nothing was tested
        self.assertEqual(self.judge("sleep 1000", seconds=1)["status"], "timed out")

    def test_scripts(self):
        text = "echo 'test_a (__main__.A.test_a)'; echo 'What it does. ... ok'\n" \
               "echo 'test_b (__main__.A.test_b) ... skipped '\"'no GPU'\"\n"
        one = self.judge(text, kind="script")
        self.assertEqual(one["status"], "passed")
        self.assertEqual(one["tests"]["passed"], ["__main__.A.test_a"])
        self.assertEqual(one["tests"]["skipped"], [{"name": "__main__.A.test_b",
                                                    "reason": "no GPU"}])
        one = self.judge(text + "echo 'test_c (__main__.A.test_c) ... FAIL'\nexit 1",
                         kind="script")
        self.assertEqual((one["status"], one["tests"]["failed"]), ("failed", ["__main__.A.test_c"]))

    def test_benchmarks(self):
        self.assertEqual(self.judge("true", kind="benchmark")["status"], "failed")
        one = self.judge("echo '{\"ms\": 3}' > $1\necho table", kind="benchmark")
        self.assertEqual((one["status"], one["results"]), ("passed", [{"ms": 3}]))
        self.assertIn("table", one["output"])
        one = self.judge("echo '{\"ms\": 3' > $1\necho table", kind="benchmark")
        self.assertEqual((one["status"], one["results"]), ("failed", []))


if __name__ == "__main__":
    unittest.main()
