"""lshmoe-train as a user runs it: bad input, files it writes, signals, ranks that fail.

    train_test.py PROGRAM VICTIM MPIEXEC QUICKSTART [unittest's arguments]
"""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM, VICTIM, MPIEXEC, QUICKSTART = sys.argv[1:5]
del sys.argv[1:5]
# A launcher around this script, as on a cluster, must not be taken for the jobs' own.
for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "SLURM_NTASKS",
             "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "PALS_LOCAL_SIZE", "PALS_RANKID",
             "JSM_NAMESPACE_SIZE", "WORLD_SIZE"):
    os.environ.pop(name, None)

TINY = ("--hidden-size 16 --heads 2 --ffn-hidden-size 16 --dense-ffn-hidden-size 16 --seq-len 32 "
        "--batch-size 2 --eval-sequences 8 --warmup-steps 5 --lr 0.01").split()
KEYS = ("step loss eval_loss aux_loss lr grad_norm tokens_per_s step_ms codec_ms codec_state_ms "
        "alltoall_ms expert_ms bytes_sent bytes_raw codec_bytes plan_bytes codec_state_bytes "
        "codec_state_memory codec_state_version rate max_relative_error max_error_ratio "
        "expert_load_max_over_mean expert_load dropped_tokens skipped").split()


def command(args, ranks, program=PROGRAM, mpi_args=()):
    return ([MPIEXEC, "-n", str(ranks), *mpi_args] if ranks > 1 else []) + [program, *args]


def refuse_constant(name):
    raise ValueError(name + " is not JSON")


class TrainTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.text = self.write("text.txt", "the quick brown fox jumps over the lazy dog. " * 1000)

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        return path

    def path(self, name):
        return os.path.join(self.folder, name)

    def run_job(self, args, ranks=1, limit=30, **more):
        """Returns (exit code, output, seconds). Reaching the limit is the hang that must not be."""
        env = dict(os.environ, **more.pop("env", {}))
        start = time.monotonic()
        job = subprocess.Popen(command(args, ranks, **more), env=env, text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
        try:
            output, _ = job.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            self.fail(f"hangs: {args} at {ranks} ranks: {job.communicate()[0]}")
        return job.returncode, output, time.monotonic() - start

    def train(self, args, ranks=1, **more):
        code, output, _ = self.run_job([*TINY, "--data", self.text, *args], ranks, **more)
        self.assertEqual(code, 0, output)
        return output

    def metrics(self, name="m.jsonl"):
        with open(self.path(name), encoding="ascii") as file:
            return [json.loads(line, parse_constant=refuse_constant) for line in file]


class BadInput(TrainTest):
    """One error line that says what is wrong and what to do; a failing exit code; no hang."""

    def refused(self, ranks, cases):
        for args, text in cases:
            with self.subTest(args=args):
                code, output, _ = self.run_job(args, ranks)
                self.assertNotEqual(code, 0, output)
                errors = [line for line in output.splitlines() if "[error]" in line]
                self.assertEqual(len(errors), 1, output)
                self.assertRegex(errors[0], text)
                self.assertNotIn("loss", re.sub("aux.loss.(coeff|scope)", "", output))

    def cases(self):
        empty = self.write("empty.txt", "")
        text = ["--data", self.text]
        return [
            (["--num-expert", "8"], r"unknown option 'num-expert' .*did you mean --num-experts\?"),
            ([*text, "--top-k", "9"], r"top_k.* 9.*num_experts.* 8"),
            (["--data", self.path("none.txt")], r"no data at '.*none.txt' .*: give --data an existing"),
            (["--data", empty], r"'.*empty.txt' is empty: give --data"),
            ([*text, "--ep-size", "3"], r"ep-size 3 does not divide .*: change --ep-size or"),
            ([*text, "--batch-size", "99999999999"],
             r"batch-size 99999999999 .* too many tokens .*: lower one of them"),
            ([*text, "--hidden-size", "0"], r"hidden-size is 0 \(must be at least 1\)"),
            ([*text, "--compress", "zip"], r"'zip'.*none.*bf16.*lsh"),
            ([*text, "--compress", "bf16", "--rounding", "stochastic"],
             r"rounding stochastic is not for kind bf16: use nearest"),
            ([*text, "--compress", "lsh", "--estimate-alpha"],
             r"estimate_alpha needs restore source .*: set it, or"),
            ([*text, "--compress", "lsh", "--max-error-backward", "-1"],
             r"max-error-backward is -1 \(must be 0 or positive\)"),
            ([*text, "--compress", "fp8", "--restore", "source"],
             r"restore source is for --compress lsh.* add --compress lsh"),
            ([*text, "--max-error", "0.3"],
             r"--max-error without --compress \(nothing is compressed\): add --compress lsh, or .* none"),
            ([*text, "--compress", "lsh", "--max-error", "-1"], r"max_error.*-1.*(0|positive)"),
        ]

    def test_alone(self):
        text = ["--data", self.text]
        config = self.write("codec.ini", "compress = lsh\n")
        self.refused(1, [
            *self.cases(),
            ([*text, "--seq-len", str(2**63 - 1)], r"seq-len 9223372036854775807 .* too many tokens"),
            ([*text, "--seq-len", "65536", "--batch-size", "65536"], r"too many tokens"),
            (["--steps", "many"], r"'many'.*--steps"),
            (["--layer-s"], r"unknown option 'layer-s'.*did you mean --layers\?"),
            (["8"], r"a value without an option"),
            ([*text, "--config", self.path("none.ini")], r"--config: cannot read '.*none.ini' \(No such"),
            ([*text, "--config", self.folder], r"--config: cannot read '.*' \(it is a folder\): name a"),
            ([*text, "--study"], r"study on one rank, .*\(no row is sent.*\): start more"),
            (["--config", self.write("a.ini", "top_k = 2\n")],
             r"unknown option 'top_k' in .*a.ini, did you mean --top-k\?"),
            ([*text, "--score-function", "tanh"], r"'tanh'.*softmax.*sigmoid"),
            ([*text, "--aux-loss-scope", "all"], r"'all'.*world, rank or sequence"),
            ([*text, "--num-groups", "3"], r"num_groups is 3.*divide num_experts"),
            ([*text, "--top-k-groups", "2"], r"top_k_groups is 2"),
            ([*text, "--routed-scaling-factor", "0"], r"routed_scaling_factor is 0"),
            ([*text, "--logit-noise", "-1"], r"logit_noise is -1"),
            ([*text, "--activation", "elu"], r"'elu'.*relu.*gelu.*swiglu"),
            ([*text, "--device", "tpu"], r"unknown device 'tpu': use --device auto, cpu or cuda"),
            ([*text, "--device", "cpu", "--share-gpu"], r"share-gpu is for GPUs.*leave it out"),
            ([*text, "--device", "cpu", "--comm-backend", "nccl"], r"nccl is for GPUs"),
            ([*text, "--comm-backend", "tcp"], r"unknown comm-backend 'tcp': use --comm-backend auto"),
            ([*text, "--share-gpu", "--comm-backend", "nccl"],
             r"share-gpu with comm-backend nccl .*two ranks on one GPU.*: use --comm-backend mpi"),
            ([*text, "--nvtx", "--trace", self.path("t.json")], r"nvtx and trace exclude each other"),
            ([*text, "--dtype", "fp16"], r"'fp16': use --dtype fp32 or bf16"),
            ([*text, "--compress", "lsh", "--max-error", "nan"], r"max_error.*nan"),
            ([*text, "--codec-on-self"], r"--codec-on-self without --compress \("),
            ([*text, "--config", self.write("b.ini", "#compress = lsh\nrestore = source\n")],
             r"--restore without --compress \("),
            ([*text, "--config", self.write("c.ini", "[train]\nsteps = 1\n")],
             r"section '\[train\]' in .*c.ini \(.* no sections .*\): remove its line"),
            ([*text, "--study-seeds", "2"], r"--study-seeds without --study \("),
            ([*text, "--study", "--study-setting", "--alpha 1"],
             r"study-setting '--alpha 1': --alpha without --compress \("),
            ([*text, "--timeout", "0"], r"timeout is 0 .*above 0"),
            ([*text, "--moe-every", "3"], r"moe-every is 3"),
            ([*text, "--seed", "-1"], r"seed is -1 .*at least 0"),
            ([*text, "--metrics", "/nonexistent/m.jsonl"], r"cannot write '/nonexistent/m.*: name a file in a folder that exists"),
            ([*text, "--trace", "/nonexistent/t.json"], r"cannot write '/nonexistent/t"),
            (["--data", self.write("short.txt", "short")], r"more text or a smaller --seq-len"),
            ([*text, "--study", "--study-seeds", "0"], r"study-seeds is 0 .*at least 1"),
            ([*text, "--study", "--study-setting", "--compress zip"],
             r"study-setting '--compress zip': .*'zip'"),
            ([*text, "--study", "--study-setting", "--compres int8"],
             r"study-setting '--compres int8': unknown option 'compres'.*--compress"),
            *(([*text, "--study", "--study-setting", "--compress int8 " + more],
               rf"study-setting '--compress int8 .*': --{name} is not of the codec .*: give it beside")
              for name, more in (("steps", "--lr 5 --steps 77"), ("lr", "--lr 5"),
                                 ("config", "--config " + config), ("study", "--study"))),
            *(([*text, "--config", config, "--study", *more],
               rf"{more[0]} with --study \(.*\): put it into a --study-setting, or leave it out")
              for more in (["--max-error", "0.3"], ["--compress", "lsh"], ["--codec-on-self"],
                           ["--capacity-factor", "2"], ["--drop-policy", "position"])),
            *(([*text, "--study", *[word for setting in settings
                                    for word in ("--study-setting", "--compress " + setting)]],
               r"study-setting '--compress int8' is given twice \(.*\): give it once")
              for settings in (["none", "int8", "int8"], ["int8", "none", "int8"])),
            ([*text, "--metrics", "-", "--trace", "/dev/stdout"],
             r"metrics and trace go to the same file, '-' \(.*\): name two"),
            ([*text, "--metrics", self.path("m"), "--trace", self.folder + "/./m"],
             r"metrics and trace go to the same file, '.*/m'"),
        ])

    def test_ranks(self):
        text = ["--data", self.text]
        self.refused(4, [
            *self.cases(),
            ([*text, "--num-experts", "6"], r"num_experts 6 is not divisible by ep_size 4 .*: change"),
            ([*text, "--metrics", "/nonexistent/m.jsonl"], r"cannot write '/nonexistent/m.*: name a file in a folder that exists"),
            ([*text, "--metrics", self.path("t.rank0.json"), "--trace", self.path("t.json")],
             r"metrics and trace go to the same file, '.*/t.rank0.json'"),
        ])

    def test_ranks_with_other_options(self):
        config = self.write("lr.ini", "lr = 0.01\n")
        for first, last, text in (
                (["--lr", "0.1"], ["--lr", "0.2"], "--lr '0.2', rank 0 has --lr '0.1'"),
                ([], ["--seed", "7"], "--seed '7', rank 0 has --seed '0'"),
                (["--accumulate", "3"], [], "--accumulate '1', rank 0 has --accumulate '3'"),
                (["--compress", "lsh"], ["--compress", "int8"],
                 "--compress 'int8', rank 0 has --compress 'lsh'"),
                ([], ["--share-gpu"], "--share-gpu 'true', rank 0 has --share-gpu 'false'"),
                ([], ["--help"], "--help 'true', rank 0 has --help 'false'"),
                # The same, however written; what is each rank's own matter.
                (["--lr", ".010", "--progress", "1", "--metrics", self.path("m.jsonl")],
                 ["--config", config], None)):
            job = [PROGRAM, *TINY[:-2], "--data", self.text, "--steps", "1"]
            code, output, _ = self.run_job(["-n", "1", *job, *first, ":", "-n", "1", *job, *last],
                                           program=MPIEXEC)
            if text is None:
                self.assertEqual(code, 0, output)
                continue
            self.assertEqual(code, 1, output)
            errors = [line for line in output.splitlines() if "[error]" in line]
            self.assertEqual(len(errors), 1, output)
            self.assertIn(f"rank 1 has {text}: start all ranks with the same options", errors[0])
            self.assertNotIn("tokens/s", output)


class Files(TrainTest):
    def test_help(self):
        code, output, _ = self.run_job(["--help"])
        self.assertEqual(code, 0)
        for words in ("usage: lshmoe-train", "--num-experts", "--max-error", "--data PATH"):
            self.assertIn(words, output)
        code, again, _ = self.run_job(["--help"], ranks=2)
        self.assertEqual((code, again), (0, output))
        code, again, _ = self.run_job(["--help"], env={"SLURM_NTASKS": "4"})
        self.assertEqual((code, again), (0, output))
        for env in {}, {"SLURM_NTASKS": "4"}:
            with open("/dev/full", "w") as full:
                job = subprocess.run([PROGRAM, "--help"], stdout=full, stderr=subprocess.PIPE,
                                     text=True, env={**os.environ, **env}, timeout=60)
            self.assertEqual(job.returncode, 1)
            self.assertIn("cannot write standard output (No space left on device)", job.stderr)

    def test_metrics(self):
        output = self.train(["--steps", "30", "--eval-every", "10", "--compress", "lsh",
                             "--codec-state", "learned", "--metrics", self.path("m.jsonl"), "--progress", "10"], ranks=2)
        lines = self.metrics()
        self.assertEqual([line["step"] for line in lines], list(range(1, 31)))
        for line in lines:
            self.assertEqual(list(line), KEYS)
            self.assertEqual(line["eval_loss"] is not None, line["step"] % 10 == 0)
            self.assertAlmostEqual(line["rate"], line["bytes_sent"] / line["bytes_raw"])
            self.assertAlmostEqual(line["tokens_per_s"] * line["step_ms"] / 1e3, 2 * 2 * 32)
            self.assertIsInstance(line["bytes_sent"], int)
            self.assertEqual(
                line["bytes_sent"],
                sum(line["codec_bytes"].values()) + line["plan_bytes"] + line["codec_state_bytes"])
            self.assertGreater(min(line["codec_bytes"].values()), 0)
            self.assertLessEqual(line["max_relative_error"], 0.1 * (1 + 1e-6))
            self.assertLessEqual(line["max_error_ratio"], 1.0)
            (load,), (dropped,) = line["expert_load"], line["dropped_tokens"]
            self.assertEqual(sum(load), 2 * 2 * 32 * 2)  # ranks, sequences, tokens, top-k
            self.assertAlmostEqual(line["expert_load_max_over_mean"], max(load) / (sum(load) / 8))
            self.assertEqual(dropped, [0] * 8)
            parts = line["codec_ms"] + line["alltoall_ms"] + line["expert_ms"]
            self.assertTrue(0 < parts < line["step_ms"])
            # The learned state is fitted at steps 1, 2, 4, ...
            fits = line["step"].bit_length()
            self.assertEqual(line["codec_state_version"], fits)
            self.assertEqual(line["codec_state_bytes"] > 0, line["step"] == 1 << fits - 1)
            self.assertLess(line["codec_state_bytes"], line["bytes_sent"])
            self.assertGreater(line["codec_state_memory"], 0)
            self.assertTrue(0 <= line["codec_state_ms"] <= line["codec_ms"])
        self.assertLess(lines[-1]["loss"], lines[0]["loss"] - 1)
        # The same numbers for the reader.
        self.assertRegex(output, r"step 20/30  loss [\d.]+  \d+ tokens/s  ETA \d+ s  sent [\d.]+ %")
        self.assertIn(f"held-out loss {lines[9]['eval_loss']:.4f}", output)
        self.assertRegex(output, r"finished with step 30 of 30, \d+ s of training")
        self.assertIn(f"held-out loss   {lines[-1]['eval_loss']:.4f} nats", output)
        sent, raw = (sum(line[key] for line in lines) for key in ("bytes_sent", "bytes_raw"))
        self.assertIn(f"{sent / 2**20:.1f} MiB sent, {raw / 2**20:.1f} MiB raw (bf16): "
                      f"{100 * sent / raw:.1f} %, {(raw - sent) / 2**20:.1f} MiB saved", output)
        state, seconds = (sum(line[key] for line in lines)
                          for key in ("codec_state_bytes", "codec_state_ms"))
        self.assertIn(f"learned state   version 5: {state / 2**20:.1f} MiB of the bytes sent, "
                      f"{seconds / 1e3:.1f} s of the codec's time, "
                      f"{lines[-1]['codec_state_memory'] / 2**20:.1f} MiB of memory a rank", output)
        shares = re.search(r"  time  .*", output).group()
        self.assertAlmostEqual(sum(map(float, re.findall(r"([\d.]+) %", shares))), 100, delta=0.4)

    def test_dropped_tokens(self):
        self.train(["--steps", "3", "--capacity-factor", "0.5", "--layers", "4", "--metrics",
                    self.path("m.jsonl")], ranks=2)
        for line in self.metrics():
            self.assertEqual(len(line["expert_load"]), 2)
            for load, dropped in zip(line["expert_load"], line["dropped_tokens"]):
                self.assertEqual(sum(load), 2 * 2 * 32 * 2)
                # Each rank sends an expert 8 of its 64 x 2 / 8 = 16, at most.
                for chosen, lost in zip(load, dropped):
                    self.assertGreaterEqual(lost, chosen - 2 * 8)
                    self.assertLessEqual(lost, chosen)
                self.assertGreaterEqual(sum(dropped), sum(load) - 8 * 2 * 8)

    def test_same_bits(self):
        for ranks in (1, 4):
            for name in ("a.jsonl", "b.jsonl"):
                self.train(["--steps", "8", "--eval-every", "4", "--compress", "lsh", "--metrics",
                            self.path(name)], ranks)
            same = [[{k: line[k] for k in KEYS if not re.search("_ms|_s$", k)}
                     for line in self.metrics(name)] for name in ("a.jsonl", "b.jsonl")]
            self.assertEqual(*same)
            self.assertGreater(same[0][0]["loss"], 4)

    def test_metrics_on_standard_output(self):
        for ranks, path in ((1, "/dev/stdout"), (1, "-"), (2, "-")):
            job = subprocess.run(command([*TINY, "--data", self.text, "--steps", "2", "--metrics",
                                          path], ranks), capture_output=True, text=True,
                                 stdin=subprocess.DEVNULL, timeout=60, cwd=self.folder)
            self.assertEqual(job.returncode, 0, job.stderr)
            self.assertEqual([json.loads(line)["step"] for line in job.stdout.splitlines()], [1, 2])
            self.assertIn("2 steps", job.stderr)
            self.assertIn("1 rank, " if ranks == 1 else "2 ranks, ", job.stderr)
            self.assertEqual(os.listdir(self.folder), ["text.txt"])

    def test_reader_that_leaves(self):
        endless = [*TINY, "--data", self.text, "--steps", "1000000", "--eval-every", "0",
                   "--progress", "1"]
        said = r"\[error\] cannot write {} \(Broken pipe\): keep what reads it running\n"
        for args in ([], ["--metrics", "-"]):
            with subprocess.Popen(command([*endless, *args], 1), stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
                job.stdout.readline()
                job.stdout.close()
                error = job.stderr.read()
            self.assertEqual(job.returncode, 1, error)
            self.assertRegex(error, said.format("standard output"))
        # mpirun's own output is mpirun's; a pipe by name is the rank's.
        pipe = self.path("pipe")
        os.mkfifo(pipe)
        reader = subprocess.Popen(["head", "-1", pipe], stdout=subprocess.DEVNULL)
        code, output, _ = self.run_job([*endless, "--metrics", pipe], 4)
        reader.wait()
        self.assertEqual(code, 1, output)
        self.assertEqual(len(re.findall(said.format(f"'{pipe}'"), output)), 1, output)

    def test_trace(self):
        for path in "/dev/null", "-":
            code, output, _ = self.run_job([*TINY, "--data", self.text, "--trace", path], 2)
            self.assertEqual(code, 1, output)
            self.assertIn(f"trace '{path}' is no file (each of the 2 ranks writes one", output)
        self.train(["--steps", "2", "--compress", "lsh", "--trace", self.path("t.json")], ranks=2)
        self.assertEqual(sorted(name for name in os.listdir(self.folder) if name.startswith("t.")),
                         ["t.rank0.json", "t.rank1.json"])
        for rank in range(2):
            with open(self.path(f"t.rank{rank}.json"), encoding="utf-8") as file:
                names = {event.get("name") for event in json.load(file)["traceEvents"]}
            for phase in ("step", "attention", "dense_ffn", "experts", "dispatch", "combine",
                          "dispatch_backward", "combine_backward", "encode", "decode",
                          "all_to_all", "reduce_gradients", "optimizer", "evaluate"):
                self.assertIn("lshmoe::" + phase, names)

    def test_config(self):
        config = self.write("c.ini", "steps = 3\ncompress = lsh\nprogress = 1\n")
        output = self.train(["--config", config, "--steps", "2"])
        self.assertIn("compress lsh, 2 steps", output)
        self.assertIn("step 2/2", output)

    def test_compression_switched_off(self):
        # What a file says of a codec may stay, as in the comparisons of README.md.
        config = self.write("c.ini", "compress = lsh\nmax-error = 0.3\ncodec-state = learned\n"
                                     "rounding = dithered\nsteps = 1\n")
        for more in ([], ["--restore", "source"]):
            output = self.train(["--config", config, "--compress", "none", *more])
            self.assertIn("compress none, 1 step of ", output)
        # Gradients alone.
        self.train(["--steps", "1", "--compress-backward", "lsh", "--rounding", "dithered",
                    "--metrics", self.path("m.jsonl")], ranks=2)
        sent = self.metrics()[0]["codec_bytes"]
        self.assertLess(sent["combine_backward"], 0.5 * sent["dispatch"])

    @unittest.skipUnless("LSHMOE_PRESET" in os.environ, "quickstart.sh would build another tree")
    def test_quickstart_takes_another_config(self):
        config = self.write("c.ini", "steps = 2\ncompress = bf16\nprogress = 1\n")
        for args in (["--config", config], ["--config=" + config]):
            code, output, _ = self.run_job(
                [*TINY, "--data", self.text, "--metrics", self.path("m.jsonl"), *args],
                program=QUICKSTART, limit=120)
            self.assertEqual(code, 0, output)
            self.assertIn("compress bf16, 2 steps", output)


class Study(TrainTest):
    SETTINGS = ["--compress none", "--compress none --max-error 0.5", "--compress bf16",
                "--compress lsh --max-error 0.3", "--compress bf16 --capacity-factor 0.5"]

    def test_study(self):
        asked = [word for setting in self.SETTINGS for word in ("--study-setting", setting)]
        output = self.train(["--steps", "6", "--seed", "4", "--study", "--study-seeds", "2", *asked, "--metrics",
                             self.path("s.jsonl")], ranks=2, limit=120)
        runs = self.metrics("s.jsonl")
        self.assertEqual([(run["seed"], run["setting"]) for run in runs],
                         [(seed, setting) for seed in (4, 5) for setting in self.SETTINGS])
        for none, same, bf16, lsh, dropping in (runs[:5], runs[5:]):
            # fp32 rows, ids and weights: a little over twice bf16's bytes.
            self.assertTrue(2 < none["share"] < 2.6)
            self.assertEqual(none["share"], none["bytes_sent"] / none["bytes_raw"])
            for run in (none, same, bf16, lsh, dropping):
                self.assertEqual(run["bytes_bf16_reference"], none["bytes_raw"])
                self.assertEqual(run["steps"], 6)
                self.assertGreater(run["step_ms"], run["codec_ms"])
                self.assertGreater(run["batch_noise"], 0)
            self.assertLess(dropping["share"], 0.7 * bf16["share"])
            self.assertLess(lsh["share"], 0.5 * bf16["share"])
            self.assertEqual(none["eval_loss"], same["eval_loss"])
            self.assertEqual(none["codec_noise"], 0)
            self.assertTrue(0 < bf16["codec_noise"] < 0.01 * lsh["codec_noise"])
            for run in (bf16, lsh, dropping):
                self.assertLessEqual(run["codec_bias"], run["codec_noise"])
        # A run of the study is the run that its options give.
        self.train(["--steps", "6", "--seed", "5", *self.SETTINGS[3].split(), "--metrics",
                    self.path("m.jsonl")], ranks=2)
        self.assertEqual(self.metrics()[-1]["eval_loss"], runs[8]["eval_loss"])
        self.assertEqual(sum(line["bytes_sent"] for line in self.metrics()), runs[8]["bytes_sent"])
        # The table: a line a setting, with the mean over the seeds.
        for i, setting in enumerate(self.SETTINGS):
            line, = [line for line in output.splitlines()
                     if line.endswith("  " + setting) and not line.startswith("seed")]
            cells = line.split()
            losses = [runs[i]["eval_loss"], runs[i + 5]["eval_loss"]]
            self.assertEqual(cells[1], f"{sum(losses) / 2:.4f}")
            self.assertEqual(cells[2], f"({min(losses):.4f}-{max(losses):.4f})")
            share = 100 * (runs[i]["share"] + runs[i + 5]["share"]) / 2
            self.assertAlmostEqual(float(cells[0]), share, delta=0.051)


    def test_on_one_rank(self):
        # Nothing is sent, but the codec's noise can be seen. What a file says of the codec rests.
        config = self.write("c.ini", "max-error = 0.3\ncapacity-factor = 0.5\n")
        output = self.train(["--config", config, "--steps", "4", "--study", "--study-seeds", "1", "--study-setting",
                             "--compress none", "--study-setting", "--compress lsh --codec-on-self",
                             "--metrics", self.path("s.jsonl")], limit=120)
        none, lsh = self.metrics("s.jsonl")
        self.assertEqual((none["share"], lsh["share"], none["codec_noise"]), (None, None, 0))
        self.assertGreater(lsh["codec_noise"], 0)
        self.assertNotIn("nan", output)
        self.assertRegex(output, r"\n +-  .*  --compress lsh --codec-on-self\n")


class Gpu(TrainTest):
    """--device cuda: on GPUs where there are some; how it is refused where there are none."""

    def setUp(self):
        super().setUp()
        self.gpus = len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])
        # The first start on a machine reads some gigabytes of libraries from its disk.
        _, output, _ = self.run_job(["--data", self.text, "--device", "cuda", "--steps", "0"],
                                    limit=120)
        self.built = "built without CUDA" not in output

    def refused(self, args, ranks, text):
        code, output, _ = self.run_job([*TINY, "--data", self.text, "--steps", "1", *args], ranks)
        self.assertNotEqual(code, 0, output)
        errors = [line for line in output.splitlines() if "[error]" in line]
        self.assertEqual(len(errors), 1, output)
        self.assertRegex(errors[0], text)

    def test_without_cuda(self):
        if self.built:
            self.skipTest("this build has CUDA")
        self.refused(["--device", "cuda"], 2, r"without CUDA\): rebuild with -DLSHMOE_CUDA=ON, or use "
                     r"--device cpu")
        self.refused(["--comm-backend", "nccl"], 1, r"without NCCL\): rebuild with -DLSHMOE_CUDA=ON")
        self.refused(["--nvtx"], 1, r"without CUDA\): rebuild with -DLSHMOE_CUDA=ON, or use --trace")
        self.train(["--device", "auto", "--steps", "1"])

    def test_without_gpu(self):
        if self.gpus or not self.built:
            self.skipTest("there is a GPU, or this build has no CUDA")
        no_gpu = r"no GPU for rank 0 on .* \(.+\): use --device cpu, or a machine with GPUs"
        for args in (["--device", "cuda"], ["--comm-backend", "nccl"], ["--share-gpu"],
                     ["--device", "cuda", "--share-gpu", "--comm-backend", "mpi"]):
            for ranks in (1, 2):
                with self.subTest(args=args, ranks=ranks):
                    self.refused(args, ranks, no_gpu)
        output = self.train(["--device", "auto", "--steps", "2", "--nvtx"], ranks=2)
        self.assertIn("2 ranks, ep-size 2", output)

    def test_too_few_gpus(self):
        if not self.gpus or not self.built:
            self.skipTest("no GPU (/dev/nvidia0), or this build has no CUDA")
        self.refused(["--device", "cuda"], self.gpus + 1,
                     rf" has {self.gpus} GPUs? for its {self.gpus + 1} ranks .*--share-gpu")

    def test_trains(self):
        if not self.gpus or not self.built:
            self.skipTest("no GPU (/dev/nvidia0), or this build has no CUDA")
        jobs = [(1, ["--device", "cuda"]), (2, ["--device", "cuda", "--share-gpu"])]
        if self.gpus > 1:
            jobs.append((2, ["--device", "cuda", "--comm-backend", "nccl"]))
        more = ["--steps", "30", "--eval-every", "0", "--compress", "lsh", "--codec-state", "learned"]
        for ranks, args in jobs:
            for dtype in ("fp32", "bf16"):
                with self.subTest(ranks=ranks, args=args, dtype=dtype):
                    runs = []
                    for place in (["--device", "cpu"], args, args):
                        self.train([*more, *place, "--dtype", dtype, "--metrics", self.path("g.jsonl")],
                                   ranks, limit=120)
                        runs.append(self.metrics("g.jsonl"))
                    self.assertAlmostEqual(runs[0][0]["loss"], runs[1][0]["loss"], delta=0.02)
                    self.assertAlmostEqual(runs[0][-1]["eval_loss"], runs[1][-1]["eval_loss"], delta=0.2)
                    same = [[{k: line[k] for k in KEYS if not re.search("_ms|_s$", k)} for line in run]
                            for run in runs[1:]]
                    self.assertEqual(*same)
                    self.assertLessEqual(max(line["max_error_ratio"] for line in runs[1]), 1.0)


class Failures(TrainTest):
    """A rank that fails ends the job: in time, with a failing exit code, named."""

    def victim(self, how, ranks, rank, **more):
        return self.run_job([*TINY, "--data", self.text, "--steps", "100", "--compress", "lsh",
                             "--timeout", "3"], ranks, program=VICTIM,
                            env={"LSHMOE_VICTIM": how, "LSHMOE_VICTIM_RANK": str(rank)}, **more)

    def ended_badly(self, code, output, seconds):
        self.assertNotEqual(code, 0, output)
        self.assertNotIn("finished", output)
        self.assertLess(seconds, 15, output)

    def test_throws(self):
        for ranks, rank in ((1, 0), (4, 2)):
            result = self.victim("throw", ranks, rank)
            self.ended_badly(*result)
            prefix = f"[rank {rank}] " if ranks > 1 else ""
            self.assertIn(prefix + "[error] no more text\n", result[1])
            self.assertNotIn("second line", result[1])

    def test_killed(self):
        result = self.victim("kill", 4, 2)
        self.ended_badly(*result)
        self.assertIn("signal 9", result[1])

    def test_killed_unseen_by_mpirun(self):
        # mpirun told to let the others live: they must find out, and end, by themselves.
        _, output, seconds = self.run_job(
            ["-c", '"$0" "$@"; echo "rank $OMPI_COMM_WORLD_RANK exits with $?"', VICTIM, *TINY,
             "--data", self.text, "--steps", "100", "--compress", "lsh", "--timeout", "3"],
            4, program="sh", mpi_args=["--enable-recovery"],
            env={"LSHMOE_VICTIM": "kill", "LSHMOE_VICTIM_RANK": "2"})
        self.assertLess(seconds, 15, output)
        for rank in (0, 1, 3):
            self.assertIn(f"rank {rank} exits with 1\n", output)
        self.assertRegex(output, r"\[error\] no answer for 3 s in .*rank 2 on ")

    def test_other_launchers(self):
        # Each of their processes would train by itself and write the same files.
        for name, more in (("PMI_SIZE", {"PMI_RANK": "2"}), ("WORLD_SIZE", {"RANK": "2"})):
            metrics = self.path("m.jsonl")
            code, output, _ = self.run_job([*TINY, "--data", self.text, "--metrics", metrics],
                                           env={name: "4", **more})
            self.assertEqual(code, 1, output)
            self.assertRegex(output, rf"\[error\] {name} is 4 but this process is alone .*start with")
            self.assertFalse(os.path.exists(metrics))

    def test_frozen(self):
        result = self.victim("freeze", 4, 2)
        self.ended_badly(*result)
        self.assertRegex(result[1], r"\[rank [013]\] \[error\] no answer for 3 s in .*rank 2 on ")


class Divergence(TrainTest):
    """Said once, by rank 0, with exit code 1, whatever travels."""
    BASE = [word for word in TINY if word not in ("--warmup-steps", "5", "--lr", "0.01")]
    WILD = [*BASE, "--steps", "9", "--lr", "1e30", "--warmup-steps", "0", "--clip-grad", "0", "--eval-every", "0"]

    def test_is_said_once(self):
        for compress in ("none", "int8", "lsh"):
            for ranks, ep_size in ((1, 1), (4, 4), (4, 2)):
                with self.subTest(compress=compress, ranks=ranks, ep_size=ep_size):
                    code, output, _ = self.run_job(
                        [*self.WILD, "--data", self.text, "--compress", compress,
                         "--ep-size", str(ep_size)], ranks)
                    self.assertEqual(code, 1, output)
                    errors = [line for line in output.splitlines() if "[error]" in line]
                    self.assertEqual(len(errors), 1, output)
                    self.assertRegex(errors[0], r"step \d: .*\(training diverged\): lower --lr, or set --clip-grad")
                    self.assertNotIn("MPI_ABORT", output)

    def test_skipped_steps(self):
        code, output, _ = self.run_job([*self.WILD, "--data", self.text, "--compress", "lsh",
                                        "--skip-nonfinite", "3", "--metrics", self.path("m.jsonl")], 4)
        self.assertEqual(code, 1, output)
        errors = [line for line in output.splitlines() if "[error]" in line]
        self.assertEqual(len(errors), 1, output)
        self.assertIn("(training diverged; skipped before it: 3 steps): lower --lr", errors[0])
        lines = self.metrics()
        skipped = [line for line in lines if line["skipped"]]
        self.assertEqual(len(skipped), 3, lines)
        for line in skipped:
            self.assertEqual(list(line), ["step", "lr", "skipped"])
            self.assertIn(f"step {line['step']}/9  skipped: {line['skipped']}", output)
        self.assertEqual(list(lines[0]), KEYS)


class Signals(TrainTest):
    ENDLESS = ["--steps", "1000000", "--progress", "1", "--eval-every", "0", "--compress", "lsh"]

    def stopped_by(self, number, ranks, more=(), until="step 5/"):
        """Sends the signal once training runs; returns (exit code, output, seconds from then)."""
        args = [*TINY, *self.ENDLESS, "--data", self.text, "--metrics", self.path("m.jsonl"), *more]
        job = subprocess.Popen(command(args, ranks), text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
        watchdog = subprocess.Popen(["sh", "-c", f"sleep 40; kill -9 -{job.pid}"],
                                    start_new_session=True)
        try:
            output = ""
            while until not in output:
                line = job.stdout.readline()
                self.assertNotEqual(line, "", output)
                output += line
            start = time.monotonic()
            job.send_signal(number)
            output += job.communicate()[0]
            return job.returncode, output, time.monotonic() - start
        finally:
            os.killpg(watchdog.pid, signal.SIGKILL)
            watchdog.wait()

    def summary_in(self, output):
        step = int(re.search(r"stopped after step (\d+) of 1000000", output).group(1))
        self.assertGreaterEqual(step, 5)
        self.assertEqual(len(self.metrics()), step)
        self.assertIn("MiB saved" if "MiB" in output else "training loss", output)
        self.assertRegex(output, r"  time .*optimizer")

    def test_sigusr1_ends_all_ranks_after_the_step(self):
        for ranks in (1, 4):
            code, output, seconds = self.stopped_by(signal.SIGUSR1, ranks)
            self.assertEqual(code, 0, output)
            self.assertLess(seconds, 10)
            self.summary_in(output)

    def test_ctrl_c_alone(self):
        code, output, _ = self.stopped_by(signal.SIGINT, 1)
        self.assertEqual(code, 0, output)
        self.summary_in(output)

    def test_ctrl_c_on_mpirun(self):
        # mpirun gives the ranks a second.
        _, output, _ = self.stopped_by(signal.SIGINT, 4)
        self.summary_in(output)

    def test_sigterm_gives_up_a_long_step(self):
        # A step of some minutes: nobody waits for its end.
        for ranks, ep_size in ((1, 1), (4, 4), (4, 2)):
            args = ["--accumulate", "100000", "--ep-size", str(ep_size)]
            code, output, seconds = self.stopped_by(signal.SIGTERM, ranks, args, until="tokens\n")
            self.assertLess(seconds, 30)
            self.assertIn("stopped before the first of 1000000 steps was whole", output)
            if ranks == 1:  # mpirun's own is that of the signal
                self.assertEqual(code, 0, output)
        # The summary is that of the last whole step.
        args = ["--accumulate", "100"]
        code, output, seconds = self.stopped_by(signal.SIGTERM, 4, args, until="step 1/")
        self.assertLess(seconds, 30)
        self.assertRegex(output, r"stopped after step \d of 1000000")
        self.assertIn("training loss", output)

    @unittest.skipUnless("LSHMOE_PRESET" in os.environ, "quickstart.sh would build another tree")
    def test_ctrl_c_on_quickstart(self):
        pid, terminal = pty.fork()
        if pid == 0:
            os.execv(QUICKSTART, [QUICKSTART, *TINY, *self.ENDLESS[:-2], "--data", self.text,
                                  "--metrics", self.path("m.jsonl")])
        output, pressed = "", False
        deadline = time.monotonic() + 60
        while True:
            if not select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]:
                os.kill(pid, signal.SIGKILL)
                self.fail("hangs: " + output)
            try:
                output += os.read(terminal, 65536).decode()
            except OSError:  # the script has ended
                break
            if not pressed and "step 5/" in output:
                pressed = os.write(terminal, b"\x03") == 1
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0, output)
        self.assertTrue(pressed)
        self.assertIn("4 ranks", output)
        self.summary_in(output)


if __name__ == "__main__":
    unittest.main()
