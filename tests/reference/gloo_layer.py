"""Plain PyTorch expert parallelism over gloo, beside lshmoe's layer in the same processes.

    mpirun -n 2 python gloo_layer.py MODULE.so [--repetitions 21]

Checks that both give the same outputs and gradients, then times forward + backward of both in turn,
uncompressed, and of their experts alone. Prints medians and ratios; with one repetition it is a test.
"""

import argparse
import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F


class AllToAll(torch.autograd.Function):
    """Rows between ranks; the backward sends the gradients back."""

    @staticmethod
    def forward(ctx, rows, send, receive):
        ctx.sizes = send, receive
        out = rows.new_empty(sum(receive), rows.size(1))
        dist.all_to_all_single(out, rows.contiguous(), receive, send)
        return out

    @staticmethod
    def backward(ctx, grad):
        send, receive = ctx.sizes
        out = grad.new_empty(sum(send), grad.size(1))
        dist.all_to_all_single(out, grad.contiguous(), send, receive)
        return out, None, None


class GlooLayer(torch.nn.Module):
    """The textbook layer: choices sorted by expert, all-to-all, experts one by one, and back."""

    def __init__(self, gate, w1, b1, w2, b2, top_k):
        super().__init__()
        self.gate, self.w1, self.b1, self.w2, self.b2 = (
            torch.nn.Parameter(p.detach().clone()) for p in (gate, w1, b1, w2, b2))
        self.top_k = top_k

    def experts(self, rows, counts):
        blocks = rows.split(counts)
        return torch.cat([
            F.linear(F.gelu(F.linear(block, self.w1[e], self.b1[e])), self.w2[e], self.b2[e])
            for e, block in enumerate(blocks)])

    def forward(self, x):
        ranks, local = dist.get_world_size(), self.w1.size(0)
        weights, ids = F.linear(x, self.gate).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)

        order = ids.flatten().argsort(stable=True)
        token = order // self.top_k
        counts = ids.flatten().bincount(minlength=ranks * local)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        send = counts.view(ranks, local).sum(1).tolist()
        receive = received.view(ranks, local).sum(1).tolist()

        rows = AllToAll.apply(x[token], send, receive)
        expert = torch.arange(local).repeat(ranks).repeat_interleave(received)
        by_expert = expert.argsort(stable=True)
        y = self.experts(rows[by_expert], received.view(ranks, local).sum(0).tolist())
        back = AllToAll.apply(torch.empty_like(y).index_copy(0, by_expert, y), receive, send)
        return torch.zeros_like(x).index_add(
            0, token, back * weights.flatten()[order].unsqueeze(1))


def median(values):
    return sorted(values)[len(values) // 2]


def timed(step):
    """Seconds of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    step()
    seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--tokens", type=int, default=1024, help="a rank")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--ffn-hidden-size", type=int, default=1024)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=21)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.classes.load_library(args.module)
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
    ranks = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1))
    # The ranks of one mpirun meet at a file named after it.
    store = os.path.join(tempfile.gettempdir(),
                         f"lshmoe-gloo-{os.getppid()}-{os.environ.get('PMIX_NAMESPACE', 'alone')}")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks)

    ours = torch.classes.lshmoe_reference.Layer(args.hidden_size, args.ffn_hidden_size,
                                                args.num_experts, args.top_k)
    ours_parameters = ours.parameters()
    reference = GlooLayer(*ours_parameters, args.top_k)
    generator = torch.Generator().manual_seed(1 + rank)
    x = torch.randn(args.tokens, args.hidden_size, generator=generator)
    grad = torch.randn(x.shape, generator=generator)

    def run(forward, parameters):
        leaf = x.clone().requires_grad_()
        for parameter in parameters:
            parameter.grad = None
        y = forward(leaf)
        y.backward(grad)
        return [y.detach(), leaf.grad, *(p.grad for p in parameters)]

    def run_ours():
        return run(ours.forward, ours_parameters)

    def run_reference():
        return run(reference, list(reference.parameters()))

    names = ["output", "x.grad", "gate", "w1", "b1", "w2", "b2"]
    for name, got, want in zip(names, run_ours(), run_reference(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5,
                                   msg=lambda text: f"rank {rank}, {name}: {text}")

    # The experts alone, on as many rows as they had in the layer.
    ids = F.linear(x, ours_parameters[0]).topk(args.top_k).indices
    counts = ids.flatten().bincount(minlength=args.num_experts)
    dist.all_reduce(counts)
    local = args.num_experts // ranks
    rows_per_expert = counts[rank * local:(rank + 1) * local].tolist()
    rows = torch.randn(sum(rows_per_expert), args.hidden_size, generator=generator)
    rows_grad = torch.randn(rows.shape, generator=generator)

    def run_experts(layer):
        layer.experts(rows.clone().requires_grad_(), rows_per_expert).backward(rows_grad)

    steps = {"gloo": run_reference, "lshmoe": run_ours,
             "gloo experts": lambda: run_experts(reference),
             "lshmoe experts": lambda: run_experts(ours)}
    seconds = {name: [] for name in steps}
    for i in range(args.repetitions + 1):
        for name, step in steps.items():
            taken = timed(step)
            if i > 0:  # the first one warms up
                seconds[name].append(taken)

    if rank == 0:
        ms = {name: 1e3 * median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            print(f"{name:15} median {ms[name]:8.2f} ms  (min {1e3 * min(values):.2f}, "
                  f"max {1e3 * max(values):.2f}, {len(values)} repetitions)")
        rest = {name: [a - b for a, b in zip(seconds[name], seconds[name + " experts"])]
                for name in ("gloo", "lshmoe")}
        whole = [a / b for a, b in zip(seconds["lshmoe"], seconds["gloo"])]
        print(f"layer:               lshmoe / gloo = {median(whole):.3f} (median of pairs)")
        print(f"beyond its experts:  lshmoe {1e3 * median(rest['lshmoe']):.2f} ms, "
              f"gloo {1e3 * median(rest['gloo']):.2f} ms, "
              f"ratio {median(rest['lshmoe']) / median(rest['gloo']):.3f}")
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
