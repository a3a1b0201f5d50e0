"""Packs a build, checks the pack as on another machine, and check.py's own judgement.

    python gpu_check_test.py BUILD_DIR
"""

import json
import os
import stat
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path.insert(0, HERE)
import check  # noqa: E402

BUILD = sys.argv.pop(1)


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


class Pack(unittest.TestCase):
    def test_pack_and_check(self):
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "pack.tar.gz")
            packed = run(os.path.join(HERE, "pack.sh"), BUILD, file)
            self.assertEqual(packed.returncode, 0, packed.stdout + packed.stderr)
            self.assertLess(os.path.getsize(file), 64 << 20)

            listed = run(os.path.join(HERE, "check.sh"), "--pack", file, "--list")
            self.assertEqual(listed.returncode, 0, listed.stderr)
            items = [json.loads(line) for line in listed.stdout.splitlines()]
            names = {item["name"] for item in items}
            self.assertIn("compress/cuda_codec_1", names)
            self.assertLessEqual({"bench/codec", "bench/layer"}, names)
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


class Judgement(unittest.TestCase):
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


if __name__ == "__main__":
    unittest.main()
