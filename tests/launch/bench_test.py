"""lshmoe-bench codec and layer as a user runs them: what it reads, measures, writes and refuses.

    bench_test.py PROGRAM [unittest's arguments]
"""

import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

PROGRAM = sys.argv.pop(1)
KEYS = ("kind state restore max_error rows hidden bits_per_element mean_error p99_error "
        "max_error_seen encode_mb_s decode_mb_s error_reference rounding break_even_gbit_s_bf16 "
        "break_even_gbit_s_fp8 transform codebook_size state_bytes rows_to_amortise_1pct "
        "clusters").split()
HEADER = 40  # bytes of a parcel before its rows


def npy(rows, descr):
    """The bytes of an array as numpy.save writes them; bfloat16 by cutting floats off."""
    values = [value for row in rows for value in row]
    if descr == "<f2":
        data = struct.pack("<%de" % len(values), *values)
    else:
        data = struct.pack("<%df" % len(values), *values)
        if "V2" in descr or descr == "bfloat16":
            data = b"".join(data[i + 2:i + 4] for i in range(0, len(data), 4))
    header = "{'descr': '%s', 'fortran_order': False, 'shape': (%d, %d), }" % (
        descr, len(rows), len(rows[0]))
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def gaussian(rows, hidden, seed=1):
    """Values that bfloat16 holds exactly."""
    draw = random.Random(seed)
    return [[round(draw.gauss(0, 1) * 32) / 32 for _ in range(hidden)] for _ in range(rows)]


def norm(values):
    return math.sqrt(sum(value * value for value in values))


def relative_errors(rows, others):
    return [norm([a - b for a, b in zip(row, other)]) / norm(row)
            for row, other in zip(rows, others)]


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def nearest(value, table):
    """The nearest value of a table, ties to the even code."""
    size = min(abs(value), table[-1])
    code = min(range(len(table)), key=lambda i: (abs(table[i] - size), i % 2))
    return math.copysign(table[code], value)


def e4m3():
    return [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0**(e - 7)
            for e in range(16) for m in range(8) if (e, m) != (15, 7)]


def by_blocks(row, block, scale_of):
    out = []
    for first in range(0, len(row), block):
        part = row[first:first + block]
        scale = scale_of(max(abs(value) for value in part))
        out += [nearest(value / scale, E2M1) * scale if scale > 0 else 0 for value in part]
    return out


class BenchTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, content):
        with open(self.path(name), "wb") as file:
            file.write(content)
        return self.path(name)

    def run_bench(self, args):
        return subprocess.run([PROGRAM, "codec", *args], text=True, capture_output=True, timeout=60)

    def test_one_process(self):
        target = self.path("out.json")
        small = [PROGRAM, "codec", "--synthetic-rows", "64", "--hidden-size", "32", "--json", target]
        for launcher, env, text in (
                ([], {"PMI_SIZE": "4", "PMI_RANK": "1"}, "PMI_SIZE is 4 but this process is alone"),
                (["mpirun", "-n", "2"], {},
                 "lshmoe-bench codec on 2 ranks (it measures one process): start it without mpirun")):
            job = subprocess.run([*launcher, *small], text=True, capture_output=True, timeout=60,
                                 env={**os.environ, **env})
            self.assertEqual(job.returncode, 1, job.stderr)
            self.assertEqual(job.stderr.count("[error]"), 1, job.stderr)
            self.assertIn(text, job.stderr)
            self.assertNotIn("MB/s", job.stdout)
            self.assertFalse(os.path.exists(target))

    def test_subcommands(self):
        for args, text in ((["kodec"], "unknown subcommand 'kodec': use lshmoe-bench codec or layer"),
                           ([], "no subcommand: use lshmoe-bench codec or layer")):
            job = subprocess.run([PROGRAM, *args], text=True, capture_output=True, timeout=60)
            self.assertEqual((job.returncode, job.stdout), (2, ""))
            self.assertIn("[error] " + text + "\n", job.stderr)
        for args in (["--help"], ["codec", "--help"], ["layer", "--help"]):
            job = subprocess.run([PROGRAM, *args], text=True, capture_output=True, timeout=60)
            self.assertEqual(job.returncode, 0)
            self.assertIn("usage: lshmoe-bench", job.stdout)
            with open("/dev/full", "w") as full:
                job = subprocess.run([PROGRAM, *args], text=True, stdout=full, timeout=60,
                                     stderr=subprocess.PIPE)
            self.assertEqual(job.returncode, 1)
            self.assertIn("cannot write standard output (No space left on device)", job.stderr)

    def measure(self, args):
        """The lines of the JSON file."""
        target = self.path("out.json")
        job = self.run_bench([*args, "--repeat", "1", "--json", target])
        self.assertEqual(job.returncode, 0, job.stderr)
        with open(target, encoding="ascii") as file:
            lines = [json.loads(line) for line in file]
        for line in lines:
            self.assertEqual(list(line), KEYS)
        table = job.stdout.split("\n\n", 1)[1].strip().splitlines()[1:]
        self.assertEqual([row.split()[0] for row in table], [line["kind"] for line in lines])
        return lines

    def test_bytes_of_fixed_formats(self):
        rows, hidden, groups = 50, 200, 3
        lines = self.measure(["--synthetic-rows", "50", "--hidden-size", "200", "--group-rows", "20",
                              "--kind", "none", "bf16", "fp8", "int8", "--kind", "int4", "mxfp4",
                              "nvfp4", "rcmoe8", "rcmoe4", "--rate", "0.1", "0.5"])
        want = {"none": 800, "bf16": 400, "fp8": 208, "int8": 204, "int4": 104,
                "mxfp4": 100 + 7, "nvfp4": 100 + 13 + 4 * groups / rows, "rcmoe8": 204,
                "rcmoe4": 104}
        self.assertEqual([line["kind"] for line in lines], list(want))
        for line in lines:
            bits = 8 * (want[line["kind"]] + HEADER * groups / rows) / hidden
            self.assertAlmostEqual(line["bits_per_element"], bits, msg=line["kind"])
            self.assertEqual((line["rows"], line["hidden"]), (rows, hidden))

    def test_break_even_bandwidth(self):
        lines = self.measure(["--kind", "fp8", "int8", "int4", "lsh", "mxfp4",
                              "--synthetic-rows", "600"])
        elements = 600 * 384

        def seconds(line):
            return 4e-6 * elements * (1 / line["encode_mb_s"] + 1 / line["decode_mb_s"])

        fp8 = lines[0]
        for line in lines[:-1]:
            bf16 = (16 - line["bits_per_element"]) * elements / seconds(line) / 1e9
            self.assertAlmostEqual(line["break_even_gbit_s_bf16"] / bf16, 1, places=6)
            saved = fp8["bits_per_element"] - line["bits_per_element"]
            more = seconds(line) - seconds(fp8)
            if saved <= 0:
                self.assertEqual(line["break_even_gbit_s_fp8"], 0)
            elif more <= 0:
                self.assertIsNone(line["break_even_gbit_s_fp8"])
            else:
                self.assertAlmostEqual(
                    line["break_even_gbit_s_fp8"] / (saved * elements / more / 1e9), 1, places=6)
        self.assertIsNone(lines[-1]["encode_mb_s"])
        self.assertIsNone(lines[-1]["break_even_gbit_s_bf16"])

    def test_errors_are_those_of_the_formulas(self):
        rows, scales = gaussian(60, 70), e4m3()
        rows[3] = [0.001 * value for value in rows[3]]
        rows[4] = [100 * value for value in rows[4]]
        rows = [list(struct.unpack("<70f", struct.pack("<70f", *row))) for row in rows]
        source = self.write("x.npy", npy(rows, "<f4"))
        lines = self.measure(["--input", source, "--kind", "int8", "mxfp4", "nvfp4"])
        whole = max(abs(value) for row in rows for value in row) / (6 * 448)
        others = [
            [[round(v / (max(map(abs, row)) / 127)) * max(map(abs, row)) / 127 for v in row]
             for row in rows],
            [by_blocks(row, 32, lambda most: 2.0**(math.floor(math.log2(most)) - 2))
             for row in rows],
            [by_blocks(row, 16, lambda most: nearest(most / 6 / whole, scales) * whole)
             for row in rows]]
        for line, received in zip(lines, others):
            errors = sorted(relative_errors(rows, received))
            places = 4 if line["kind"] == "int8" else 6
            self.assertAlmostEqual(line["mean_error"], sum(errors) / 60, places, line["kind"])
            self.assertAlmostEqual(line["max_error_seen"], errors[-1], places, line["kind"])
            self.assertAlmostEqual(line["p99_error"], errors[58], places, line["kind"])
            self.assertGreater(errors[-1] - errors[58], 10.0**-places)  # which is another one

    def test_group_reference(self):
        rows = gaussian(40, 64)
        rows[7] = [20 * value for value in rows[7]]
        source = self.write("x.npy", npy(rows, "<f4"))
        row, group = self.measure(["--input", source, "--kind", "lsh", "--max-error", "0.2",
                                   "--error-reference", "row", "group"])
        self.assertEqual((row["error_reference"], group["error_reference"]), ("row", "group"))
        for line in row, group:
            self.assertLessEqual(line["max_error_seen"], 0.2)
        self.assertGreater(group["max_error_seen"], 0.1)
        self.assertLess(group["bits_per_element"], row["bits_per_element"])

    def test_roundings(self):
        lines = self.measure(["--synthetic-rows", "600", "--hidden-size", "64", "--kind", "bf16",
                              "fp8", "int8", "lsh", "--rounding", "nearest", "dithered",
                              "stochastic", "--error-reference", "row", "group"])
        self.assertEqual(
            [(line["kind"], line["rounding"], line["error_reference"]) for line in lines],
            [("bf16", None, None), ("fp8", "nearest", None), ("fp8", "stochastic", None),
             ("int8", "nearest", None), ("int8", "stochastic", None),
             ("lsh", "nearest", "row"), ("lsh", "dithered", "row"),
             ("lsh", "nearest", "group"), ("lsh", "dithered", "group")])
        # By chance to either neighbor: twice the mean square of the nearest.
        for nearest, stochastic in (lines[1:3], lines[3:5]):
            ratio = stochastic["mean_error"] / nearest["mean_error"]
            self.assertAlmostEqual(ratio, math.sqrt(2), delta=0.05)
        for nearest, dithered in (lines[5:7], lines[7:9]):
            self.assertNotEqual(nearest["mean_error"], dithered["mean_error"])
            self.assertLessEqual(dithered["max_error_seen"], 0.1)

    def test_synthetic_clusters(self):
        size = ["--synthetic-rows", "1024", "--hidden-size", "128", "--kind", "lsh"]
        plain, = self.measure(size)
        near, = self.measure([*size, "--synthetic-clusters", "8"])
        self.assertEqual(plain["clusters"], 0)
        self.assertGreaterEqual(near["clusters"], 8)
        # Residuals of 0.3: log2(sqrt(1 + 0.3 ** 2) / 0.3) bits fewer, less the centroids'.
        saved = plain["bits_per_element"] - near["bits_per_element"]
        self.assertTrue(1.0 < saved < 1.8, saved)
        again, = self.measure([*size, "--synthetic-clusters", "8"])
        self.assertEqual(again["bits_per_element"], near["bits_per_element"])

    def test_dropping_and_centroids(self):
        draw = random.Random(5)
        four = gaussian(4, 32)
        rows = [four[draw.randrange(4)] for _ in range(60)]
        source = self.write("x.npy", npy(rows, "<f4"))
        lines = self.measure(["--input", source, "--kind", "drop", "kmeans", "lsh", "--restore",
                              "source", "--refine", "0", "1", "--rate", "0.25", "1"])
        drop, keep, means, every, buckets, refined = lines
        self.assertAlmostEqual(drop["mean_error"], 0.75)
        self.assertAlmostEqual(drop["bits_per_element"], 32 * 0.25 + 8 * HEADER / 60 / 32)
        self.assertEqual(keep["mean_error"], 0)
        self.assertEqual((means["clusters"], every["clusters"]), (15, 60))
        self.assertLess(every["mean_error"], 1e-6)
        for line in buckets, refined:  # a row against its centroid, which is the row here
            self.assertEqual(line["clusters"], 4)
            self.assertLess(line["max_error_seen"], 1e-6)
            self.assertAlmostEqual(line["bits_per_element"], 32 * 4 / 60 + 8 * HEADER / 60 / 32)
        # Rows that are no duplicates are some way off their centroid.
        source = self.write("y.npy", npy(gaussian(60, 32), "<f4"))
        means, centroids = self.measure(["--input", source, "--kind", "kmeans", "lsh", "--restore",
                                         "source", "--max-clusters", "8"])
        for line in means, centroids:
            self.assertGreater(line["mean_error"], 0.5)
            self.assertLess(line["mean_error"], 1.0)

    def test_types_of_input(self):
        rows = gaussian(30, 40)
        for descr in "<f2", "<f4", "<V2", "|V2", "bfloat16":
            source = self.write("x.npy", npy(rows, descr))
            exact = self.measure(["--input", source, "--kind", "none", "--dtype", "fp32"])[0]
            self.assertEqual((exact["mean_error"], exact["rows"]), (0, 30))
            lines = [self.measure(["--input", source, "--kind", "int8", *more])[0]["mean_error"]
                     for more in ([], ["--dtype", "fp32"], ["--dtype", "bf16"])]
            bf16 = "V2" in descr or descr == "bfloat16"
            self.assertEqual(lines[0], lines[2] if bf16 else lines[1], descr)
            self.assertNotEqual(lines[1], lines[2])
            # The same rows, whatever they are stored as.
            if descr == "<f2":
                first = lines
            self.assertEqual(lines[1:], first[1:], descr)

    def test_every_combination_that_makes_sense(self):
        source = self.write("x.npy", npy(gaussian(400, 32), "<f4"))
        lines = self.measure(["--input", source, "--fit-rows", "200", "--kind", "fp8", "lsh",
                              "--state", "batch", "learned", "--restore", "expert", "source",
                              "--transform", "channels", "--transform", "basis", "--max-error",
                              "0.1", "0.3", "--codebook-size", "0", "16", "--max-clusters", "0",
                              "8"])
        found = [(line["kind"], line["restore"], line["state"], line["transform"],
                  line["codebook_size"], line["max_error"]) for line in lines]
        want = [("fp8", None, None, None, None, None)]
        want += [("lsh", "expert", "batch", "channels", None, e) for e in (0.1, 0.3)] * 2
        want += [("lsh", "expert", "learned", t, k, e)
                 for t in ("channels", "basis") for k in (0, 16) for e in (0.1, 0.3)]
        want += [("lsh", "source", None, None, None, None)] * 2
        self.assertEqual(sorted(map(str, found)), sorted(map(str, want)))
        for line in lines:
            self.assertEqual(line["rows"], 200)
            if line["state"] != "learned":
                self.assertEqual((line["state_bytes"], line["rows_to_amortise_1pct"]), (0, 0))
                continue
            self.assertGreater(line["state_bytes"], 0)
            row_bytes = line["bits_per_element"] * 32 / 8
            self.assertEqual(line["rows_to_amortise_1pct"],
                             math.ceil(round(100 * line["state_bytes"] / row_bytes, 6)))
            self.assertLessEqual(line["max_error_seen"], line["max_error"])

    def test_picture(self):
        picture = self.path("x.svg")
        lines = self.measure(["--kind", "bf16", "fp8", "int4", "lsh", "drop", "--max-error", "0.05",
                              "0.1", "0.2", "--synthetic-rows", "300", "--dtype", "fp32", "--plot",
                              picture])
        root = xml.etree.ElementTree.parse(picture).getroot()
        tag = "{http://www.w3.org/2000/svg}"
        texts = [text.text for text in root.iter(tag + "text")]
        for name in ("bf16", "fp8", "int4", "lsh batch channels C128", "drop", "bits per element",
                     "mean relative error", "Codecs on synthetic"):
            self.assertEqual(texts.count(name), 1, name)
        # The three bounds of lsh, where the axes' own numbers say.
        places = {text.text: (float(text.get("x")), float(text.get("y")))
                  for text in root.iter(tag + "text")}
        zero, ten = places["0"][0], places["10"][0]
        low, high = places["0.01"][1], places["0.1"][1]
        frame = next(rect for rect in root.iter(tag + "rect") if rect.get("fill") == "none")
        left, top, width, height = (float(frame.get(key)) for key in ("x", "y", "width", "height"))
        polyline, = root.iter(tag + "polyline")
        points = [tuple(map(float, point.split(","))) for point in polyline.get("points").split()]
        lsh = sorted((line["bits_per_element"], line["mean_error"]) for line in lines
                     if line["kind"] == "lsh")
        self.assertEqual(len(points), 3)
        for (x, y), (bits, error) in zip(points, lsh):
            self.assertTrue(left < x < left + width and top < y < top + height, (x, y))
            self.assertAlmostEqual(x, zero + (ten - zero) * bits / 10, delta=0.2)
            want = low + (high - low) * (math.log10(error) + 2) - 4  # numbers stand a little lower
            self.assertAlmostEqual(y, want, delta=0.2)

    def test_json_on_standard_output(self):
        for sub, args in (("codec", ["--synthetic-rows", "64", "--hidden-size", "32"]),
                          ("layer", LayerTest.SIZES)):
            for path in "-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1":
                job = subprocess.run([PROGRAM, sub, *args, "--json", path], capture_output=True,
                                     text=True, timeout=60, cwd=self.folder)
                self.assertEqual(job.returncode, 0, job.stderr)
                self.assertNotIn("-", os.listdir(self.folder))
                self.assertGreater(len([json.loads(line) for line in job.stdout.splitlines()]), 1)
                self.assertIn("MB/s" if sub == "codec" else "TFLOP/s", job.stderr)
            # Also where that is a file, after what stands in it.
            with open(self.path("log"), "a+") as log:
                log.truncate(0)
                log.write("before\n")
                log.flush()
                job = subprocess.run([PROGRAM, sub, *args, "--json", "/dev/stdout"], stdout=log,
                                     stderr=subprocess.PIPE, text=True, timeout=60)
                log.seek(0)
                lines = log.read().splitlines()
            self.assertEqual(lines[0], "before")
            self.assertGreater(len([json.loads(line) for line in lines[1:]]), 1)

    def test_lines_as_they_are_measured(self):
        pipe = self.path("pipe")
        os.mkfifo(pipe)
        bounds = [str(0.1 + i / 1e5) for i in range(5000)]
        with subprocess.Popen([PROGRAM, "codec", "--kind", "bf16", "lsh", "--max-error", *bounds,
                               "--synthetic-rows", "256", "--hidden-size", "64", "--json", pipe],
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
            with open(pipe, encoding="ascii") as lines:
                self.assertEqual(json.loads(lines.readline())["kind"], "bf16")
            error = job.stderr.read()
        self.assertEqual(job.returncode, 1, error)
        self.assertIn(f"cannot write '{pipe}' (Broken pipe): keep what reads it running", error)

    def test_refuses(self):
        source = self.write("x.npy", npy(gaussian(20, 8), "<f4"))
        for args, text in (
                (["--plot", "x.png"], "does not end in .svg"),
                (["--state", "learned"], "state learned needs --fit-rows"),
                (["--fit-rows", "20"], "leaves none to measure"),
                (["--transform", "basis", "--kind", "lsh"], "no combination"),
                (["--kind", "fp9"], "unknown codec kind 'fp9'"),
                (["--kind", "drop", "--rate", "0"], "must be above 0"),
                (["--dtype", "fp16"], "unknown dtype 'fp16'"),
                (["--rounding", "up"], "unknown rounding 'up'"),
                (["--kind", "lsh", "--rounding", "stochastic"], "no combination"),
                (["--first-row", "20"], "(it has 20 rows, from 0): give a smaller one"),
                (["--json", "x.svg", "--plot", "./x.svg"],
                 "--json and --plot name the same file, './x.svg'"),
                (["--json", "/nowhere/x.json"], "cannot write '/nowhere/x.json' (No such file"),
                (["--plot", "/nowhere/x.svg"], "cannot write '/nowhere/x.svg' (No such file"),
                *((["--" + name, value], f"{name} is {value} (must be at least {least})")
                  for name, least in (("first-row", 0), ("fit-rows", 0), ("synthetic-rows", 1),
                                      ("hidden-size", 1), ("synthetic-clusters", 0),
                                      ("group-rows", 1), ("repeat", 1), ("codebook-size", 0))
                  for value in ("-4", "0")[:1 + least])):
            given = [] if "--repeat" in args else ["--repeat", "1"]
            job = self.run_bench(["--input", source, *given, *args])
            self.assertEqual((job.returncode, job.stdout), (1, ""), args)  # nothing was measured
            self.assertIn(text, job.stderr)
        for descr in "<i4", ">f4", "<V4":
            job = self.run_bench(["--input", self.write("y.npy", npy(gaussian(3, 4), descr))])
            self.assertEqual(job.returncode, 1)
            self.assertRegex(job.stderr, "holds no little-endian float16, .* \\(header .*}\\): convert it")
        whole = npy(gaussian(3, 4), "<f4")
        for shape, text in ("(12,)  ", r"no array of two dimensions, .*\(header .*}\): reshape it"), \
                ("(3,2,2)", "is no array of two dimensions"), ("(0, 4) ", "nothing in it"), \
                ("(3, 0) ", "nothing in it"):
            bad = whole.replace(b"(3, 4), ", shape.encode() + b",")
            job = self.run_bench(["--input", self.write("y.npy", bad)])
            self.assertEqual(job.returncode, 1)
            self.assertRegex(job.stderr, text)


class LayerTest(unittest.TestCase):
    SIZES = ["--hidden-size", "32", "--ffn-hidden-size", "64", "--tokens", "96", "--repeat", "2"]

    def measure(self, args, ranks=1):
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as lines:
            command = ["mpirun", "-n", str(ranks)] if ranks > 1 else []
            job = subprocess.run([*command, PROGRAM, "layer", *self.SIZES, "--json", lines.name,
                                  *args], capture_output=True, text=True)
            self.assertEqual(job.returncode, 0, job.stderr)
            with open(lines.name) as file:
                return [json.loads(line) for line in file], job.stdout

    def test_alone(self):
        for dtype in "fp32", "bf16":
            lines, text = self.measure(["--dtype", dtype])
            self.assertTrue(text.startswith("1 rank, 96 tokens each"), text)
            self.assertEqual(lines[0]["variant"], "lshmoe, uncompressed")
            self.assertEqual(lines[-1]["variant"], "reference, loop")
            self.assertIn("from the reference's", text)
            for line in lines:
                self.assertEqual((line["ranks"], line["bytes_sent"], line["dtype"]), (1, 0, dtype))
                ms = line["ms"]
                self.assertTrue(0 < ms["least"] <= ms["all"] <= ms["most"])
                # FLOPs: 2 products of 2 x rows x hidden x ffn, three times for the gradients too.
                flops = 12 * 96 * 2 * 32 * 64
                self.assertAlmostEqual(line["tflop_s"], 1e-9 * flops / ms["all"], delta=1e-9)
        lines, _ = self.measure(["--compress", "lsh", "--codec-on-self"])
        plain, lsh = lines[:2]
        self.assertEqual(lsh["variant"], "lshmoe, lsh")
        self.assertGreater(lsh["ms"]["codec"], 0)
        self.assertTrue(0 < lsh["max_error_ratio"] <= 1)
        self.assertIsNone(plain["break_even_gbit_s"])
        self.assertEqual((lsh["fits"], "fit" in lsh["ms"]), (0, False))

    def test_learned_state(self):
        for ranks in 1, 2:
            lines, text = self.measure(["--compress", "lsh", "--codec-on-self", "--codec-state",
                                        "learned"], ranks)
            # Of four refreshes the first, the second and the last fit.
            self.assertEqual([line["fits"] for line in lines[:2]], [0, 3])
            self.assertGreater(lines[1]["ms"]["fit"], 0)
            self.assertIn("learned states: 3 fits between repetitions", text)

    def test_two_ranks(self):
        lines, _ = self.measure(["--compress", "fp8"], ranks=2)
        plain, fp8 = lines[:2]
        self.assertEqual(fp8["ranks"], 2)
        # fp32 rows: twice bf16's bytes, and the plan's; fp8: about half.
        self.assertGreater(plain["bytes_sent"], 2 * plain["bytes_raw"])
        self.assertLess(fp8["bytes_sent"], 0.8 * fp8["bytes_raw"])
        # Of two medians of times either may be the smaller: then there is no such bandwidth.
        if fp8["ms"]["codec"] > plain["ms"]["codec"]:
            self.assertGreater(fp8["break_even_gbit_s"], 0)
        else:
            self.assertIsNone(fp8["break_even_gbit_s"])
        self.assertGreater(plain["ms"]["exchange"], 0)

    def test_aux_loss(self):
        lines, _ = self.measure(["--aux-loss", "--compress", "fp8"], ranks=2)
        self.assertEqual([line["variant"] for line in lines[2:4]],
                         ["aux loss of rank", "aux loss of world"])
        self.assertEqual(lines[2]["bytes_sent"], lines[0]["bytes_sent"])
        # Each of the two tells the other its load: an int32 an expert.
        self.assertEqual(lines[3]["bytes_sent"], lines[0]["bytes_sent"] + 2 * 4 * 8)

    def test_refuses(self):
        for args, text in ((["--dtype", "fp16"], "unknown dtype 'fp16'"),
                           (["--num-experts", "8", "--top-k", "9"], "top_k"),
                           (["--json", "/nowhere/x.json"], "cannot write '/nowhere/x.json' (No such"),
                           (["--codec-state", "learned"], "--codec-state without --compress (only "
                            "the uncompressed layer is measured): add --compress lsh, or"),
                           (["--compress", "lsh", "--max-error-backward", "-4"], "max_error -4"),
                           *((["--" + name, value], f"{name} is {value} (must be at least 1)")
                             for name in ("hidden-size", "ffn-hidden-size", "num-experts", "top-k",
                                          "tokens", "repeat") for value in ("-4", "0")),
                           (["--compress", "fp9"], "unknown codec kind 'fp9'"),
                           ([], "PMI_SIZE is 4 but this process is alone")):
            more = {} if args else {"PMI_SIZE": "4", "PMI_RANK": "1"}
            given = [word for name, value in zip(self.SIZES[::2], self.SIZES[1::2])
                     if name not in args for word in (name, value)]
            job = subprocess.run([PROGRAM, "layer", *given, *args], capture_output=True, text=True,
                                 env={**os.environ, **more})
            self.assertEqual((job.returncode, job.stdout), (1, ""), args)  # nothing was measured
            self.assertIn(text, job.stderr)


if __name__ == "__main__":
    unittest.main()
