"""The ops from Python: torch.ops.load_library(liblshmoe.so), then torch.ops.lshmoe.*"""

import sys
import threading
import unittest

import torch

LIBRARY = sys.argv.pop()
torch.ops.load_library(LIBRARY)
OPS = torch.ops.lshmoe


class TorchOps(unittest.TestCase):
    def test_schemas_are_functional(self):
        for name in ("dispatch", "dispatch_backward", "combine", "combine_backward", "swap_rows",
                     "encode", "decode"):
            schema = getattr(OPS, name).default._schema
            self.assertFalse(schema.is_mutable, str(schema))

    def test_encode_decode(self):
        rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
        data, sizes, _, _ = OPS.encode(rows, [2, 0, 3], kind="none")
        self.assertEqual(data.dtype, torch.uint8)
        self.assertEqual(sizes.sum().item(), data.numel())
        self.assertEqual(sizes[1].item(), 0)
        back, counts = OPS.decode(data, sizes.tolist(), 8, torch.float32, kind="none")
        self.assertTrue(torch.equal(back, rows))
        self.assertEqual(counts.tolist(), [2, 0, 3])

    def test_damaged_bytes_are_refused(self):
        data, sizes, _, _ = OPS.encode(torch.ones(3, 4), [3], kind="none")
        data[-1] ^= 1
        with self.assertRaises(RuntimeError):
            OPS.decode(data, sizes.tolist(), 4, torch.float32, kind="none")

    def test_dispatch_and_combine(self):
        tokens, hidden, experts, top_k = 7, 4, 3, 2
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64,
                        requires_grad=True)
        weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64,
                             requires_grad=True)
        ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].contiguous()
        ids[2, 0] = -1
        scale = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)

        exchange = torch.classes.lshmoe.Exchange(hidden, experts, "none", 0.1, False)
        rows, row_weights, counts, plan = OPS.dispatch(x, weights, ids, exchange)
        self.assertEqual(counts.tolist(), [(ids == e).sum().item() for e in range(experts)])
        outputs = rows * scale.repeat_interleave(counts)[:, None]
        y = OPS.combine(outputs, row_weights, plan, exchange)

        factor = sum(weights[:, i] * torch.where(ids[:, i] >= 0, scale[ids[:, i]], 0.0)
                     for i in range(top_k))
        expected = x * factor[:, None]
        torch.testing.assert_close(y, expected)
        grad = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
        got = torch.autograd.grad(y, (x, weights), grad)
        want = torch.autograd.grad(expected, (x, weights), grad)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])

    def test_combine_refuses_a_plan_that_is_none(self):
        exchange = torch.classes.lshmoe.Exchange(4, 2)
        rows, row_weights, _, plan = OPS.dispatch(torch.ones(3, 4), torch.ones(3, 1),
                                                  torch.tensor([[0], [1], [1]]), exchange)
        plan[9] = plan[9] + 100
        with self.assertRaisesRegex(RuntimeError, "plan"):
            OPS.combine(rows, row_weights, plan, exchange)

    def test_one_exchange_in_several_threads(self):
        for kind, on_self in (("none", False), ("none", True), ("int8", True), ("lsh", True)):
            exchange = torch.classes.lshmoe.Exchange(64, 8, kind, 0.05, on_self)
            wrong, errors = [], []

            def work(seed, exchange=exchange, wrong=wrong, errors=errors):
                generator = torch.Generator().manual_seed(seed)
                try:
                    for call in range(60):
                        tokens = int(torch.randint(1, 400, (1,), generator=generator))
                        x = torch.randn(tokens, 64, generator=generator)
                        ids = torch.arange(tokens).remainder(8).unsqueeze(1)
                        rows, weights, _, plan = OPS.dispatch(x, torch.ones(tokens, 1), ids, exchange)
                        y = OPS.combine(rows, weights, plan, exchange)
                        if not (y - x).norm() <= 0.12 * x.norm():
                            wrong.append((seed, call))
                except RuntimeError as error:
                    errors.append(str(error))

            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual((wrong, errors), ([], []), (kind, on_self))

    def test_errors_have_texts(self):
        with self.assertRaisesRegex(RuntimeError, "not divisible|num_experts"):
            torch.classes.lshmoe.Exchange(4, 0, "none", 0.1, False)
        exchange = torch.classes.lshmoe.Exchange(4, 2)
        with self.assertRaisesRegex(RuntimeError, "experts are 0 .. 1"):
            OPS.dispatch(torch.ones(1, 4), torch.ones(1, 1), torch.tensor([[2]]), exchange)


if __name__ == "__main__":
    unittest.main()
